"""flood(inner): what the inner optimizer sees, windows, line searches."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flood_optax
from flood_optax import FloodState, flood, scale_by_flood, shapes

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
GRADS = {"w": jnp.array([0.5, 3.0]), "b": jnp.array(-1.0)}


def spy(seen):
    """An optimizer that keeps what it is handed."""

    def update(updates, state, params=None, **extra_args):
        seen.append({"updates": updates, "params": params, **extra_args})
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@pytest.mark.parametrize(("value", "sign"), [(0.3, -1), (0.5, 1), (0.9, 1)])
def test_flood_inner_sees_the_flooded_objective_whole(value, sign):
    seen = []
    optimizer = flood(spy(seen), 0.5)

    def value_fn(params):
        return jnp.sum(params["w"] ** 2) * 0.1

    optimizer.update(
        GRADS,
        optimizer.init(PARAMS),
        PARAMS,
        value=value,
        grad=GRADS,
        value_fn=value_fn,
        other="kept",
    )
    flooded_grads = jax.tree.map(lambda g: sign * g, GRADS)
    (call,) = seen
    chex.assert_trees_all_equal(call["updates"], flooded_grads)
    chex.assert_trees_all_equal(call["grad"], flooded_grads)
    assert call["value"] == pytest.approx(value if sign > 0 else 1.0 - value)
    # value_fn is 0.5 here: flooded at 0.5 it is a tie
    assert call["value_fn"](PARAMS) == pytest.approx(0.5)
    assert call["value_fn"]({"w": PARAMS["w"] * 0.5}) == pytest.approx(1 - 0.125)
    assert call["other"] == "kept"


def test_flood_invents_no_argument():
    seen = []
    optimizer = flood(spy(seen), 0.5)
    optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, value=0.3)
    assert set(seen[0]) == {"updates", "params", "value"}


def test_flood_equals_scale_by_flood_in_a_chain():
    one = flood(optax.adam(0.1), 0.5, shape=shapes.asymmetric(0.3))
    other = optax.chain(
        scale_by_flood(0.5, shape=shapes.asymmetric(0.3)), optax.adam(0.1)
    )
    states = [one.init(PARAMS), other.init(PARAMS)]
    for value in (0.7, 0.3, 0.5, 0.1):
        u, states[0] = one.update(GRADS, states[0], PARAMS, value=value)
        v, states[1] = other.update(GRADS, states[1], PARAMS, value=value)
        chex.assert_trees_all_equal(u, v)
    flood_state = FloodState(
        *(optax.tree.get(states[0], field) for field in FloodState._fields)
    )
    chex.assert_trees_all_equal(flood_state, states[1][0])


# Four micro-batches of gradient 0.475 each; the mean loss, .475, is above the level
# and the last is not: whoever compares the last steps uphill.
VALUES, LEVEL = (1.0, 0.4, 0.3, 0.2), 0.35


def windows(optimizer, values=VALUES, grads=(0.475,) * 4):
    params = jnp.array(0.0)
    state = optimizer.init(params)
    updates = []
    for value, grad in zip(values, grads, strict=True):
        update, state = optimizer.update(
            jnp.float32(grad), state, params, value=jnp.float32(value)
        )
        updates.append(float(update))
    return updates, state


def test_flood_every_k_floods_the_window_once():
    updates, state = windows(flood(optax.sgd(1.0), LEVEL, every_k=4))
    assert updates[:3] == [0.0, 0.0, 0.0]
    assert updates[3] == pytest.approx(-0.475)
    assert optax.tree.get(state, "flood_step") == 1
    assert optax.tree.get(state, "flood_below") == 0
    assert optax.tree.get(state, "flood_value") == pytest.approx(0.475)


def test_flood_inside_multi_steps_goes_uphill_which_is_the_trap():
    trap = optax.MultiSteps(optax.chain(scale_by_flood(LEVEL), optax.sgd(1.0)), 4)
    updates, _ = windows(trap)
    assert updates[3] == pytest.approx(+0.475)


def test_flood_every_k_level_schedule_counts_windows():
    levels = jnp.array([-jnp.inf, 9.0])
    optimizer = flood(optax.sgd(1.0), lambda step: levels[step], every_k=2)
    updates, state = windows(optimizer)
    np.testing.assert_allclose(updates, [0, -0.475, 0, 0.475])
    assert optax.tree.get(state, "flood_step") == 2


def test_flood_every_k_schedule_grows_the_window():
    optimizer = flood(optax.sgd(1.0), LEVEL, every_k=lambda window: window + 1)
    updates, _ = windows(optimizer, (1.0, 0.1, 0.5, 1.0), (1.0, 2.0, 4.0, 8.0))
    # windows {1}, {2, 3} with mean loss .3 below the level, {4, ...} open
    np.testing.assert_allclose(updates, [-1.0, 0.0, +3.0, 0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_flood_spoiled_micro_batch_spoils_its_own_window_only(bad):
    optimizer = flood(optax.apply_if_finite(optax.sgd(1.0), 9), LEVEL, every_k=2)
    updates, state = windows(optimizer, (0.5, 0.5, 0.5, 0.5), (bad, 1.0, 2.0, 4.0))
    assert updates[3] == -3.0
    assert np.isfinite(updates).all()
    updates, state = windows(optimizer, (np.nan, 0.5, 0.5, 0.5), (1.0, 1.0, 2.0, 4.0))
    assert updates[3] == -3.0
    assert optax.tree.get(state, "flood_value") == 0.5


def test_flood_skip_not_finite_leaves_no_trace():
    optimizer = flood(
        optax.sgd(1.0), LEVEL, every_k=2, should_skip_update_fn=optax.skip_not_finite
    )
    updates, state = windows(
        optimizer, (0.5, np.nan, 0.5, 0.1), (1.0, 9.0, np.inf, 3.0)
    )
    # the second has a bad loss, the third a bad gradient: the window is {1, 4}
    np.testing.assert_allclose(updates, [0.0, 0.0, 0.0, +2.0])
    assert optax.tree.get(state, "flood_value") == pytest.approx(0.3)


def test_flood_skip_function_sees_the_gradients_only():
    # the loss, 5, must not enter the norm: 0.1^2 is below the limit
    def skip(updates, step, params):
        return optax.skip_large_updates(updates, step, params, max_squared_norm=2.0)

    optimizer = flood(optax.sgd(1.0), LEVEL, should_skip_update_fn=skip)
    updates, _ = windows(optimizer, (5.0, 5.0), (0.1, 2.0))
    np.testing.assert_allclose(updates, [-0.1, 0.0], rtol=1e-6)


def test_flood_state_keeps_structure_and_dtypes_in_bf16():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS)
    optimizer = flood(optax.adam(0.1), 0.5, every_k=2)
    state = optimizer.init(params)
    for value in (0.75, 0.0):
        updates, new = optimizer.update(
            grads, state, params, value=jnp.asarray(value, jnp.bfloat16)
        )
        assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        state = new


# ---- optimizers that read the loss ----


def rosenbrock(p):
    return (1 - p[0]) ** 2 + 5 * (p[1] - p[0] ** 2) ** 2


def minimise(optimizer, start, steps, **first):
    """Runs with everything an optimizer may ask for, raw."""

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(rosenbrock)(params)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=rosenbrock, **first
        )
        params = optax.apply_updates(params, updates)
        return (params, state), rosenbrock(params)

    start = jnp.asarray(start)
    return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)[1]


def test_flood_lbfgs_settles_at_the_level():
    # from 1.94, below twice the level: a Newton step may land on the bare minimum
    losses = minimise(flood(optax.lbfgs(), 1.0), [0.3, -0.4], 60)
    np.testing.assert_allclose(losses[-20:], 1.0, atol=0.02)


def test_flood_backtracking_line_search_settles_at_the_level():
    inner = optax.chain(
        optax.sgd(1.0),
        optax.scale_by_backtracking_linesearch(max_backtracking_steps=30),
    )
    losses = minimise(flood(inner, 1.0), [0.3, -0.4], 80)
    np.testing.assert_allclose(losses[-20:], 1.0, atol=0.02)


def test_flood_polyak_sgd_with_the_level_as_its_minimum_settles_there():
    def train(optimizer):
        def step(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(rosenbrock)(params)
            updates, state = optimizer.update(grad, state, params, value=value)
            params = optax.apply_updates(params, updates)
            return (params, state), rosenbrock(params)

        start = jnp.array([0.3, -0.4])
        return jax.lax.scan(step, (start, optimizer.init(start)), length=60)[1]

    losses = train(flood(optax.polyak_sgd(f_min=1.0), 1.0))
    np.testing.assert_allclose(losses[-10:], 1.0, atol=1e-3)


def test_flood_is_exported_and_nests_in_a_chain():
    optimizer = optax.chain(optax.clip(1.0), flood_optax.flood(optax.sgd(1.0), 0.5))
    updates, _ = optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, value=0.3)
    expected = {"w": jnp.array([0.5, 1.0]), "b": jnp.array(-1.0)}
    chex.assert_trees_all_equal(updates, expected)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_flood_inner_state_that_comes_back_wider_keeps_its_dtype(jit):
    """No branch of a cond, and no loop around the update, takes another dtype."""

    def update(updates, state, params=None):
        del params
        moment = 0.5 * state.astype(jnp.float32) + updates
        return moment, moment  # kept in float32, where it began in bfloat16

    inner = optax.GradientTransformation(
        lambda params: jnp.zeros_like(params, jnp.bfloat16), update
    )
    optimizer = flood(inner, 0.5, every_k=2)
    grads = jnp.array([1.0, -2.0])
    step = jax.jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(grads)
    kinds = jax.tree.map(jax.typeof, state)
    for expected in (0.0, 1.0, 0.0, 1.5):
        updates, state = step(grads, state, value=0.75)
        np.testing.assert_array_equal(updates, expected * np.array([1.0, -2.0]))
        assert jax.tree.map(jax.typeof, state) == kinds
