"""Gradient accumulation: a window of micro-batches is flooded as one large batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import average_params, averaged, flood, flooded, scale_by_flood
from tests import problems

ROWS, RATE = 4, 0.05


# ---- a regression whose micro-batches differ, and its oracle in float64 ----


micro_batches = functools.partial(problems.micro_batches, rows=ROWS, spread=2)


def loss_fn(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def numpy_training(x, y, sizes, level):
    """What each window of so many micro-batches gives, as one large batch."""
    windows = np.split(np.arange(ROWS * sum(sizes)), ROWS * np.cumsum(sizes)[:-1])
    return problems.trained(x, y, windows, rate=RATE, level=level)


def train(optimizer, x, y):
    """Runs over the micro-batches; params, updates and losses after each."""

    def step(carry, rows):
        params, state = carry
        value, grads = jax.value_and_grad(loss_fn)(params, *rows)
        updates, state = optimizer.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, updates, value)

    start = problems.parameters()
    carry = start, optimizer.init(start)
    (_, state), history = jax.lax.scan(step, carry, (x, y))
    return state, history


# every_k, and a number of micro-batches that ends on a window
SCHEDULES = {
    "1": (1, 20),
    "2": (2, 40),
    "3": (3, 60),
    "7": (7, 140),
    "growing": (lambda window: 1 + window, 210),
    "cycling": (lambda window: jnp.array([2, 1, 4])[window % 3], 70),
}


def window_sizes(every_k, number):
    sizes = []
    while sum(sizes) < number:
        k = every_k(jnp.int32(len(sizes))) if callable(every_k) else every_k
        sizes.append(int(k))
    assert sum(sizes) == number
    return sizes


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("every_k", "number"),
    SCHEDULES.values(),
    ids=SCHEDULES.keys(),
)
def test_flood_every_k_equals_large_batch_training(every_k, number, seed):
    x, y = micro_batches(number, seed)
    sizes = window_sizes(every_k, number)
    level = 1.7
    expected = numpy_training(x, y, sizes, level)
    losses = np.array([loss for loss, _ in expected])
    assert np.abs(losses - level).min() > 1e-4  # no window hangs on rounding
    assert 3 <= np.sum(losses < level) < len(losses)

    optimizer = flood(optax.sgd(RATE), level, every_k=every_k)
    state, (params, updates, values) = train(optimizer, x, y)
    ends = np.cumsum(sizes) - 1
    for i, end in enumerate(ends):
        chex.assert_trees_all_close(
            jax.tree.map(lambda p, end=end: np.float64(p[end]), params),
            expected[i][1],
            rtol=2e-5,
            atol=2e-6,
        )
    between = np.setdiff1d(np.arange(number), ends)
    assert not np.any(updates["w"][between])
    assert optax.tree.get(state, "flood_step") == len(sizes)
    assert optax.tree.get(state, "flood_below") == np.sum(losses < level)
    value = optax.tree.get(state, "flood_value")
    np.testing.assert_allclose(value, losses[-1], rtol=1e-5)
    if number > len(sizes):  # whoever compares the last loss would be wrong somewhere
        assert np.any((values[ends] < level) != (losses < level))


@pytest.mark.parametrize(
    "inner", [optax.adam(0.1), optax.lion(0.1)], ids=["adam", "lion"]
)
def test_flood_every_k_gives_moments_the_large_batch_gradient(inner):
    x, y = micro_batches(60, 3)
    optimizer = flood(inner, 1.7, every_k=4)
    state, (params, _, _) = train(optimizer, x, y)
    large = optax.chain(scale_by_flood(1.7), inner)
    rows = x.reshape(15, 4 * ROWS, problems.FEATURES), y.reshape(15, 4 * ROWS)
    large_state, (expected, _, _) = train(large, *rows)
    chex.assert_trees_all_close(
        jax.tree.map(lambda p: p[3::4], params), expected, rtol=1e-4, atol=1e-5
    )
    chex.assert_trees_all_close(
        state.flood_inner_state, large_state[1], rtol=1e-4, atol=1e-5
    )


# ---- skipping and spoiled windows ----


GRADIENTS = np.random.default_rng(7).normal(size=(9, 2)).astype(np.float32)
VALUES = np.float32([1.0, 0.2, 0.4, 0.1, 0.3, 0.2, 0.9, 0.8, 0.4])


def step_through(optimizer, grads=GRADIENTS, values=VALUES):
    params = jnp.zeros_like(grads[0])
    state = optimizer.init(params)
    update, outputs = jax.jit(optimizer.update), []
    for grad, value in zip(grads, values, strict=True):
        updates, state = update(grad, state, params, value=value)
        outputs.append(np.asarray(updates))
    return np.stack(outputs), state


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("where", ["gradient", "value", "both"])
def test_flood_spoiled_window_leaves_the_others_bit_for_bit(where, position, bad):
    optimizer = flood(optax.sgd(1.0), 0.5, every_k=3)
    clean, clean_state = step_through(optimizer)
    grads, values = GRADIENTS.copy(), VALUES.copy()
    if where != "value":
        grads[3 + position, 1] = bad
    if where != "gradient":
        values[3 + position] = bad
    got, state = step_through(optimizer, grads, values)
    others = [0, 1, 2, 3, 4, 6, 7, 8]  # the second window ends at 5
    np.testing.assert_array_equal(got[others], clean[others])
    if where == "value" and np.isfinite(grads).all():
        # NaN floods to NaN, +inf descends, -inf ascends
        mean = GRADIENTS[3:6].mean(0)
        sign = np.nan if np.isnan(bad) else -np.sign(bad)
        np.testing.assert_allclose(got[5], sign * mean, rtol=1e-5)
    else:
        assert not np.isfinite(got[5, 1])
    assert state.flood_state.flood_value == clean_state.flood_state.flood_value
    chex.assert_trees_all_equal(state.flood_window, clean_state.flood_window)


# ---- off is optax.MultiSteps ----


@pytest.mark.parametrize(
    ("inner_name", "jit"),
    [
        pytest.param("momentum", False, id="momentum-op by op"),
        pytest.param("momentum", True, id="momentum-jit"),
        # op by op, AdamW only repeats what momentum shows
        pytest.param("adamw", False, id="adamw-op by op", marks=pytest.mark.slow),
        pytest.param("adamw", True, id="adamw-jit"),
    ],
)
@pytest.mark.parametrize("skip", [None, optax.skip_not_finite], ids=["all", "finite"])
@pytest.mark.parametrize(
    "every_k", [1, 3, lambda window: 1 + window % 3], ids=["1", "3", "schedule"]
)
def test_flood_off_equals_multi_steps(every_k, skip, inner_name, jit):
    inner = {
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adamw": optax.adamw(0.1),
    }[inner_name]
    multi_steps = optax.MultiSteps(inner, every_k, should_skip_update_fn=skip)
    optimizer = flood(inner, -np.inf, every_k=every_k, should_skip_update_fn=skip)
    grads = GRADIENTS.copy()
    if skip:
        grads[4, 0] = np.inf
    params = jnp.array([0.5, -1.5])
    state, reference = optimizer.init(params), multi_steps.init(params)
    update, reference_update = optimizer.update, multi_steps.update
    if jit:
        update, reference_update = jax.jit(update), jax.jit(reference_update)
    # compiled, the two are fused differently, and round so, most where there are roots
    rtol = (1e-6 if inner_name == "momentum" else 1e-5) if jit else 0
    for grad, value in zip(grads, VALUES, strict=True):
        with jax.disable_jit(not jit):
            updates, state = update(grad, state, params, value=value)
            expected, reference = reference_update(grad, reference, params)
        np.testing.assert_allclose(updates, expected, rtol=rtol)
        assert jnp.result_type(updates) == jnp.result_type(expected)
    chex.assert_trees_all_close(
        state.flood_inner_state, reference.inner_opt_state, rtol=rtol
    )
    assert state.flood_state.flood_step == reference.gradient_step
    if every_k != 1 or skip:
        chex.assert_trees_all_equal(
            state.flood_window.flood_grad_mean, reference.acc_grads
        )
        assert state.flood_window.flood_mini_step == reference.mini_step


# ---- cost ----


def test_flood_every_k_runs_the_inner_optimizer_once_per_window():
    calls = []

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    step_through(flood(inner, 0.5, every_k=3))
    jax.effects_barrier()
    assert len(calls) == 3


def first_is_nan(updates, window, params):
    del window, params
    return jnp.isnan(updates[0]), ()


@pytest.mark.parametrize("skip", [None, first_is_nan], ids=["all", "skipped"])
@pytest.mark.parametrize("extra", [{}, {"weight": jnp.float32(2.0), "flush": True}])
def test_flood_every_k_makes_no_second_window(skip, extra):
    """Gradients are added up in the branch that needs them: nowhere else, in place."""
    optimizer = flood(optax.adam(0.1), 0.5, every_k=3, should_skip_update_fn=skip)
    params = jnp.ones(1000)
    state = optimizer.init(params)
    program = jax.make_jaxpr(
        lambda state: optimizer.update(params, state, params, value=1.0, **extra)
    )(state)
    large = [
        equation.primitive.name
        for equation in program.eqns
        if any(out.aval.size == params.size for out in equation.outvars)
    ]
    assert large == ["cond"]


# ---- the traps, pinned to what optax does today: docs/traps.md ----

# Four micro-batches of gradient .475 and mean loss .475, above the level; the last
# loss is below it.
TRAP_VALUES, TRAP_LEVEL = np.float32([1.0, 0.4, 0.3, 0.2]), 0.35
TRAP_GRADIENTS = np.full((4, 1), 0.475, np.float32)
trap_run = functools.partial(step_through, grads=TRAP_GRADIENTS, values=TRAP_VALUES)


def test_flood_every_k_on_the_trap_descends():
    updates, _ = trap_run(flood(optax.sgd(1.0), TRAP_LEVEL, every_k=4))
    np.testing.assert_allclose(updates.ravel(), [0, 0, 0, -0.475], rtol=1e-6)


def test_multi_steps_around_flood_compares_the_last_loss_only():
    chain = optax.chain(scale_by_flood(TRAP_LEVEL), optax.sgd(1.0))
    updates, _ = trap_run(optax.MultiSteps(chain, 4))
    np.testing.assert_allclose(updates.ravel(), [0, 0, 0, +0.475], rtol=1e-6)


def test_multi_steps_behind_flood_floods_each_micro_batch():
    # gradients proportional to the losses, as in facts: (1 + .4 - .3 - .2) / 4 = .225
    multi_steps = optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()
    optimizer = optax.chain(scale_by_flood(TRAP_LEVEL), multi_steps)
    updates, _ = trap_run(optimizer, grads=TRAP_VALUES[:, None])
    np.testing.assert_allclose(updates.ravel(), [0, 0, 0, -0.225], rtol=1e-5)
    ours = flood(optax.sgd(1.0), TRAP_LEVEL, every_k=4)
    updates, _ = trap_run(ours, grads=TRAP_VALUES[:, None])
    np.testing.assert_allclose(updates.ravel(), [0, 0, 0, -0.475], rtol=1e-5)


def test_multi_steps_inside_a_chain_loses_the_value_and_flood_says_so():
    inner = optax.chain(scale_by_flood(TRAP_LEVEL), optax.sgd(1.0))
    multi_steps = optax.MultiSteps(inner, 4).gradient_transformation()
    optimizer = optax.chain(multi_steps, optax.scale(1.0))
    with pytest.raises(ValueError, match="drop extra arguments"):
        trap_run(optimizer)
    with pytest.raises(TypeError, match="MultiSteps, which would flood each"):
        flood(optax.MultiSteps(optax.sgd(1.0), 4), TRAP_LEVEL)


def test_multi_steps_stays_spoiled_after_one_nan():
    grads = GRADIENTS.copy()
    grads[0] = np.nan
    updates, _ = step_through(optax.MultiSteps(optax.sgd(1.0), 3), grads)
    assert np.isnan(updates[[2, 5, 8]]).all()
    updates, _ = step_through(flood(optax.sgd(1.0), -np.inf, every_k=3), grads)
    assert np.isnan(updates[2]).all()
    assert np.isfinite(updates[[5, 8]]).all()


# ---- optax.microbatch: the window inside one step ----

needs_microbatch = pytest.mark.skipif(
    not hasattr(optax, "microbatch"), reason="optax.microbatch came with optax 0.2.7."
)


@needs_microbatch
@pytest.mark.parametrize("level", [0.5, 6.0], ids=["above", "below"])
def test_microbatch_of_the_raw_loss_and_one_flood_equal_the_large_batch(level):
    x, y = micro_batches(8, 8)
    rows = x.reshape(-1, problems.FEATURES), y.ravel()
    ((loss, expected),) = numpy_training(x, y, [8], level)
    assert (loss < level) == (level == 6.0)
    optimizer = optax.chain(scale_by_flood(level), optax.sgd(RATE))
    value_and_grad = optax.microbatch(
        jax.value_and_grad(loss_fn),
        argnums=(1, 2),
        microbatch_size=ROWS,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    params = problems.parameters()
    value, grads = value_and_grad(params, *rows)
    updates, _ = optimizer.update(grads, optimizer.init(params), params, value=value)
    params = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(jax.tree.map(np.float64, params), expected, rtol=1e-5)


@needs_microbatch
def test_microbatch_of_the_flooded_loss_floods_each_micro_batch():
    x, y = micro_batches(8, 8)
    rows = x.reshape(-1, problems.FEATURES), y.ravel()
    params = problems.parameters()
    # microbatch takes every eighth row
    each = [float(loss_fn(params, *(a[i::8] for a in rows))) for i in range(8)]
    level = float(np.median(each))
    value, _ = optax.microbatch(
        jax.value_and_grad(flooded(loss_fn, level)),
        argnums=(1, 2),
        microbatch_size=ROWS,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )(params, *rows)
    bound = np.mean(np.abs(np.array(each) - level) + level)
    np.testing.assert_allclose(value, bound, rtol=1e-5)
    whole = flooded(loss_fn, level)(params, *rows)
    assert value > whole + 0.1  # Jensen: an upper bound, here far from tight


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_weak_parameters_keep_their_dtype_with_64_bit_types(compile_):
    """`jnp.result_type` calls float64 what is a float32 made before the switch."""
    w = {"scalar": jnp.array(0.5), "vector": jnp.array([1.0, -2.0])}
    assert w["scalar"].weak_type
    inner = optax.chain(optax.adam(0.1), average_params())
    optimizer = flood(inner, 0.35, every_k=2)

    def run():
        params, state = w, optimizer.init(w)
        step = compile_(lambda g, s, p: optimizer.update(g, s, p, value=g["scalar"]))
        for _ in range(4):
            grads = jax.tree.map(lambda x: x / 4, params)
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        return updates, averaged(state, params), optax.tree.get(state, "mu")

    expected = run()
    with jax.enable_x64(True):
        found = run()
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    # Adam's 1 - 0.999**2 keeps four digits in float32
    chex.assert_trees_all_close(found, expected, rtol=1e-4)
