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

ROWS, RATE, LEVEL = 4, 0.05, 1.7


# ---- a regression whose micro-batches differ, and its oracle in float64 ----


micro_batches = functools.partial(problems.micro_batches, rows=ROWS, spread=2)


def loss_fn(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def numpy_training(x, y, sizes, level):
    """What each window of so many micro-batches gives, as one large batch."""
    windows = np.split(np.arange(ROWS * sum(sizes)), ROWS * np.cumsum(sizes)[:-1])
    return problems.trained(x, y, windows, rate=RATE, level=level)


@functools.partial(jax.jit, static_argnums=0)
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


SCHEDULES = {
    # every_k; the sizes of its windows
    "1": (1, [1] * 20),
    "2": (2, [2] * 20),
    "3": (3, [3] * 20),
    "7": (7, [7] * 20),
    "growing": (lambda window: 1 + window, [*range(1, 21)]),
    "cycling": (lambda window: jnp.array([2, 1, 4])[window % 3], [2, 1, 4] * 10),
}
OPTIMIZERS = {
    name: flood(optax.sgd(RATE), LEVEL, every_k=every_k)
    for name, (every_k, _) in SCHEDULES.items()
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("every_k", SCHEDULES)
def test_flood_every_k_equals_large_batch_training(every_k, seed):
    sizes = SCHEDULES[every_k][1]
    x, y = micro_batches(sum(sizes), seed)
    expected = numpy_training(x, y, sizes, LEVEL)
    losses = np.array([loss for loss, _ in expected])
    assert np.abs(losses - LEVEL).min() > 1e-4  # no window hangs on rounding
    assert 3 <= np.sum(losses < LEVEL) < len(losses)
    state, (params, updates, values) = jax.device_get(train(OPTIMIZERS[every_k], x, y))
    ends = np.cumsum(sizes) - 1
    for name in params:
        wanted = np.stack([after[name] for _, after in expected])
        np.testing.assert_allclose(params[name][ends], wanted, rtol=2e-5, atol=2e-6)
    between = np.setdiff1d(np.arange(sum(sizes)), ends)
    assert not np.any(updates["w"][between])
    flood_state = state.flood_state
    assert flood_state.flood_step == len(sizes)
    assert flood_state.flood_below == np.sum(losses < LEVEL)
    np.testing.assert_allclose(flood_state.flood_value, losses[-1], rtol=1e-5)
    if every_k != "1":  # whoever compares the last loss would be wrong somewhere
        assert np.any((values[ends] < LEVEL) != (losses < LEVEL))


@pytest.mark.parametrize(
    "inner", [optax.adam(0.1), optax.lion(0.1)], ids=["adam", "lion"]
)
def test_flood_every_k_gives_moments_the_large_batch_gradient(inner):
    x, y = micro_batches(60, 3)
    state, (params, _, _) = train(flood(inner, LEVEL, every_k=4), x, y)
    large = optax.chain(scale_by_flood(LEVEL), inner)
    rows = x.reshape(15, 4 * ROWS, problems.FEATURES), y.reshape(15, 4 * ROWS)
    large_state, (expected, _, _) = train(large, *rows)
    found = jax.tree.map(lambda p: p[3::4], jax.device_get(params))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(
        state.flood_inner_state, large_state[1], rtol=1e-4, atol=1e-5
    )


# ---- skipping and spoiled windows ----


GRADIENTS = np.random.default_rng(7).normal(size=(9, 2)).astype(np.float32)
VALUES = np.float32([1.0, 0.2, 0.4, 0.1, 0.3, 0.2, 0.9, 0.8, 0.4])


@functools.partial(jax.jit, static_argnums=0)
def scanned(optimizer, grads, values):
    def step(state, row):
        grad, value = row
        updates, state = optimizer.update(grad, state, grad, value=value)
        return state, updates

    return jax.lax.scan(step, optimizer.init(grads[0]), (grads, values))


def step_through(optimizer, grads=GRADIENTS, values=VALUES):
    """The updates after each micro-batch, and the last state."""
    state, updates = jax.device_get(scanned(optimizer, grads, values))
    return updates, state


THREE = flood(optax.sgd(1.0), 0.5, every_k=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("where", ["gradient", "value", "both"])
def test_flood_spoiled_window_leaves_the_others_bit_for_bit(where, position, bad):
    clean, clean_state = step_through(THREE)
    grads, values = GRADIENTS.copy(), VALUES.copy()
    if where != "value":
        grads[3 + position, 1] = bad
    if where != "gradient":
        values[3 + position] = bad
    got, state = step_through(THREE, grads, values)
    others = [0, 1, 2, 3, 4, 6, 7, 8]  # the second window ends at 5
    np.testing.assert_array_equal(got[others], clean[others])
    if where == "value":
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
        pytest.param("momentum", False, id="momentum-op by op", marks=pytest.mark.slow),
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
        window = state.flood_window
        chex.assert_trees_all_equal(window.flood_grad_mean, reference.acc_grads)
        assert window.flood_mini_step == reference.mini_step


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
@pytest.mark.parametrize("extra", [{}, {"weight": np.float32(2.0), "flush": True}])
def test_flood_every_k_makes_no_second_window(skip, extra):
    """Gradients are added up in the branch that needs them: nowhere else, in place."""
    optimizer = flood(optax.adam(0.1), 0.5, every_k=3, should_skip_update_fn=skip)
    params = np.ones(1000, np.float32)
    program = jax.make_jaxpr(
        lambda state: optimizer.update(params, state, params, value=1.0, **extra)
    )(jax.eval_shape(optimizer.init, params))
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
CHAIN = optax.chain(scale_by_flood(TRAP_LEVEL), optax.sgd(1.0))
WINDOW = flood(optax.sgd(1.0), TRAP_LEVEL, every_k=4)
FOUR = optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()
TRAPS = {
    # the optimizer, the gradients, and the last update; the others are 0
    "window": (WINDOW, [0.475] * 4, -0.475),
    "MultiSteps around compares the last loss": (
        optax.MultiSteps(CHAIN, 4).gradient_transformation(),
        *([0.475] * 4, +0.475),
    ),
    # gradients proportional to the losses: (1 + .4 - .3 - .2) / 4 = .225
    "MultiSteps behind floods each micro-batch": (
        optax.chain(scale_by_flood(TRAP_LEVEL), FOUR),
        *(TRAP_VALUES, -0.225),
    ),
    "window of gradients like the losses": (WINDOW, TRAP_VALUES, -0.475),
}


@pytest.mark.parametrize("name", TRAPS)
def test_multi_steps_around_and_behind_a_flood_go_wrong(name):
    optimizer, grads, last = TRAPS[name]
    updates, _ = step_through(optimizer, np.float32(grads), TRAP_VALUES)
    np.testing.assert_allclose(updates, [0, 0, 0, last], rtol=1e-5)


def test_multi_steps_stays_spoiled_after_one_nan():
    grads = GRADIENTS.copy()
    grads[0] = np.nan
    three = optax.MultiSteps(optax.sgd(1.0), 3).gradient_transformation()
    updates, _ = step_through(optax.with_extra_args_support(three), grads)
    assert np.isnan(updates[[2, 5, 8]]).all()
    updates, _ = step_through(flood(optax.sgd(1.0), -np.inf, every_k=3), grads)
    assert np.isnan(updates[2]).all()
    assert np.isfinite(updates[[5, 8]]).all()


# ---- optax.microbatch: the window inside one step ----


def microbatch(objective, *arguments):
    """Value and gradient by eight micro-batches: every eighth row, averaged."""
    averaged_over = optax.microbatch(
        jax.value_and_grad(objective),
        argnums=(1, 2),
        microbatch_size=ROWS,
        accumulator=optax.microbatching.AccumulationType.MEAN,
    )
    return jax.jit(averaged_over)(*arguments)


needs_microbatch = pytest.mark.skipif(
    not hasattr(optax, "microbatch"), reason="optax.microbatch came with optax 0.2.7."
)


def large_batch():
    x, y = micro_batches(8, 8)
    return x.reshape(-1, problems.FEATURES), y.ravel()


@needs_microbatch
@pytest.mark.parametrize("level", [0.5, 6.0], ids=["above", "below"])
def test_microbatch_of_the_raw_loss_and_one_flood_equal_the_large_batch(level):
    ((loss, expected),) = numpy_training(*large_batch(), [8], level)
    assert (loss < level) == (level == 6.0)
    optimizer = optax.chain(scale_by_flood(level), optax.sgd(RATE))
    params = problems.parameters()
    value, grads = microbatch(loss_fn, params, *large_batch())
    updates, _ = optimizer.update(grads, optimizer.init(params), params, value=value)
    found = jax.device_get(optax.apply_updates(params, updates))
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@needs_microbatch
def test_microbatch_of_the_flooded_loss_floods_each_micro_batch():
    params, rows = problems.parameters(), large_batch()
    each = np.array([loss_fn(params, *(a[i::8] for a in rows)) for i in range(8)])
    level = float(np.median(each))
    value, _ = microbatch(flooded(loss_fn, level), params, *rows)
    np.testing.assert_allclose(value, np.mean(abs(each - level) + level), rtol=1e-5)
    whole = flooded(loss_fn, level)(params, *rows)
    assert value > whole + 0.1  # Jensen: an upper bound, here far from tight


@pytest.mark.slow
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
