"""One loss meets its level: where every form of flooding comes together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flood_optax.devices import AxisName, global_mean, split_like, varying_like
from flood_optax.precision import rounded, wide
from flood_optax.shapes import Shape


class Bent(NamedTuple):
    """A loss beside its level, and what the shape made of it, float32 at least."""

    loss: jax.Array
    level: jax.Array
    value: jax.Array
    multiplier: jax.Array


def bend(loss: jax.Array, level: jax.Array, shape: Shape) -> Bent:
    """Bends a real loss at the level, into which no gradient flows."""
    loss = wide(rounded(loss))
    level = split_like(lax.stop_gradient(level).astype(loss.dtype), loss)
    off = level == -jnp.inf
    bound = jnp.where(off, jnp.zeros_like(level), level)  # -inf would make a NaN below
    residual = loss - bound
    # XLA may fuse a mean's product into this subtraction, unrounded, so that a tie is
    # none; the compare sees the rounded loss.
    residual -= lax.stop_gradient(
        jnp.where(loss == bound, residual, jnp.zeros_like(residual))
    )
    phi = shape.value(residual)
    multiplier = shape.multiplier(residual).astype(loss.dtype)
    # Above the level (loss - level) + level would round: take the loss as it is. But
    # not where phi only crosses r, as at a tie of `soft`: where custom rules do not
    # count, as in `jax.experimental.jet`, this value is differentiated.
    same = (phi == residual) & (multiplier == 1)
    value = jnp.where(off | same, loss, phi + bound)
    multiplier = jnp.where(off, jnp.ones_like(multiplier), multiplier)
    return Bent(loss, level, value, multiplier)


def flood_value(
    loss: jax.Array, level: jax.Array, shape: Shape, axis_name: AxisName | None = None
) -> tuple[jax.Array, Bent]:
    """Floods the mean over the devices; the gradient is that of this device's loss."""
    bent = bend(global_mean(loss, axis_name), level, shape)
    value, slope = bent.value.astype(loss.dtype), bent.multiplier.astype(loss.dtype)
    if axis_name:
        value, slope = varying_like(value, loss), varying_like(slope, loss)
    return with_slope(loss, value, slope), bent


def shared_mean(share: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The mean over the devices; its gradient is that of this device's share."""
    if not axis_name:
        return share
    whole = varying_like(global_mean(share, axis_name), share)
    return with_slope(share, whole, jnp.ones_like(share))


@jax.custom_jvp
def with_slope(loss: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """`value`, whose derivative with respect to `loss` is `slope`."""
    # The rule of `value` is None, which stops its gradient; stopped by `stop_gradient`
    # it would be a constant to `jax.experimental.jet`. Stopping the slope would take
    # away the second derivative of `soft`.
    del loss, slope
    return value


with_slope.defjvps(lambda tangent, out, loss, value, slope: slope * tangent, None, None)


def nan_where(bad: jax.Array, value: jax.Array) -> jax.Array:
    """The value, and NaN where it is bad."""
    # 0 / 0, and no select: `jax_debug_nans` sees a NaN in a branch not taken.
    good = jnp.where(bad, jnp.zeros_like(value), jnp.ones_like(value))
    return value * (good / good)
