"""One loss meets its level: where every form of flooding comes together."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from flood_optax.shapes import Shape

AxisName = str | tuple[str, ...]


class Bent(NamedTuple):
    """A loss beside its level, and what the shape made of it, float32 at least."""

    loss: jax.Array
    level: jax.Array
    value: jax.Array
    multiplier: jax.Array


def bend(loss: jax.Array, level: jax.Array, shape: Shape) -> Bent:
    """Bends a real loss at the level, into which no gradient flows."""
    dtype = compare_dtype(loss.dtype)
    loss = _rounded(loss).astype(dtype)
    level = lax.stop_gradient(level).astype(dtype)
    off = level == -jnp.inf
    bound = jnp.where(off, jnp.zeros_like(level), level)  # -inf would make a NaN below
    residual = loss - bound
    # XLA may fuse a mean's product into this subtraction, unrounded, so that a tie is
    # none; the compare sees the rounded loss.
    residual -= lax.stop_gradient(jnp.where(loss == bound, residual, 0))
    phi = shape.value(residual)
    multiplier = shape.multiplier(residual).astype(dtype)
    # Above the level (loss - level) + level would round: take the loss as it is. But
    # not where phi only crosses r, as at a tie of `soft`: where custom rules do not
    # count, as in `jax.experimental.jet`, this value is differentiated.
    same = (phi == residual) & (multiplier == 1)
    value = jnp.where(off | same, loss, phi + bound)
    multiplier = jnp.where(off, jnp.ones_like(multiplier), multiplier)
    return Bent(loss, level, value, multiplier)


def flood_share(
    share: jax.Array, level: jax.Array, shape: Shape, axis_name: AxisName | None = None
) -> tuple[jax.Array, Bent]:
    """Floods the mean of all shares; its gradient is that of this device's share."""
    whole = global_mean(share, axis_name)
    bent = bend(whole, level, shape)
    value, slope = bent.value.astype(share.dtype), bent.multiplier.astype(share.dtype)
    if axis_name is not None:
        value, slope = like(value, share), like(slope, share)
    return with_slope(share, value, slope), bent


@jax.custom_jvp
def with_slope(loss: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """`value`, whose derivative with respect to `loss` is `slope`."""
    # The rule of `value` is None, which stops its gradient; stopped by `stop_gradient`
    # it would be a constant to `jax.experimental.jet`. Stopping the slope would take
    # away the second derivative of `soft`.
    del loss, slope
    return value


def _slope_times(tangent: jax.Array, out: jax.Array, *primals: jax.Array) -> jax.Array:
    del out
    return primals[2] * tangent


with_slope.defjvps(_slope_times, None, None)


def like(x: jax.Array, share: jax.Array) -> jax.Array:
    """Returns x, typed as varying over the mapped axes over which `share` varies."""
    # A select, since jax names the varying axes of a type otherwise in each version.
    return jnp.where(lax.stop_gradient(share) > 0, x, x)


def global_mean(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The mean over the mapped axes, float32 at least inside; x itself without axes."""
    return x if axis_name is None else lax.pmean(wide(x), axis_name).astype(x.dtype)


def wide(x: ArrayLike) -> jax.Array:
    """Real floats in float32 at least."""
    array = jnp.asarray(x)
    return array.astype(compare_dtype(array.dtype))


def compare_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype in which a loss is compared with its level: float32 at least."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _rounded(loss: jax.Array) -> jax.Array:
    """Rounds a 16-bit loss to its dtype, which XLA may otherwise skip."""
    if loss.dtype.itemsize > 2:
        return loss
    info = cast(Callable[[Any], Any], jnp.finfo)(loss.dtype)
    return lax.reduce_precision(loss, info.nexp, info.nmant)
