"""scale_by_flood: state, dtypes, schedules, what passes through."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import FloodState, flood, scale_by_flood, shapes

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


def test_scale_by_flood_state_is_found_by_name_in_a_chain():
    optimizer = optax.chain(scale_by_flood(0.5), optax.adam(0.1))
    state = optimizer.init(GRADS)
    _, state = optimizer.update(GRADS, state, GRADS, value=0.25)
    assert optax.tree.get(state, "flood_value") == 0.25
    assert optax.tree.get(state, "flood_below") == 1


def test_scale_by_flood_schedule_sees_the_step():
    transform = scale_by_flood(lambda step: 0.1 * step)
    state = transform.init(GRADS)
    signs = []
    for _ in range(5):
        updates, state = transform.update(GRADS, state, value=0.25)
        signs.append(float(updates["b"][0] / -3.0))
    assert signs == [1, 1, 1, -1, -1]  # levels 0, .1, .2, .3, .4
    assert state.flood_level == np.float32(0.4)


def test_scale_by_flood_other_leaves_pass_through():
    float0 = np.zeros((2,), jax.dtypes.float0)
    grads = {
        "none": None,
        "int": jnp.array([3, -4]),
        "float0": float0,
        "masked": optax.MaskedNode(),
        "complex": jnp.array([1.0 + 2.0j]),
        "float": jnp.array(2.0),
    }
    transform = scale_by_flood(0.5)
    updates, _ = transform.update(grads, transform.init(grads), value=0.25)
    assert updates["none"] is None
    assert isinstance(updates["masked"], optax.MaskedNode)
    assert updates["float0"] is float0
    np.testing.assert_array_equal(updates["int"], [3, -4])
    np.testing.assert_array_equal(updates["complex"], [-1.0 - 2.0j])
    assert updates["float"] == -2.0
    assert updates["complex"].dtype == jnp.complex64


def test_scale_by_flood_zero_times_infinity_is_zero():
    transform = scale_by_flood(0.5, shape=shapes.pause())
    grads = jnp.array([jnp.inf, -jnp.inf, 2.0])
    updates, _ = transform.update(grads, transform.init(grads), value=0.25)
    np.testing.assert_array_equal(updates, [0.0, 0.0, 0.0])


def test_scale_by_flood_infinite_gradients_flip_and_stay_infinite():
    transform = scale_by_flood(0.5)
    grads = jnp.array([jnp.inf, -jnp.inf])
    updates, _ = transform.update(grads, transform.init(grads), value=0.25)
    np.testing.assert_array_equal(updates, [-jnp.inf, jnp.inf])


def test_scale_by_flood_comes_first_in_the_chain():
    # decay, clipping and moments must act on the flooded gradient
    decay = optax.add_decayed_weights(0.1)
    params, grads = jnp.array(2.0), jnp.array(0.0)
    first = optax.chain(scale_by_flood(0.5), decay, optax.sgd(1.0))
    last = optax.chain(decay, scale_by_flood(0.5), optax.sgd(1.0))
    right, _ = first.update(grads, first.init(params), params, value=0.25)
    wrong, _ = last.update(grads, last.init(params), params, value=0.25)
    assert right == np.float32(-0.2)  # decays
    assert wrong == np.float32(0.2)  # grows


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


def test_scale_by_flood_key_leaves_pass_through():
    grads = {"key": jax.random.key(3), "w": jnp.array(2.0)}
    transform = scale_by_flood(0.5)
    for update in (transform.update, jax.jit(transform.update)):
        updates, _ = update(grads, transform.init(grads), value=0.25)
        assert updates["key"] == grads["key"]
        assert updates["w"] == -2


def test_scale_by_flood_of_weight_zero_leaves_adam_behind_it_its_momentum():
    """The chain cannot keep the others from a step; `flood` around them does."""
    params, grads = jnp.array(1.0), jnp.array(1.0)
    chain = optax.chain(scale_by_flood(0.5), optax.adam(0.1))
    wrapper = flood(optax.adam(0.1), 0.5)
    updates = []
    for optimizer in (chain, wrapper):
        _, state = optimizer.update(grads, optimizer.init(params), params, value=0.7)
        update, after = optimizer.update(
            jnp.nan * grads, state, params, value=jnp.nan, weight=0.0
        )
        updates.append(update)
        if optimizer is wrapper:
            chex.assert_trees_all_equal(after, state)
    m, v = 0.9 * 0.1 / (1 - 0.9**2), 0.999 * 0.001 / (1 - 0.999**2)
    np.testing.assert_allclose(updates, [-0.1 * m / v**0.5, 0], rtol=1e-4)
