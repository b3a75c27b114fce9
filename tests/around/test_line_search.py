"""Line searches around whose objective a flood lies, in the idioms of optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import flood, flooded, shapes
from tests.marks import slow_but

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
# L-BFGS compiles for four seconds a program; in the while loop it runs every time
some_searches = pytest.mark.parametrize("search", slow_but(["backtracking"], SEARCHES))


def step_of(optimizer, params, state, value_and_grad=None, objective=objective):
    """One step of a search: parameters, state, and the value that it began with."""
    value_and_grad = value_and_grad or jax.value_and_grad(objective)
    value, grad = value_and_grad(params)
    given = {"value": value, "grad": grad, "value_fn": objective}
    updates, state = optimizer.update(grad, state, params, **given)
    return optax.apply_updates(params, updates), state, value


from_state = optax.value_and_grad_from_state(objective)


@functools.partial(jax.jit, static_argnums=(0, 1))
def searched(optimizer, kept):
    """Params and state after each step, and the value that each step began with."""

    def step(carry, _):
        state = carry[1]
        read = functools.partial(from_state, state=state) if kept else None
        *carry, value = step_of(optimizer, *carry, read)
        return tuple(carry), (value, carry[0])

    carry = START, optimizer.init(START)
    (params, state), (values, path) = jax.lax.scan(step, carry, length=STEPS)
    return params, state.flood_state, values, path


@pytest.mark.parametrize("shape", SHAPES)
@some_searches
def test_value_and_grad_from_state_is_the_raw_one_for_every_shape(search, shape):
    optimizer = flood(SEARCHES[search](), 2.0, shape=SHAPES[shape])
    got, wanted = (searched(optimizer, kept) for kept in (True, False))
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

    def step(carry):
        read = functools.partial(from_state, state=carry[1])
        return step_of(optimizer, *carry, read)[:2]

    def goes_on(carry):
        return optax.tree.get(carry[1], "flood_step") < STEPS

    carry = START, optimizer.init(START)
    params, state = jax.jit(lambda c: jax.lax.while_loop(goes_on, step, c))(carry)
    wanted, flood_state, *_ = searched(optimizer, False)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5)
    chex.assert_trees_all_close(state.flood_state, flood_state, rtol=1e-5)
    assert state.flood_state.flood_below > 0
    assert objective(params) == pytest.approx(2.0, abs=0.05)


@some_searches
def test_line_search_sees_value_gradient_and_function_at_one_end_of_a_band(search):
    level, band = 2.0, 0.5
    banded, bare = flood(SEARCHES[search](), level, band=band), SEARCHES[search]()

    step = jax.jit(functools.partial(step_of, banded))

    @jax.jit
    def bare_step(w, state, end):
        bent = flooded(objective, end)
        return *step_of(bare, w, state, objective=bent)[:2], objective(w)

    w, state, other, other_state = START, banded.init(START), START, bare.init(START)
    rises, ends = False, []
    for _ in range(STEPS):
        ends.append(level + band if rises else level - band)
        other, other_state, loss = bare_step(other, other_state, ends[-1])
        rises = loss < ends[-1]
        w, state, value = step(w, state)
        np.testing.assert_allclose(value, loss, rtol=1e-5)
        assert optax.tree.get(state, "flood_level") == ends[-1]
        np.testing.assert_allclose(w, other, rtol=1e-5)
    assert len(set(ends)) == 2


@functools.partial(jax.jit, static_argnums=(0, 2))
def stepped(optimizer, params, loss_fn):
    """The state after one step."""
    return step_of(optimizer, params, optimizer.init(params), objective=loss_fn)[1]


def test_flood_that_is_off_keeps_the_value_and_gradient_of_the_search():
    """So that it costs no evaluation: as if there was no flood."""
    plain, off = (
        stepped(made, START, objective)
        for made in (optax.lbfgs(), flood(optax.lbfgs(), -np.inf))
    )
    chex.assert_trees_all_equal(off.flood_inner_state, plain)
    assert np.isfinite(optax.tree.get(off, "value"))


def test_flooded_search_leaves_leaves_of_the_same_names_alone():
    """Only where both stand in one named tuple are they the record of a search."""
    params = {"value": jnp.array([0.5]), "grad": jnp.array([1.5])}

    def loss_fn(p):
        return jnp.sum((p["value"] - 1) ** 2 + 2 * (p["grad"] - 1) ** 2)

    optimizer = flood(optax.chain(optax.trace(0.9), backtracking()), 0.2)
    state = stepped(optimizer, params, loss_fn)
    grad = {"value": np.float32([-1.0]), "grad": np.float32([2.0])}
    chex.assert_trees_all_equal(state.flood_inner_state[0].trace, grad)
