"""Windows of unequal micro-batches: weights and flush, beside the one large batch."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from flood_optax import FloodWindow, flood, scale_by_flood, shapes
from tests import problems

ROOM, RATE, LEVEL = 6, 0.05, 3.0
NUMBER = 12  # micro-batches, each of ROOM rows of which `sizes` say how many count


def rows(seed, number=NUMBER):
    return problems.micro_batches(number, seed, rows=ROOM, spread=3)


def micro_loss(params, x, y, size):
    """The mean loss of the first `size` rows; NaN, and so its gradient, for none."""
    r = x @ params["w"] + params["b"] - y
    return jnp.sum(jnp.where(jnp.arange(ROOM) < size, r**2, 0.0)) / size


def numpy_training(x, y, windows, level=LEVEL):
    """SGD over windows of (micro-batch, size): losses, last parameters."""
    kept = [
        [ROOM * i + row for i, size in window for row in range(size)]
        for window in windows
    ]
    seen = problems.trained(x, y, kept, rate=RATE, level=level)
    losses = np.array([loss for loss, _ in seen])
    return losses, seen[-1][1] if seen else problems.parameters()


def windows_of(sizes, every_k, flushes):
    """Micro-batches by window, those of closed windows only; every_k is an int."""
    windows, window = [], []
    for number, (size, flush) in enumerate(zip(sizes, flushes, strict=True)):
        window.append((number, size))
        if len(window) == every_k or flush:
            windows.append(window)
            window = []
    return windows


@functools.cache
def trainer(every_k, level=LEVEL):
    optimizer = flood(optax.sgd(RATE), level, every_k=every_k)

    @jax.jit
    def train(x, y, sizes, flushes):
        def step(carry, batch):
            params, state = carry
            xs, ys, size, flush = batch
            value, grads = jax.value_and_grad(micro_loss)(params, xs, ys, size)
            updates, state = optimizer.update(
                grads, state, params, value=value, weight=size, flush=flush
            )
            return (optax.apply_updates(params, updates), state), updates["b"]

        carry = problems.parameters(), optimizer.init(problems.parameters())
        return jax.lax.scan(step, carry, (x, y, sizes, flushes))

    return train


def clear(losses):
    """Whether no window hangs on rounding."""
    return not len(losses) or np.abs(losses - LEVEL).min() > 1e-3


def check_training(seed, every_k, sizes, flushes):
    x, y = rows(seed)
    losses, params = numpy_training(x, y, windows_of(sizes, every_k, flushes))
    if not clear(losses):
        return None
    (got, state), updates = trainer(every_k)(
        x, y, jnp.array(sizes, jnp.float32), jnp.array(flushes)
    )
    chex.assert_trees_all_close(
        jax.tree.map(np.float64, got), params, rtol=2e-5, atol=2e-6
    )
    flood_state = state.flood_state
    assert flood_state.flood_step == len(losses) == np.count_nonzero(updates)
    assert flood_state.flood_below == np.sum(losses < LEVEL)
    if len(losses):
        np.testing.assert_allclose(flood_state.flood_value, losses[-1], rtol=1e-5)
    return losses


NEVER = (False,) * NUMBER
SIZES = (1, 6, 2, 5, 6, 1, 3, 1, 6, 4, 1, 5)


@pytest.mark.parametrize("every_k", [1, 2, 3, 4])
def test_weighted_windows_equal_the_large_batch(every_k):
    losses = check_training(0, every_k, SIZES, NEVER)
    assert losses is not None
    assert 0 < np.sum(losses < LEVEL) < len(losses)
    if every_k == 1:
        return
    # who takes the mean of the means compares another loss
    x, y = rows(0)
    first = windows_of(SIZES, every_k, NEVER)[0]
    means = [
        micro_loss(problems.parameters(), x[number], y[number], size)
        for number, size in first
    ]
    assert np.abs(np.mean(means) - losses[0]) > 0.05


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 50),
    every_k=st.integers(1, 4),
    sizes=st.lists(st.integers(0, ROOM), min_size=NUMBER, max_size=NUMBER),
    flushes=st.lists(st.booleans(), min_size=NUMBER, max_size=NUMBER),
)
def test_any_sizes_and_windows_equal_the_large_batch(seed, every_k, sizes, flushes):
    hypothesis.assume(check_training(seed, every_k, sizes, flushes) is not None)


# ---- one micro-batch after the other ----


def stepped(optimizer, micro_batches, params=None, jit=True):
    """Updates of each micro-batch, given as the arguments of update, and the state."""
    params = jnp.zeros(2) if params is None else params
    state, every = optimizer.init(params), []
    update = jax.jit(optimizer.update) if jit else optimizer.update
    for grads, arguments in micro_batches:
        updates, state = update(jnp.asarray(grads), state, params, **arguments)
        every.append(np.asarray(updates))
    return np.stack(every), state


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_a_spoiled_micro_batch_of_weight_zero_is_as_one_that_is_not_there(jit):
    """Not its place: it fills that, as the padding in a large batch does."""
    bad = ([np.nan, np.inf], {"value": np.nan, "weight": 0.0})
    one = ([1.0, -2.0], {"value": 0.25, "weight": 3.0})
    two = ([5.0, 2.0], {"value": 1.25, "weight": 1.0})
    for order in ((bad, one, two), (one, bad, two), (one, two, bad)):
        updates, state = stepped(flood(optax.sgd(1.0), 0.6, every_k=3), order, jit=jit)
        # mean loss .5 is below .6: uphill along the mean gradient (2, -1)
        np.testing.assert_array_equal(updates, [[0, 0], [0, 0], [2.0, -1.0]])
        assert state.flood_state.flood_value == 0.5
        window = state.flood_window
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(window))


def test_weight_zero_is_not_skipped_and_keeps_what_the_rule_remembers():
    optimizer = flood(
        optax.sgd(1.0), 0.6, every_k=2, should_skip_update_fn=optax.skip_not_finite
    )
    bad = [np.nan, 0.0], {"value": 0.5, "weight": 0.0}
    skipped = [np.nan, np.nan], {"value": 0.5, "weight": 2.0}
    good = [1.0, 2.0], {"value": 0.5, "weight": 2.0}
    updates, state = stepped(optimizer, (skipped, bad, good))
    np.testing.assert_array_equal(updates[2], [1.0, 2.0])  # its second place was taken
    _, state = stepped(optimizer, (skipped, bad))
    assert state.flood_window.flood_mini_step == 1
    assert state.flood_window.flood_skip_state["num_not_finite"] == 2


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_flush_of_a_skipped_micro_batch_closes_the_window_before_it(jit):
    optimizer = flood(
        optax.sgd(1.0), 0.1, every_k=4, should_skip_update_fn=optax.skip_not_finite
    )
    good = [1.0, 2.0], {"value": 0.5, "flush": False}
    skipped = [np.nan, 2.0], {"value": 0.5, "flush": True}
    updates, state = stepped(optimizer, (good, skipped, skipped), jit=jit)
    # the third flushes a window that holds nothing
    np.testing.assert_array_equal(updates, [[0, 0], [-1.0, -2.0], [0, 0]])
    assert state.flood_state.flood_step == 1
    assert state.flood_window.flood_mini_step == 0


def test_flushed_and_weighted_windows_move_the_schedules_by_one():
    optimizer = flood(
        optax.sgd(1.0),
        lambda window: jnp.array([-np.inf, 9.0, 9.0, -np.inf])[window],
        every_k=lambda window: 1 + window,
    )
    batches = [
        ([1.0, 1.0], {"value": 0.5, "weight": 0.0}),  # window 0, which counts nowhere
        ([2.0, 2.0], {"value": 0.5, "weight": 2.0}),  # so this is window 0
        ([3.0, 3.0], {"value": 0.5, "weight": 2.0, "flush": True}),  # 1, of one
        ([4.0, 4.0], {"value": 0.5, "weight": 1.0}),
        ([7.0, 7.0], {"value": 0.5, "weight": 2.0}),
        ([1.0, 2.0], {"value": 0.5, "weight": 3.0}),  # 2, of three
        ([1.0, 2.0], {"value": 0.5, "weight": 3.0, "flush": True}),  # 3, off
    ]
    updates, state = stepped(optimizer, batches)
    mean = np.array([4 + 14 + 3, 4 + 14 + 6]) / 6
    expected = [0, -2, 3, 0, 0, mean[0], -1], [0, -2, 3, 0, 0, mean[1], -2]
    np.testing.assert_allclose(updates, np.transpose(expected), rtol=1e-6)
    assert state.flood_state.flood_step == 4


def test_nan_weight_is_not_taken_for_none():
    batches = [
        ([1.0, 1.0], {"value": 0.5, "weight": jnp.float32(np.nan)}),
        ([1.0, 1.0], {"value": 0.5, "weight": 1.0}),
    ]
    with jax.debug_nans(False):
        traced = jax.jit(flood(optax.sgd(1.0), 0.1, every_k=2).update)
        state = flood(optax.sgd(1.0), 0.1, every_k=2).init(jnp.zeros(2))
        for grads, arguments in batches:
            updates, state = traced(jnp.asarray(grads), state, **arguments)
    assert np.isnan(updates).all()


def test_mixed_calls_with_and_without_weight_count_one_each():
    batches = [
        ([1.0, 0.0], {"value": 1.0}),
        ([4.0, 3.0], {"value": 2.5, "weight": 2.0}),
        ([0.0, 2.0], {"value": 3.0}),
    ]
    updates, state = stepped(flood(optax.sgd(1.0), 0.1, every_k=3), batches)
    np.testing.assert_allclose(updates[2], [-9 / 4, -8 / 4], rtol=1e-6)
    assert state.flood_state.flood_value == pytest.approx(9 / 4)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_weighted_window_in_bf16_is_rounded_once(jit):
    rng = np.random.default_rng(5)
    grads = jnp.asarray(rng.uniform(0.5, 1.5, (24, 2)), jnp.bfloat16)
    values = jnp.asarray(rng.uniform(0.5, 1.5, 24), jnp.bfloat16)
    weights = rng.integers(0, 9, 24)
    batches = [
        (grad, {"value": value, "weight": jnp.int32(weight)})
        for grad, value, weight in zip(grads, values, weights, strict=True)
    ]
    mean = np.average(np.float64(values), weights=weights)
    expected = np.average(np.float64(grads), weights=weights, axis=0)
    for level, sign in ((mean + 0.02, 1), (mean - 0.02, -1)):
        optimizer = flood(optax.sgd(1.0), level, every_k=24)
        updates, _ = stepped(optimizer, batches, jnp.zeros(2, jnp.bfloat16), jit)
        assert updates.dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            updates[-1], (sign * expected).astype(jnp.bfloat16)
        )


# ---- precision ----

MANY = 10_000
LONG = {
    "ones": np.ones(MANY),
    "thirds": np.full(MANY, 1.3),
    "six_decades_each_way": 10.0 ** np.random.default_rng(8).uniform(-6, 6, MANY),
    "rising": 10.0 ** np.linspace(-6, 6, MANY),
    "falling": 10.0 ** np.linspace(6, -6, MANY),
}


@functools.cache
def long_window(weighted):
    optimizer = flood(optax.sgd(1.0), -np.inf, every_k=MANY)

    @jax.jit
    def run(values, weights):
        def step(state, batch):
            value, weight = batch
            extra = {"weight": weight} if weighted else {}
            updates, state = optimizer.update(
                value * jnp.array([1.0, -3.0]), state, value=value, **extra
            )
            return state, updates

        state, updates = jax.lax.scan(
            step, optimizer.init(jnp.zeros(2)), (values, weights)
        )
        return state.flood_state.flood_value, updates[-1]

    return run


@pytest.mark.parametrize("weights", LONG)
@pytest.mark.parametrize("course", ["noise", "creeping", "stairs"])
def test_a_window_of_ten_thousand_loses_no_precision(course, weights):
    """The loss as if rounded once; gradients to the rounding of running means.

    A running mean in float32 rounds once per micro-batch, and what it rounded at the
    i-th is shrunk by W_i / W later: with independent roundings the error is some
    eps sqrt(n / 12), 2e-6 here, but where the loss creeps, increments smaller than
    half a unit in the last place are all lost to the same side. The loss decides the
    sign, so it carries what rounding took, in two numbers; for gradients this would
    double the memory of the window, and half a percent of their noise is no matter.
    """
    rng = np.random.default_rng(9)
    values = {
        "noise": rng.lognormal(0, 1, MANY),
        "creeping": 1 + 1e-4 * np.arange(MANY) / MANY,
        "stairs": 1 + 1e-3 * (np.arange(MANY) > 3000) + 1e-4 * rng.normal(size=MANY),
    }[course].astype(np.float32)
    given = LONG[weights].astype(np.float32)
    mean = np.average(values.astype(np.float64), weights=given.astype(np.float64))
    value, update = long_window(weights != "ones")(values, given)
    np.testing.assert_allclose(value, mean, rtol=1.2e-7)  # one unit in the last place
    np.testing.assert_allclose(update, mean * np.array([-1.0, 3.0]), rtol=6e-5)


# ---- a mapped axis, without accumulation and with it ----

DEVICES = 4


def on_devices(update):
    """As in shard_map: the state is of all, loss, weight and gradient of each."""
    return jax.jit(
        jax.vmap(update, in_axes=(None, None, 0, 0), axis_name="devices", out_axes=0)
    )


@pytest.mark.parametrize("shape", [shapes.reflect(), shapes.soft(0.5)], ids=str)
@pytest.mark.parametrize("level", [1.0, 3.0], ids=["above", "below"])
@pytest.mark.parametrize("form", ["scale_by_flood", "flood", "window"])
def test_weighted_mean_over_a_mapped_axis_decides(form, level, shape):
    values = jnp.array([[9.0, 0.5, np.nan, 1.5], [0.25, 7.0, 2.0, np.nan]])
    weights = jnp.array([[1.0, 6.0, 0.0, 5.0], [8.0, 1.0, 3.0, 0.0]])
    each = np.nansum(np.where(weights > 0, values, 0) * weights, 1) / weights.sum(1)
    optimizer = {
        "scale_by_flood": scale_by_flood(level, shape=shape, axis_name="devices"),
        "flood": flood(optax.identity(), level, shape=shape, axis_name="devices"),
        "window": flood(
            optax.identity(), level, shape=shape, axis_name="devices", every_k=2
        ),
    }[form]
    grads = jnp.array([2.0, -0.5])

    def update(grads, state, value, weight):
        return optimizer.update(grads, state, value=value, weight=weight)

    state, seen = optimizer.init(grads), []
    for value, weight in zip(values, weights, strict=True):
        updates, states = on_devices(update)(grads, state, value, weight)
        for leaf in jax.tree.leaves((updates, states)):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
        state = jax.tree.map(lambda leaf: leaf[0], states)
        seen.append(updates[0])
    losses = each
    if form == "window":
        losses = [np.average(each, weights=weights.sum(1))]
        assert not np.any(seen.pop(0))
    for loss, got in zip(losses, seen, strict=True):
        r = np.float64(loss) - level
        m = np.sign(r) if shape == shapes.reflect() else r / np.hypot(1, r / 0.5)
        np.testing.assert_allclose(got, m * np.array(grads), rtol=2e-6)
    flood_value = optax.tree.get(state, "flood_value")
    np.testing.assert_allclose(flood_value, losses[-1], rtol=2e-6)


def test_a_step_of_weight_zero_is_none_in_either_form():
    grads, bad = jnp.array([2.0, -0.5]), jnp.array([np.nan, np.inf])
    for optimizer in (scale_by_flood(0.5), flood(optax.adamw(0.1), 0.5)):
        for jit in (jax.jit, lambda function: function):
            update = jit(optimizer.update)
            _, state = update(grads, optimizer.init(grads), grads, value=0.7, weight=3)
            updates, after = update(bad, state, grads, value=np.nan, weight=0)
            np.testing.assert_array_equal(updates, [0.0, 0.0])
            chex.assert_trees_all_equal(after, state)
            assert optax.tree.get(state, "flood_step") == 1


def test_one_device_of_weight_zero_and_unweighted_devices_count_alike():
    """Without weight each device counts one, in windows that mix both calls too."""
    optimizer = flood(optax.sgd(1.0), 0.1, axis_name="devices", every_k=2)
    grads = jnp.array([1.0, -1.0])
    weighted = on_devices(
        lambda grads, state, value, weight: optimizer.update(
            grads, state, value=value, weight=weight
        )
    )
    plain = on_devices(
        lambda grads, state, value, _: optimizer.update(grads, state, value=value)
    )
    values, weights = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([0.0, 2.0, 1.0, 1.0])
    _, states = weighted(grads, optimizer.init(grads), values, weights)
    state = jax.tree.map(lambda leaf: leaf[0], states)
    updates, states = plain(3 * grads, state, 2 * values, weights)
    np.testing.assert_allclose(updates[0], [-2.0, 2.0], rtol=1e-6)
    value = states.flood_state.flood_value[0]
    np.testing.assert_allclose(value, (2.75 * 4 + 5.0 * 4) / 8, rtol=1e-6)


# ---- what does not change ----


def spy(seen):
    def update(updates, state, params=None, **extra_args):
        del params
        seen.append(set(extra_args))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@pytest.mark.parametrize("every_k", [1, 2])
def test_weight_and_flush_are_not_handed_to_the_inner_optimizer(every_k):
    seen = []
    optimizer = flood(spy(seen), 0.5, every_k=every_k)
    grads = jnp.ones(2)
    optimizer.update(
        grads, optimizer.init(grads), value=0.3, weight=2.0, flush=True, other=1
    )
    assert seen
    assert all(names == {"value", "other"} for names in seen)


def test_a_window_from_before_there_were_weights_goes_on_bit_for_bit():
    batches = [
        ([float(i), 1.0 / (1 + i)], {"value": 0.2 + 0.1 * i, "weight": 1.0})
        for i in range(6)
    ]
    optimizer = flood(optax.adam(0.1), 0.35, every_k=3)
    wanted, _ = stepped(optimizer, batches)
    _, state = stepped(optimizer, batches[:2])
    old = FloodWindow(*state.flood_window[:4])
    assert old.flood_weight is None
    state = state._replace(flood_window=old)
    for (grads, arguments), expected in zip(batches[2:], wanted[2:], strict=True):
        updates, state = jax.jit(optimizer.update)(
            jnp.asarray(grads), state, jnp.zeros(2), **arguments
        )
        np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize("jit", [False, True])
def test_what_the_skip_rule_remembers_outlives_its_window(jit):
    def rule(updates, number, params):
        del number, params
        return jnp.array(False), {"largest": jnp.max(updates)}

    optimizer = flood(optax.sgd(1.0), 0.5, every_k=2, should_skip_update_fn=rule)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(jnp.zeros(2))
    for step, largest in enumerate([3.0, 7.0, 2.0], start=1):
        grads = jnp.array([-1.0, largest])
        _, state = update(grads, state, value=jnp.float32(1.0))
        assert state.flood_window.flood_mini_step == step % 2  # 0: the window closed
        assert state.flood_window.flood_skip_state["largest"] == largest
