"""The loss form: flooding as a change of the objective, before `jax.grad`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flood_optax.bend import flood_value, with_slope
from flood_optax.checks import (
    FLOODED,
    as_loss_and_aux,
    as_real_array,
    as_scalar_loss,
    broadcast_level,
    check_level,
    check_raw,
    check_scalar_level,
)
from flood_optax.devices import AxisName, check_axes, varying_like
from flood_optax.mean import flood_mean
from flood_optax.relax import relax_loss
from flood_optax.shape_rules import check_shape
from flood_optax.shapes import Shape, reflect

__all__ = ["FloodInfo", "flood_loss", "flood_mean", "flooded", "relax_loss"]


P = ParamSpec("P")
Aux = TypeVar("Aux")


class FloodInfo(NamedTuple, Generic[Aux]):
    """What happened at the level: what to log beside the flooded loss.

    Attributes:
      loss: the raw loss, a scalar of the loss's dtype; with axis_name the global mean.
      level: the level it was compared with, a scalar, float32 at least.
      multiplier: the factor on the gradient: for `reflect` 1 at or above the level, -1
        below it, NaN for a NaN loss; a scalar, float32 at least.
      aux: what loss_fn returned beside the loss, None without has_aux.
    """

    loss: jax.Array
    level: jax.Array
    multiplier: jax.Array
    aux: Aux


def flood_loss(
    loss: ArrayLike, level: ArrayLike, *, shape: Shape = reflect()
) -> jax.Array:
    r"""Floods each entry of an array of losses.

    :math:`\tilde\ell = \phi(\ell - b) + b` with :math:`\ell` = ``loss``, b = ``level``
    and :math:`\phi` = ``shape``; for the default, :math:`|\ell - b| + b`. Above the
    level the result is the loss, bit for bit. At a tie the gradient descends. A NaN
    loss gives NaN and a NaN gradient. Where the level is -inf the loss is returned
    untouched. No gradient flows into the level and into the numbers of the shape.

    For the mean over a batch, `flood_mean` says over what to average before bending.

    Args:
      loss: real floats of any shape; 16-bit losses are compared in float32, those of
        8 or 4 bits are refused.
      level: a number or an array that broadcasts to the shape of ``loss``; it is cast
        to the dtype of the comparison, so that 1e39 is infinite to a float32 loss.
      shape: how to bend, see `flood_optax.shapes`.

    Returns:
      The flooded losses, of the shape and dtype of ``loss``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> print(flood_loss(jnp.array([0.75, 0.25, 0.125]), 0.25))
      [0.75  0.25  0.375]
      >>> print(jax.grad(lambda x: flood_loss(x**3, 0.25))(0.5))
      -0.75

    References:
      Ishida et al., ICML 2020, section 3, https://arxiv.org/abs/2002.08709
    """
    losses = as_real_array(loss, "flood_loss(loss)")
    check_level(level, "flood_loss(level=...)")
    check_shape(shape, "flood_loss(shape=...)")
    levels = broadcast_level(level, losses.shape, "flood_loss(level=...)")
    return flood_value(losses, levels, shape)[0]


@overload
def flooded(
    loss_fn: Callable[P, tuple[ArrayLike, Aux]],
    level: ArrayLike,
    *,
    has_aux: Literal[True],
    axis_name: AxisName | None = None,
    shape: Shape = ...,
    return_info: Literal[False] = False,
    raw_value: bool = False,
) -> Callable[P, tuple[jax.Array, Aux]]: ...
@overload
def flooded(
    loss_fn: Callable[P, tuple[ArrayLike, Aux]],
    level: ArrayLike,
    *,
    has_aux: Literal[True],
    axis_name: AxisName | None = None,
    shape: Shape = ...,
    return_info: Literal[True],
    raw_value: bool = False,
) -> Callable[P, tuple[jax.Array, FloodInfo[Aux]]]: ...
@overload
def flooded(
    loss_fn: Callable[P, ArrayLike],
    level: ArrayLike,
    *,
    has_aux: Literal[False] = False,
    axis_name: AxisName | None = None,
    shape: Shape = ...,
    return_info: Literal[True],
    raw_value: bool = False,
) -> Callable[P, tuple[jax.Array, FloodInfo[None]]]: ...
@overload
def flooded(
    loss_fn: Callable[P, ArrayLike],
    level: ArrayLike,
    *,
    has_aux: Literal[False] = False,
    axis_name: AxisName | None = None,
    shape: Shape = ...,
    return_info: Literal[False] = False,
    raw_value: bool = False,
) -> Callable[P, jax.Array]: ...
@overload
def flooded(
    loss_fn: Callable[P, Any],
    level: ArrayLike,
    *,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    shape: Shape = ...,
    return_info: bool = False,
    raw_value: bool = False,
) -> Callable[P, Any]: ...
def flooded(
    loss_fn: Callable[..., Any],
    level: ArrayLike,
    *,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    shape: Shape = reflect(),
    return_info: bool = False,
    raw_value: bool = False,
) -> Callable[..., Any]:
    r"""Wraps a loss function so that its gradient floods.

    :math:`\tilde L(\theta) = \phi(L(\theta) - b) + b` with L = ``loss_fn``, b =
    ``level`` and :math:`\phi` = ``shape``; for the default :math:`|L - b| + b`. The
    gradient is that of L times m = :math:`\phi'(L - b)`: plain at or above the level,
    negated below it, NaN for a NaN loss. ``scale_by_flood`` in front of the optimizer
    does the same: bit for bit where m is 1, -1 or 0, to rounding for other shapes and,
    under jit, for 16-bit losses. Use one of the two, for two cancel.

    What it returns is marked, also behind `functools.partial`, `functools.wraps`,
    ``jax.jit`` and as a method: to flood it once more is an error, and so is giving it
    to `flood_optax.sharpness` and `flood_optax.penalty`, which take the raw loss. A
    lambda, a ``def`` or a class that calls it hides the mark. ``loss_fn`` is its
    ``__wrapped__``; ``inspect.unwrap`` goes on to what ``loss_fn`` wraps itself, as
    where that adds a penalty.

    ``loss_fn`` must return the mean over the whole batch. Where it sees a part only, on
    a mapped axis name the axis; over accumulated micro-batches use
    ``flood_optax.flood(inner, level, every_k=k)`` instead.

    Args:
      loss_fn: returns a scalar loss of a real float dtype (16 bits at least), or (loss,
        aux) with ``has_aux``. Any arguments; called once per call.
      level: a scalar, b; an array or tracer may change without recompilation. -inf
        means off. No gradient flows into it, nor into the numbers of the shape.
      has_aux: whether ``loss_fn`` returns (loss, aux).
      axis_name: mapped axis or axes (shard_map, pmap) over which the batch is split.
        The value is then the global flooded loss, the gradient this device's share:
        average it over the devices as usual. ``()`` floods each device by itself, as
        for separate models. Under ``shard_map`` with
        ``check_vma=True`` make replicated parameters varying first (``lax.pcast``), or
        JAX has summed their gradients already.
      shape: how to bend, see `flood_optax.shapes`.
      return_info: whether to return (flooded loss, FloodInfo) instead.
      raw_value: whether the value is the raw loss, and the gradient alone is flooded:
        for a trainer that logs its training loss, or evaluates with it. Not for a
        line search, which must see the function whose gradient it follows.

    Returns:
      A function of the same arguments as ``loss_fn`` that returns the flooded loss,
      with ``has_aux`` (flooded loss, aux), and with ``return_info`` (flooded loss,
      FloodInfo(loss, level, multiplier, aux)), to differentiate with has_aux=True.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((w * x - 1.0) ** 2)
      >>> w, x = 0.9, jnp.array([1.0, 1.5])
      >>> print(f"{loss_fn(w, x):.4f} {jax.grad(loss_fn)(w, x):.4f}")
      0.0662 0.4250
      >>> flooded_fn = flooded(loss_fn, level=0.1, return_info=True)
      >>> (value, info), grad = jax.value_and_grad(flooded_fn, has_aux=True)(w, x)
      >>> print(f"{value:.4f} {grad:.4f} {info.loss:.4f} {info.multiplier:.0f}")
      0.1338 -0.4250 0.0662 -1

    References:
      Ishida et al., ICML 2020, section 3 and algorithm 1,
      https://arxiv.org/abs/2002.08709
    """
    check_raw("flooded(loss_fn)", loss_fn)
    check_scalar_level(level, "flooded(level=...)")
    check_shape(shape, "flooded(shape=...)")

    @functools.wraps(loss_fn)
    def flooded_fn(*args: Any, **kwargs: Any) -> Any:
        result = loss_fn(*args, **kwargs)
        loss, aux = as_loss_and_aux("flooded", result, has_aux=has_aux)
        loss = as_scalar_loss(
            loss,
            "flooded(loss_fn)'s loss",
            "`flood_mean(losses, level)` says over what to average.",
        )
        check_axes("flooded", loss, axis_name)
        value, bent = flood_value(loss, jnp.asarray(level), shape, axis_name)
        raw = bent.loss.astype(loss.dtype)
        if raw_value:
            value = _shown_as(varying_like(raw, loss) if axis_name else raw, value)
        if return_info:
            seen = lax.stop_gradient((raw, bent.level, bent.multiplier))
            return value, FloodInfo(*seen, aux)
        return (value, aux) if has_aux else value

    setattr(flooded_fn, FLOODED, True)
    if return_info:
        _annotate(flooded_fn, loss_fn)
    return flooded_fn


def _shown_as(raw: jax.Array, value: jax.Array) -> jax.Array:
    """The raw loss, with all derivatives of the flooded value."""
    # `jax.experimental.jet` looks through custom rules and differentiates what is
    # shown. So it is raw - (now - value), `now` being the value as a constant: raw, bit
    # for bit, unless inf - inf is NaN, with the derivatives of the value.
    raw, now = lax.stop_gradient((raw, value))
    shown = jnp.where(jnp.isfinite(now), raw - (now - value), raw)
    return with_slope(value, shown, jnp.ones_like(shown))


def _annotate(flooded_fn: Callable[..., Any], loss_fn: Callable[..., Any]) -> None:
    """Says what is returned, where loss_fn says so: a type checker of calls asks."""
    if "return" not in getattr(loss_fn, "__annotations__", {}):
        return
    returned = tuple[jax.Array, FloodInfo[Any]]
    flooded_fn.__annotations__ = {**flooded_fn.__annotations__, "return": returned}
    signature = inspect.signature(loss_fn).replace(return_annotation=returned)
    setattr(flooded_fn, "__signature__", signature)  # noqa: B010 - no type has it
