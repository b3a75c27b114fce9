"""Line searches around whose objective a flood lies, in the idioms of optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import flood, shapes

START = jnp.array([1.9, -0.1])
STEPS = 30


def objective(w):
    return jnp.sum((w - 1) ** 2 * jnp.array([1.0, 9.0])) + jnp.cosh(w[0] - w[1]) - 1


def backtracking():
    search = optax.scale_by_backtracking_linesearch(20, store_grad=True)
    return optax.chain(optax.sgd(1.0), search)


SEARCHES = {
    "lbfgs": optax.lbfgs,
    "zoom": lambda: optax.chain(optax.sgd(0.5), optax.scale_by_zoom_linesearch(15)),
    "backtracking": backtracking,
}
SHAPES = {
    "reflect": shapes.reflect(),
    "soft": shapes.soft(),
    "soft_narrow": shapes.soft(0.3),
    "pause": shapes.pause(),
    "asymmetric": shapes.asymmetric(0.5, 0.1),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def searched(optimizer, from_state):
    """Params and state after each step, and the value that each step began with."""
    value_and_grad = jax.value_and_grad(objective)
    if from_state:
        value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry, _):
        params, state = carry
        kept = {"state": state} if from_state else {}
        value, grad = value_and_grad(params, **kept)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        params = optax.apply_updates(params, updates)
        return (params, state), (value, params)

    carry = START, optimizer.init(START)
    (params, state), (values, path) = jax.lax.scan(step, carry, length=STEPS)
    return params, state.flood_state, values, path


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    # L-BFGS compiles for four seconds a shape; below it runs every time
    "search",
    [pytest.param("lbfgs", marks=pytest.mark.slow), "backtracking"],
)
def test_value_and_grad_from_state_is_the_raw_one_for_every_shape(search, shape):
    optimizer = flood(SEARCHES[search](), 2.0, shape=SHAPES[shape])
    got, wanted = (searched(optimizer, from_state) for from_state in (True, False))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)
    _, state, values, path = got
    raw = np.array([objective(w) for w in (START, *path[:-1])])
    np.testing.assert_allclose(values, raw, rtol=1e-5)
    below = np.sum(np.float64(values) < 2.0)
    assert state.flood_below == below
    assert state.flood_value == values[-1]
    # whoever takes the flooded value for the raw one counts no loss below the level
    assert 0 < below < STEPS


@pytest.mark.parametrize("search", SEARCHES)
def test_value_and_grad_from_state_in_a_while_loop(search):
    optimizer = flood(SEARCHES[search](), 2.0)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(params, updates), state

    def goes_on(carry):
        return optax.tree.get(carry[1], "flood_step") < STEPS

    carry = START, optimizer.init(START)
    params, state = jax.jit(lambda c: jax.lax.while_loop(goes_on, step, c))(carry)
    wanted, flood_state, *_ = searched(optimizer, False)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5)
    chex.assert_trees_all_close(state.flood_state, flood_state, rtol=1e-5)
    assert state.flood_state.flood_below > 0
    assert objective(params) == pytest.approx(2.0, abs=0.05)


def test_flood_that_is_off_keeps_the_value_and_gradient_of_the_search():
    """So that it costs no evaluation: as if there was no flood."""
    states = []
    for optimizer in (optax.lbfgs(), flood(optax.lbfgs(), -np.inf)):
        state = optimizer.init(START)
        value, grad = jax.value_and_grad(objective)(START)
        _, state = optimizer.update(
            grad, state, START, value=value, grad=grad, value_fn=objective
        )
        states.append(state)
    plain, off = states
    chex.assert_trees_all_equal(off.flood_inner_state, plain)
    assert np.isfinite(optax.tree.get(off, "value"))


def test_flooded_search_leaves_leaves_of_the_same_names_alone():
    """Only where both stand in one named tuple are they the record of a search."""
    params = {"value": jnp.array([0.5]), "grad": jnp.array([1.5])}

    def loss_fn(p):
        return jnp.sum((p["value"] - 1) ** 2 + 2 * (p["grad"] - 1) ** 2)

    optimizer = flood(optax.chain(optax.trace(0.9), backtracking()), 0.2)
    state = optimizer.init(params)
    value, grad = jax.value_and_grad(loss_fn)(params)
    _, state = optimizer.update(
        grad, state, params, value=value, grad=grad, value_fn=loss_fn
    )
    chex.assert_trees_all_equal(state.flood_inner_state[0].trace, grad)
