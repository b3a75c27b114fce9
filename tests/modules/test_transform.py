"""scale_by_flood: state, dtypes, what passes through."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.dtypes import float0

from flood_optax import FloodState, scale_by_flood, shapes
from tests import forms

GRADS = {"w": jnp.array([[1.5, -2.0, 0.25]]), "b": (jnp.array(-3.0),)}


def test_scale_by_flood_counts_and_records():
    transform = scale_by_flood(0.5)
    state = transform.init(GRADS)
    chex.assert_trees_all_equal(state, FloodState(0, 0.0, 0.0, 0))
    for value in (0.7, 0.5, 0.3, jnp.nan, 0.2):
        _, state = transform.update(GRADS, state, value=value)
    chex.assert_trees_all_close(state, FloodState(5, 0.5, 0.2, 2), rtol=1e-7)
    dtypes = [str(field.dtype) for field in state]
    assert dtypes == ["int32", "float32", "float32", "int32"]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("form", ["scale_by_flood", "flood", "flood_every_k"])
def test_leaves_that_are_no_floats_pass_through(form, jit):
    grads = {
        "int": jnp.array([3, -4]),
        "key": jax.random.key(3),
        "masked": optax.MaskedNode(),
        "complex": jnp.array([1.0 + 2.0j]),
        "float": jnp.array(2.0),
    }
    grads |= {} if jit else {"float0": np.zeros(2, float0), "none": None}
    optimizer = forms.OPTAX[form](optax.identity(), 0.5)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(grads)
    for _ in range(2):
        updates, state = update(grads, state, grads, value=0.25)
    assert updates.keys() == grads.keys()
    assert isinstance(updates["masked"], optax.MaskedNode)
    if not jit:
        assert updates["none"] is None
        assert (updates["float0"].dtype, updates["float0"].shape) == (float0, (2,))
        if form != "flood_every_k":  # which hands on an equal array
            assert updates["float0"] is grads["float0"]
            assert updates["key"] is grads["key"]
    assert updates["key"] == grads["key"]
    if form != "flood_every_k":  # which would add up integers
        np.testing.assert_array_equal(updates["int"], [3, -4])
    np.testing.assert_array_equal(updates["complex"], [-1.0 - 2.0j])
    assert updates["float"] == -2.0
    assert updates["complex"].dtype == jnp.complex64


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [(shapes.pause(), [0.0, 0.0, 0.0]), (shapes.reflect(), [-np.inf, np.inf, -2.0])],
    ids=["pause", "reflect"],
)
def test_infinite_gradients_flip_and_zero_times_infinity_is_zero(shape, wanted):
    transform = scale_by_flood(0.5, shape=shape)
    grads = jnp.array([jnp.inf, -jnp.inf, 2.0])
    updates, _ = transform.update(grads, transform.init(grads), value=0.25)
    np.testing.assert_array_equal(updates, wanted)


def test_scale_by_flood_counters_stay_at_the_largest_int():
    """A run of 2^31 steps must not go on at negative ones, as a schedule would see."""
    largest = jnp.int32(2**31 - 1)
    transform = scale_by_flood(0.5)
    state = FloodState(largest, jnp.float32(0.5), jnp.float32(0.3), largest)
    for update in (transform.update, jax.jit(transform.update)):
        _, after = update(GRADS, state, value=jnp.float32(0.25))
        assert after.flood_step == largest
        assert after.flood_below == largest
        _, after = update(GRADS, state._replace(flood_step=3), value=jnp.float32(0.75))
        assert after.flood_step == 4
        assert after.flood_below == largest


@pytest.mark.parametrize("kind", ["array", "schedule", "band"])
def test_scale_by_flood_state_shares_no_array_with_its_caller(kind):
    """A state that is donated must not take the level or the loss with it."""
    level, value = jnp.float32(0.5), jnp.float32(0.7)
    transform = {
        "array": lambda: scale_by_flood(level),
        "schedule": lambda: scale_by_flood(lambda step: level),
        "band": lambda: scale_by_flood(level, band=jnp.float32(0.1)),
    }[kind]()
    _, state = transform.update(GRADS, transform.init(GRADS), value=value)
    consume = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    jax.block_until_ready(consume(state))
    assert all(x.is_deleted() for x in state)
    assert not level.is_deleted()
    assert not value.is_deleted()


def test_scale_by_flood_of_weight_zero_leaves_adam_behind_it_its_momentum():
    """The chain cannot keep the others from a step; `flood` around them does."""
    params, grads = jnp.array(1.0), jnp.array(1.0)
    chain = optax.chain(scale_by_flood(0.5), optax.adam(0.1))
    _, state = chain.update(grads, chain.init(params), params, value=0.7)
    bad = {"value": jnp.nan, "weight": 0.0}
    update, _ = chain.update(jnp.nan * grads, state, params, **bad)
    m, v = 0.9 * 0.1 / (1 - 0.9**2), 0.999 * 0.001 / (1 - 0.999**2)
    np.testing.assert_allclose(update, -0.1 * m / v**0.5, rtol=1e-4)
