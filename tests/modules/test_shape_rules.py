"""What a shape must be, for shapes of one's own above all."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flood_optax import Shape, flood_loss, flooded, scale_by_flood, shapes
from tests import forms
from tests.marks import slow_but

TAKERS = {
    "flood_loss": lambda shape: flood_loss(0.25, 0.5, shape=shape),
    "flooded": lambda shape: flooded(jnp.sum, 0.5, shape=shape),
    "scale_by_flood": lambda shape: scale_by_flood(0.5, shape=shape),
}
huber = Shape(  # |r| beyond 1, r^2/2 within: no shape of the library
    lambda r: jnp.where(jnp.abs(r) < 1, r * r / 2, jnp.abs(r) - 0.5),
    lambda r: jnp.clip(r, -1, 1),
)
SWAPPED = {
    **{name: Shape(*shape[::-1]) for name, shape in forms.SHAPES.items()},
    "huber": Shape(*huber[::-1]),
    "mixed": Shape(shapes.reflect().value, shapes.pause().multiplier),
    "numbers": Shape(shapes.soft(0.5).value, shapes.soft(0.25).multiplier),
    "sign": Shape(jnp.abs, jnp.ones_like),
    "steep_above": Shape(
        lambda r: jnp.where(r >= 0, 2 * r, -r), shapes.reflect().multiplier
    ),
}
OWN = {
    "huber": huber,
    "reflect": Shape(jnp.abs, lambda r: jnp.where(r >= 0, 1.0, -1.0)),
    # its kink is between the residuals of which a difference is taken
    "kink": Shape(lambda r: jnp.abs(r + 0.8), lambda r: jnp.where(r >= -0.8, 1.0, -1)),
    "scalar": Shape(
        lambda r: jax.lax.cond(r >= 0, lambda: r, lambda: -r),
        lambda r: jax.lax.cond(r >= 0, lambda: 1.0, lambda: -1.0),
    ),
    # jax.grad of it is NaN below
    "root": Shape(
        lambda r: jnp.where(r > 0, r**1.5, 0.0),
        lambda r: 1.5 * jnp.sqrt(jnp.maximum(r, 0)),
    ),
    "small": Shape(lambda r: 1e-5 * jnp.abs(r), lambda r: 1e-5 * jnp.sign(r)),
    "steep": Shape(lambda r: 1e5 * jnp.abs(r), lambda r: 1e5 * jnp.sign(r)),
}


@pytest.mark.parametrize("call", TAKERS)
@pytest.mark.parametrize("case", SWAPPED)
def test_multiplier_that_is_not_the_derivative_is_refused_under_jit_too(case, call):
    message = f"`{call}(shape=...)` must have a multiplier that is the derivative"
    for jitted in (False, True):
        run = lambda: TAKERS[call](SWAPPED[case]) and 0.0
        with pytest.raises(ValueError, match=re.escape(message)):
            jax.jit(run)() if jitted else run()


def grad_below(shape):
    return jax.grad(lambda x: flood_loss(x, 0.5, shape=shape))(jnp.float32(0.25))


@pytest.mark.parametrize("shape", OWN.values(), ids=OWN)
def test_shapes_of_ones_own_are_taken_and_bend_by_their_multiplier(shape):
    wanted = shape.multiplier(jnp.float32(-0.25))
    assert grad_below(shape) == wanted
    assert jax.jit(grad_below, static_argnums=0)(shape) == wanted


@pytest.mark.parametrize("part", ["value", "multiplier"])
def test_python_number_for_an_array_is_refused_with_the_way_out(part):
    parts = {"value": lambda r: r, "multiplier": jnp.ones_like}
    with pytest.raises(
        TypeError, match=r"got 1\.0 for a scalar.*jnp.full_like\(r, c\)"
    ):
        grad_below(Shape(**{**parts, part: lambda r: 1.0}))
    remedied = {**parts, "multiplier": lambda r: jnp.full_like(r, 1.0)}
    assert grad_below(Shape(**remedied)) == 1


def own(scale):
    return Shape(lambda r: scale * jnp.abs(r), lambda r: scale * jnp.sign(r))


def in_shard_map(x):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(grad_of_own, in_specs=P(), out_specs=P())
        return jax.jit(mapped)(x)


def grad_of_own(x):
    return jax.grad(lambda x: flood_loss(x, 0.5, shape=own(jnp.float32(3.0))))(x)


PLACES = {
    "eager": grad_of_own,
    "jit": lambda x: jax.jit(grad_of_own)(x),
    "vmap": lambda x: jax.vmap(grad_of_own)(x[None])[0],
    "shard_map": in_shard_map,
    "traced": lambda x: jax.jit(
        lambda x, s: jax.grad(lambda x: flood_loss(x, 0.5, shape=own(s)))(x)
    )(x, jnp.float32(3.0)),
}
MODES = {
    "plain": contextlib.nullcontext,
    "disable_jit": jax.disable_jit,
    "leaks": jax.checking_leaks,
    "strict": lambda: jax.numpy_dtype_promotion("strict"),
}


@pytest.mark.parametrize("mode", slow_but(["plain"], MODES))
@pytest.mark.parametrize("place", PLACES)
def test_shape_is_checked_wherever_a_form_is_built(place, mode):
    if (place, mode) == ("shard_map", "disable_jit"):
        pytest.skip("shard_map has no eager form of its own")
    with MODES[mode]():
        assert PLACES[place](jnp.float32(0.25)) == -3


def test_shape_is_checked_without_a_transfer():
    loss, level = jnp.float32(0.25), jnp.float32(0.5)
    with jax.transfer_guard("disallow"):
        bent = jax.jit(lambda x, b: flood_loss(x, b, shape=own(3.0)))(loss, level)
    assert bent == 1.25


def test_shape_is_checked_once_however_often_it_is_used():
    calls = []
    shape = Shape(lambda r: calls.append(r) or jnp.abs(r), jnp.sign)
    made = [scale_by_flood(0.5, shape=shape) for _ in range(3)]
    checked = len(calls)
    assert checked <= 2
    state = made[0].init(jnp.ones(2))
    for step in range(1, 4):
        flooded(jnp.sum, 0.5, shape=shape)
        _, state = made[0].update(jnp.ones(2), state, value=jnp.float32(0.3))
        assert len(calls) <= checked + step
    np.testing.assert_array_equal(state.flood_below, 3)
