"""Windows of micro-batches, weighed and flushed: each is one large batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import FloodWindow, flood, scale_by_flood, shapes
from tests import forms, oracles

LEVEL, STEPS = 0.5, 120


def micro_batches(devices=None):
    """Rows of arguments: weights of every kind, NaN where they are zero, and flushes.

    The loss, and the weight, are of each device; the gradient is of all of them.
    """
    rng = np.random.default_rng(0)
    shape = (STEPS, devices) if devices else (STEPS,)
    weight = rng.choice([0, 0.5, 1, 3, 7], shape, p=[0.3, 0.1, 0.2, 0.2, 0.2])
    weight[40:46] = 0  # whole windows
    value = LEVEL + 0.5 * rng.normal(size=shape)
    grads = rng.normal(size=(STEPS, 2)) + 0.3
    none = weight if not devices else weight.sum(1)
    value[weight == 0], grads[none == 0] = np.nan, [np.inf, np.nan]
    flush = rng.random(STEPS) < 0.15
    flush[-1] = True
    float32 = {"grads": grads, "value": value, "weight": weight}
    return {name: x.astype(np.float32) for name, x in float32.items()}, flush


def stepped(optimizer, rows, *, jit=True, devices=None):
    """The updates of each row of arguments, and the last state."""

    def step(state, row):
        grads, extra = (
            row["grads"],
            {name: row[name] for name in row if name != "grads"},
        )
        if not devices:
            return optimizer.update(grads, state, grads, **extra)[::-1]
        # as in shard_map: of each device its loss and weight, and the state of all
        flush = {name: extra.pop(name) for name in ["flush"] if name in extra}
        updates, states = jax.vmap(
            lambda each: optimizer.update(grads, state, grads, **each, **flush),
            axis_name="devices",
        )(extra)
        return jax.tree.map(lambda leaf: leaf[0], states), (updates, states)

    rows = jax.tree.map(jnp.asarray, rows)
    state = optimizer.init(jnp.zeros_like(rows["grads"][0]))
    if jit:
        state, found = jax.jit(lambda: jax.lax.scan(step, state, rows))()
    else:
        number, found = len(rows["grads"]), []
        for i in range(number):
            state, updates = step(state, {name: x[i] for name, x in rows.items()})
            found.append(updates)
        found = jnp.stack(found)
    if devices:  # all have the same
        for leaf in jax.tree.leaves(found):
            same = np.broadcast_to(leaf[:, :1], leaf.shape)
            np.testing.assert_array_equal(leaf, same)
        found = found[0][:, 0]
    return np.asarray(found), state


GROWING, MOVING = 1 + np.arange(STEPS) % 4, LEVEL + 0.3 * np.sin(np.arange(STEPS))
MOVING[3::5] = -np.inf
SKIPS = {"should_skip_update_fn": optax.skip_not_finite}
# name -> form, options of ours, options of the oracle
CASES = {
    "step, chain": ("scale_by_flood", {}, {"sizes": 1}),
    "step, wrapper": ("flood", {}, {"sizes": 1}),
    "steps that are skipped": ("flood_skip", {}, {"sizes": 1, "skip": True}),
    "windows of 2": ("flood_every_k", {}, {}),
    "windows of 3": ("flood_every_k", {"every_k": 3}, {"sizes": 3}),
    "windows of 4, that skip": (
        "flood_every_k",
        {"every_k": 4} | SKIPS,
        {"sizes": 4, "skip": True},
    ),
    "windows and levels that change": (
        "flood_every_k",
        {
            "every_k": lambda window: jnp.take(GROWING, window),
            "level": lambda window: jnp.take(jnp.float32(MOVING), window),
        },
        {"sizes": GROWING, "level": MOVING},
    ),
    "soft": (
        "flood_every_k",
        {"shape": shapes.soft(0.7)},
        {"shape": oracles.SHAPES["soft"]},
    ),
    "band": ("flood_every_k", {"band": 0.125}, {"band": 0.125}),
    "band of steps": ("flood", {"band": 0.125}, {"band": 0.125, "sizes": 1}),
}
PLACES = [
    *((case, "scan", None) for case in CASES),
    *((case, "op by op", None) for case in CASES if "skip" in case or "step, " in case),
    *((case, "scan", 4) for case in CASES if "skip" not in case),
]


@pytest.mark.parametrize(("case", "mode", "devices"), PLACES)
def test_weighed_and_flushed_windows_equal_the_large_batch(case, mode, devices):
    form, options, wanted = CASES[case]
    rows, flush = micro_batches(devices)
    if "skip" in case:
        rows["value"][5::7] = np.nan
    if form.startswith("flood"):
        rows["flush"] = flush
    options = dict(options, axis_name="devices") if devices else dict(options)
    made = forms.OPTAX[form](optax.identity(), options.pop("level", LEVEL), **options)
    number = STEPS if mode == "scan" else 30
    rows = {name: x[:number] for name, x in rows.items()}
    got, state = stepped(made, rows, jit=mode == "scan", devices=devices)

    weight, value = rows["weight"], rows["value"]
    if devices:
        sums = np.where(weight > 0, weight * value, 0).sum(1)
        weight = weight.sum(1)
        value = np.divide(sums, weight, out=np.full(STEPS, np.nan), where=weight > 0)
    given = {"sizes": 2, "level": LEVEL} | wanted
    with np.errstate(invalid="ignore"):
        expected, losses = oracles.windows(
            rows["grads"], value, weights=weight, flushes=rows.get("flush"), **given
        )
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
    assert optax.tree.get(state, "flood_step") == len(losses)
    np.testing.assert_allclose(
        optax.tree.get(state, "flood_value"), losses[-1], rtol=2e-6
    )
    if form == "flood_every_k" and mode == "scan":
        below = np.sign(expected) == -np.sign(rows["grads"])
        assert 5 < below.all(1).sum() < len(losses) - 5
        window = state.flood_window._replace(flood_skip_state=())
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(window))


# ---- what a micro-batch leaves behind ----


def one_by_one(optimizer, micro_batches, jit=True):
    """The updates of each micro-batch, given as gradient, loss and more; the state."""
    state, every = optimizer.init(jnp.zeros(2)), []
    update = jax.jit(optimizer.update) if jit else optimizer.update
    for grads, value, *more in micro_batches:
        extra = more[0] if more else {}
        updates, state = update(jnp.asarray(grads), state, value=value, **extra)
        every.append(np.asarray(updates))
    return np.stack(every), state


def test_weight_zero_is_not_skipped_and_keeps_what_the_rule_remembers():
    optimizer = flood(optax.sgd(1.0), 0.6, every_k=2, **SKIPS)
    bad = [np.nan, 0.0], 0.5, {"weight": 0.0}
    skipped = [np.nan, np.nan], 0.5, {"weight": 2.0}
    good = [1.0, 2.0], 0.5, {"weight": 2.0}
    updates, _ = one_by_one(optimizer, (skipped, bad, good))
    np.testing.assert_array_equal(updates[2], [1.0, 2.0])  # its second place was taken
    _, state = one_by_one(optimizer, (skipped, bad))
    assert state.flood_window.flood_mini_step == 1
    assert state.flood_window.flood_skip_state["num_not_finite"] == 2


@pytest.mark.parametrize("jit", [False, True])
def test_what_the_skip_rule_remembers_outlives_its_window(jit):
    def rule(updates, number, params):
        del number, params
        return jnp.array(False), {"largest": jnp.max(updates)}

    optimizer = flood(optax.sgd(1.0), 0.5, every_k=2, should_skip_update_fn=rule)
    for number in (1, 2, 3):
        seen = [([-1.0, largest], 1.0) for largest in (3.0, 7.0, 2.0)[:number]]
        window = one_by_one(optimizer, seen, jit)[1].flood_window
        assert window.flood_mini_step == number % 2  # 0: the window closed
        assert window.flood_skip_state["largest"] == seen[-1][0][1]


def test_nan_weight_is_not_taken_for_none():
    batches = [([1.0, 1.0], 0.5, {"weight": jnp.float32(w)}) for w in (np.nan, 1.0)]
    with jax.debug_nans(False):
        updates, _ = one_by_one(flood(optax.sgd(1.0), 0.1, every_k=2), batches)
    assert np.isnan(updates[1]).all()


def test_mixed_calls_with_and_without_weight_count_one_each():
    batches = [([1.0, 0.0], 1.0), ([4.0, 3.0], 2.5, {"weight": 2.0}), ([0.0, 2.0], 3.0)]
    updates, state = one_by_one(flood(optax.sgd(1.0), 0.1, every_k=3), batches)
    np.testing.assert_allclose(updates[2], [-9 / 4, -8 / 4], rtol=1e-6)
    assert state.flood_state.flood_value == pytest.approx(9 / 4)


def test_a_window_from_before_there_were_weights_goes_on_bit_for_bit():
    batches = [([i, 1 / (1 + i)], 0.2 + 0.1 * i, {"weight": 1.0}) for i in range(6)]
    optimizer = flood(optax.adam(0.1), 0.35, every_k=3)
    wanted, _ = one_by_one(optimizer, batches)
    _, state = one_by_one(optimizer, batches[:2])
    old = FloodWindow(*state.flood_window[:4])
    assert old.flood_weight is None
    resumed = optimizer._replace(init=lambda _: state._replace(flood_window=old))
    np.testing.assert_array_equal(one_by_one(resumed, batches[2:])[0], wanted[2:])


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "op by op"])
@pytest.mark.parametrize(
    "optimizer",
    [scale_by_flood(0.5), flood(optax.adamw(0.1), 0.5)],
    ids=["chain", "wrapper"],
)
def test_a_step_of_weight_zero_leaves_the_state_as_it_was(optimizer, jit):
    grads, bad = jnp.array([2.0, -0.5]), jnp.array([np.nan, np.inf])
    update = jit(optimizer.update)
    _, state = update(grads, optimizer.init(grads), grads, value=0.7, weight=3)
    updates, after = update(bad, state, grads, value=np.nan, weight=0)
    np.testing.assert_array_equal(updates, [0.0, 0.0])
    chex.assert_trees_all_equal(after, state)
    assert optax.tree.get(state, "flood_step") == 1


def test_devices_without_weight_count_alike_in_windows_that_mix_both_calls():
    optimizer = flood(optax.sgd(1.0), 0.1, axis_name="devices", every_k=2)
    grads, value = jnp.array([1.0, -1.0]), jnp.array([1.0, 2.0, 3.0, 4.0])

    @functools.partial(jax.vmap, in_axes=(None, None, 0, 0), axis_name="devices")
    def weighted(grads, state, value, weight):
        return optimizer.update(grads, state, value=value, weight=weight)

    @functools.partial(jax.vmap, in_axes=(None, None, 0), axis_name="devices")
    def plain(grads, state, value):
        return optimizer.update(grads, state, value=value)

    weight = jnp.array([0.0, 2.0, 1.0, 1.0])
    _, states = jax.jit(weighted)(grads, optimizer.init(grads), value, weight)
    state = jax.tree.map(lambda leaf: leaf[0], states)
    updates, states = jax.jit(plain)(3 * grads, state, 2 * value)
    np.testing.assert_allclose(updates[0], [-2.0, 2.0], rtol=1e-6)
    value = states.flood_state.flood_value[0]
    np.testing.assert_allclose(value, (2.75 * 4 + 5.0 * 4) / 8, rtol=1e-6)


# ---- precision ----


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "op by op"])
def test_weighted_window_in_bf16_is_rounded_once(jit):
    rng = np.random.default_rng(5)
    rows = {
        "grads": rng.uniform(0.5, 1.5, (24, 2)).astype(jnp.bfloat16),
        "value": rng.uniform(0.5, 1.5, 24).astype(jnp.bfloat16),
        "weight": rng.integers(0, 9, 24, np.int32),
    }
    wide = rows["grads"].astype(float), rows["value"].astype(float), 24
    for side in (0.02, -0.02):
        level = np.average(wide[1], weights=rows["weight"]) + side
        optimizer = flood(optax.sgd(-1.0), level, every_k=24)
        updates, _ = stepped(optimizer, rows, jit=jit)
        wanted, _ = oracles.windows(*wide, level, weights=rows["weight"])
        assert updates.dtype == jnp.bfloat16
        np.testing.assert_array_equal(updates[-1], wanted[-1].astype(jnp.bfloat16))


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
