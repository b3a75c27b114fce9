"""The optax form: flooding as a gradient transformation, first in the chain."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export, lax
from jax.typing import ArrayLike

from flood_optax.bend import bend, compare_dtype
from flood_optax.checks import (
    DROPS_VALUE,
    check_level,
    check_scalar_level,
    scalar_loss,
)
from flood_optax.shapes import Shape, reflect

Level = ArrayLike | Callable[[jax.Array], ArrayLike]
AxisName = str | tuple[str, ...]


class FloodState(NamedTuple):
    """What flooding remembers, and what to log; `optax.tree.get` finds each field.

    All are zero at init. The schema is stable: checkpoints rely on it.

    Attributes:
      flood_step: int32 scalar, updates taken so far (windows under ``every_k``).
      flood_level: float32 scalar, the level last used.
      flood_value: float32 scalar, the raw loss last seen.
      flood_below: int32 scalar, how many steps had a loss strictly below the level.
    """

    flood_step: jax.Array
    flood_level: jax.Array
    flood_value: jax.Array
    flood_below: jax.Array


# so that `jax.export` can write a train step that takes and gives the state
export.register_namedtuple_serialization(
    FloodState, serialized_name="flood_optax.FloodState"
)


def scale_by_flood(
    level: Level, *, shape: Shape = reflect(), axis_name: AxisName | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Flips the gradient while the loss is below the level.

    Updates are multiplied by m = :math:`\phi'(L - b)`, where L = ``value``, the raw
    loss handed to ``update``, b = ``level`` and :math:`\phi` = ``shape``: by default 1
    for L >= b (at a tie the step descends), -1 for L < b, and NaN for a NaN loss,
    which `optax.apply_if_finite` behind the flood catches. This is the gradient of
    ``flooded(loss_fn, level)``, bit for bit. 0 times an infinite gradient is 0.

    Put it first in a chain, before moments, clipping and weight decay. ``value`` must
    be the loss of the whole batch that the gradient belongs to: in a mapped function
    give ``axis_name``; `optax.MultiSteps` around it hands over the last micro-batch's
    loss, so accumulate with `flood_optax.flood(inner, level, every_k=k)` instead.
    Optimizers that read the value themselves (line searches, `optax.polyak_sgd`,
    `optax.contrib.momo`) need `flood_optax.flood(inner, level)` too.

    Args:
      level: a scalar, b, or a schedule from the step (int32) to one. -inf means off.
      shape: how to bend, see `flood_optax.shapes`.
      axis_name: mapped axis or axes (shard_map, pmap) over which ``value`` is averaged
        before it is compared. Under `jax.jit` with sharded data nothing is needed.

    Returns:
      A transformation with the state `FloodState`, whose update takes ``value=``, the
      raw loss, a real scalar. Every leaf keeps its dtype; integer, float0, None and
      masked leaves pass through.

    Raises:
      TypeError: if ``level`` is no number; in update, if ``value`` is no real float or
        a (loss, aux) tuple.
      ValueError: if ``level`` is NaN, +inf or not a scalar; in update, if ``value`` is
        missing or not a scalar, or if ``value_fn`` is handed over.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flood_optax import scale_by_flood
      >>> optimizer = optax.chain(scale_by_flood(level=0.5), optax.sgd(0.1))
      >>> def loss_fn(w):
      ...     return jnp.exp(w) - w - 1.0  # least, 0, at w = 0
      >>> w = jnp.array(2.0)
      >>> state = optimizer.init(w)
      >>> for _ in range(41):
      ...     value, grad = jax.value_and_grad(loss_fn)(w)
      ...     updates, state = optimizer.update(grad, state, w, value=value)
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"{loss_fn(w):.3f}")
      0.439
      >>> print(optax.tree.get(state, "flood_below"), "of 41 steps were below")
      21 of 41 steps were below

    References:
      Ishida et al., ICML 2020, section 3, https://arxiv.org/abs/2002.08709
    """
    level_at = schedule(level, "scale_by_flood(level=...)")

    def init_fn(params: optax.Params) -> FloodState:
        del params
        return initial_state()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        if extra_args.get("value_fn") is not None:
            raise ValueError(
                "`scale_by_flood` must not stand in front of an optimizer that "
                "evaluates the loss itself, got `value_fn`: it would search on the raw "
                "loss. Use `flood_optax.flood(inner, level)` or "
                "`flood_optax.flooded(loss_fn, level)`."
            )
        loss = batch_loss(value, "scale_by_flood().update(value=...)", axis_name)
        step = flood_step(state, loss, level_at, shape)
        return scaled(updates, step.multiplier), step.state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class FloodStep(NamedTuple):
    """One comparison of a loss with its level."""

    level: jax.Array
    flooded: jax.Array
    multiplier: jax.Array
    state: FloodState


def schedule(level: Level, call: str) -> Callable[[jax.Array], jax.Array]:
    """The level as a function of the step, checked as early as its number is known."""
    if not callable(level):
        check_scalar_level(level, call)
        return lambda step: jnp.asarray(level)

    def level_at(step: jax.Array) -> jax.Array:
        now = level(step)
        check_level(now, call)
        check_scalar_level(now, call)
        return jnp.asarray(now)

    return level_at


def initial_state() -> FloodState:
    """The state before the first step."""
    return FloodState(
        flood_step=jnp.zeros([], jnp.int32),
        flood_level=jnp.zeros([], jnp.float32),
        flood_value=jnp.zeros([], jnp.float32),
        flood_below=jnp.zeros([], jnp.int32),
    )


def batch_loss(
    value: ArrayLike | None, call: str, axis_name: AxisName | None
) -> jax.Array:
    """The raw loss handed to an update, checked and averaged over the mapped axis."""
    if value is None:
        raise ValueError(
            f"`{call}` needs the current loss, got None: "
            f"pass `optimizer.update(grads, state, params, value=loss)`. {DROPS_VALUE}"
        )
    loss = scalar_loss(
        value, call, "Pass the mean over the batch, the scalar you differentiate."
    )
    if axis_name is None:
        return loss
    precise = loss.astype(compare_dtype(loss.dtype))
    return lax.pmean(precise, axis_name).astype(loss.dtype)


def flood_step(
    state: Any,
    loss: jax.Array,
    level_at: Callable[[jax.Array], jax.Array],
    shape: Shape,
) -> FloodStep:
    """Compares the loss with the level of this step and counts it."""
    level = level_at(state.flood_step)
    compared, bound, value, multiplier = bend(loss, level, shape)
    below = (compared < bound).astype(jnp.int32)
    return FloodStep(
        level=level,
        flooded=value.astype(loss.dtype),
        multiplier=multiplier,
        state=FloodState(
            flood_step=jnp.asarray(optax.safe_increment(state.flood_step)),
            flood_level=bound.astype(jnp.float32),
            flood_value=compared.astype(jnp.float32),
            flood_below=state.flood_below + below,
        ),
    )


def scaled(updates: optax.Updates, multiplier: jax.Array) -> optax.Updates:
    """Multiplies each leaf by m, in the dtype of the leaf."""
    return jax.tree.map(functools.partial(_scaled_leaf, multiplier), updates)


def _scaled_leaf(multiplier: jax.Array, update: Any) -> Any:
    """0 times inf is 0; 16-bit leaves are multiplied in float32 and rounded once."""
    dtype = jnp.result_type(update)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return update
    update = jnp.asarray(update)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        real, imag = jnp.real(update), jnp.imag(update)
        return lax.complex(
            _scaled_leaf(multiplier, real), _scaled_leaf(multiplier, imag)
        )
    work = compare_dtype(np.dtype(dtype))
    product = (update.astype(work) * multiplier.astype(work)).astype(dtype)
    return jnp.where(multiplier == 0, jnp.zeros_like(update), product)
