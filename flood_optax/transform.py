"""The optax form: flooding as a gradient transformation, first in the chain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.bend import (
    AxisName,
    Bent,
    bend,
    compare_dtype,
    global_mean,
    wide,
)
from flood_optax.checks import (
    DROPS_VALUE,
    check_scalar_level,
    number,
    scalar_loss,
)
from flood_optax.shape_rules import check_shape
from flood_optax.shapes import Shape, reflect

Level = ArrayLike | Callable[[jax.Array], ArrayLike]


class FloodState(NamedTuple):
    """What flooding remembers, and what to log; `optax.tree.get` finds each field.

    All are zero at init. The schema is stable: checkpoints rely on it.

    Attributes:
      flood_step: int32 scalar, updates taken so far (windows under ``every_k``).
      flood_level: float32 scalar, the level last used, at an end of the band if it has
        one.
      flood_value: float32 scalar, the raw loss last seen; with a band it is below
        ``flood_level`` in float32, too, where it was so in float64.
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
    level: Level,
    *,
    band: ArrayLike | None = None,
    shape: Shape = reflect(),
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Flips the gradient while the loss is below the level.

    Updates are multiplied by m = :math:`\phi'(L - b)`, where L = ``value``, the raw
    loss handed to ``update``, b = ``level`` and :math:`\phi` = ``shape``: by default 1
    for L >= b (at a tie the step descends), -1 for L < b, and NaN for a NaN loss,
    which `optax.apply_if_finite` behind the flood catches. This is the gradient of
    ``flooded(loss_fn, level)``, bit for bit. 0 times an infinite gradient is 0.

    With ``band`` = d the level is b + d after a step that was below its level, and
    b - d after any other, also the first and one with a NaN loss: the loss sinks to
    b - d, climbs to b + d, and so on, in strokes of many steps. No step ascends from a
    loss of b + d or above. With Adam, or momentum at moderate steps, the *averaged*
    weights gained points of accuracy under label noise (docs/strokes.md); the last ones
    are those of some point of a stroke. A band needs a shape that turns around: `pause`
    does not climb, `soft` slows down before an end and may rest there, and a dead band
    holds the loss below the upper end.

    Put it first in a chain, before moments, clipping and weight decay, and once: two
    floods undo each other, which neither can see. ``value`` must be the loss of the
    whole batch that the gradient belongs to: in a mapped function give ``axis_name``;
    `optax.MultiSteps` around it hands over the last micro-batch's loss, so accumulate
    with `flood_optax.flood(inner, level, every_k=k)` instead. Optimizers that read the
    value themselves (line searches, `optax.polyak_sgd`, `optax.contrib.momo`) need
    `flood_optax.flood(inner, level)` too.

    Args:
      level: a scalar, b, or a schedule from the step (int32) to one. -inf means off.
        No gradient flows into it.
      band: half the width of the band around the level, a non-negative real scalar in
        the units of the loss; None or 0 is none. Where the loss cannot sink to b - d,
        as a loss that is never negative cannot for d > b, this is plain training.
      shape: how to bend, see `flood_optax.shapes`.
      axis_name: mapped axis or axes (shard_map, pmap) over which ``value`` is averaged
        before it is compared. Under `jax.jit` with sharded data nothing is needed.

    Returns:
      A transformation with the state `FloodState`. Its update takes

      * ``value``, the raw loss, a real scalar; ``loss`` where ``value`` is not given;
      * ``weight``, what this loss counts (its number of examples or tokens), a
        non-negative real scalar, 1 by default. Over ``axis_name`` the loss is then
        sum(weight * value) / sum(weight), in one collective; the gradient must be
        averaged by the same weights. A part of weight 0 leaves no trace, NaN included;
        where all is of weight 0, updates are 0 and the state stays as it was.

      Every leaf keeps its dtype; integer, float0, None and masked leaves pass through.

    Raises:
      ValueError: in update, if the loss is missing or not a scalar, or if ``value_fn``
        is handed over.

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
    at_work = flooding(level, band, shape, "scale_by_flood")

    def init_fn(params: optax.Params) -> FloodState:
        del params
        return at_work.init()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
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
        before: FloodState = own_state(state, FloodState, "scale_by_flood()")
        read = batch_loss("scale_by_flood()", extra_args, axis_name)
        bent, after = at_work.step(before, read.loss)
        multiplier = bent.multiplier
        if not isinstance(read.weight, int):
            counts = read.weight != 0
            multiplier = jnp.where(counts, multiplier, 0)
            after = jax.tree.map(functools.partial(jnp.where, counts), after, before)
        return scaled(updates, multiplier), after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class Flooding(NamedTuple):
    """A level and a shape at work: the state to start with, and one comparison."""

    init: Callable[[], FloodState]
    step: Callable[[FloodState, jax.Array], tuple[Bent, FloodState]]


def flooding(level: Level, band: ArrayLike | None, shape: Shape, call: str) -> Flooding:
    """What every optax form does with one loss of one step."""
    check_shape(shape, f"{call}(shape=...)")
    middle = _schedule(level, f"{call}(level=...)")
    level_at = _banded(middle, band, f"{call}(band=...)")
    remembers = _is_band(band)

    def init() -> FloodState:
        return FloodState(
            flood_step=jnp.zeros([], jnp.int32),
            flood_level=jnp.zeros([], jnp.float32),
            flood_value=jnp.zeros([], jnp.float32),
            flood_below=jnp.zeros([], jnp.int32),
        )

    def step(state: FloodState, loss: jax.Array) -> tuple[Bent, FloodState]:
        bent = bend(loss, level_at(state, compare_dtype(loss.dtype)), shape)
        is_below = bent.loss < bent.level
        level, value = bent.level.astype(jnp.float32), bent.loss.astype(jnp.float32)
        if remembers and bent.loss.dtype == np.float64:
            # rounding must not hide that it was below
            under = jnp.nextafter(level, -jnp.inf)
            value = jnp.where(is_below, jnp.minimum(value, under), value)
        more = jnp.asarray(optax.safe_increment(state.flood_below))
        return bent, FloodState(
            # a run of more than 2^31 steps must not start again at negative ones
            flood_step=jnp.asarray(optax.safe_increment(state.flood_step)),
            flood_level=level,
            flood_value=value,
            flood_below=jnp.where(is_below, more, state.flood_below),
        )

    return Flooding(init, step)


def _schedule(level: Level, call: str) -> Callable[[jax.Array], jax.Array]:
    """The level as a function of the step, checked as early as its number is known."""
    if not callable(level):
        check_scalar_level(level, call)
        return lambda step: jnp.asarray(level)

    def level_at(step: jax.Array) -> jax.Array:
        now = level(step)
        check_scalar_level(now, call)
        return jnp.asarray(now)

    return level_at


def _is_band(band: ArrayLike | None) -> bool:
    """Whether there is one, as far as it is known: 0 is none."""
    return band is not None and (isinstance(band, Tracer) or bool(np.any(band)))


def _banded(
    level_at: Callable[[jax.Array], jax.Array], band: ArrayLike | None, call: str
) -> Callable[[FloodState, np.dtype], jax.Array]:
    """The level, or the end of the band around it towards which the loss moves."""
    if band is not None:
        most = float(np.finfo(jnp.result_type(float)).max)
        number(call, band, "non-negative and finite", lambda d: 0 <= d <= most)
    if not _is_band(band):
        return lambda state, dtype: level_at(state.flood_step)

    def end(state: FloodState, dtype: np.dtype) -> jax.Array:
        rises = state.flood_value < state.flood_level  # the last step went up
        middle = level_at(state.flood_step).astype(dtype)
        # off is off, also for a traced band such as a fifth of the level, -inf here
        half = jnp.where(middle == -jnp.inf, 0, jnp.asarray(band, dtype))
        return middle + jnp.where(rises, half, -half)

    return end


class BatchLoss(NamedTuple):
    """The raw loss of the whole batch; its weight, a static int if none was given."""

    loss: jax.Array
    weight: jax.Array | int


def batch_loss(
    call: str, extra_args: dict[str, Any], axis_name: AxisName | None
) -> BatchLoss:
    """The raw loss handed to an update, checked and averaged over the mapped axis."""
    name = "loss" if extra_args.get("value") is None else "value"
    given, weight = extra_args.get(name), extra_args.get("weight")
    if given is None:
        raise ValueError(
            f"`{call}.update(value=...)` needs the current loss, got None: "
            f"pass `optimizer.update(grads, state, params, value=loss)`. {DROPS_VALUE}"
        )
    share = scalar_loss(
        given,
        f"{call}.update({name}=...)",
        "Pass the mean over the batch, the scalar you differentiate.",
    )
    if weight is None:  # each device counts 1
        devices = 1 if axis_name is None else lax.axis_size(axis_name)
        return BatchLoss(global_mean(share, axis_name), devices)
    rule = "non-negative and finite"
    number(f"{call}.update(weight=...)", weight, rule, lambda w: 0 <= w < np.inf)
    part = jnp.asarray(weight, compare_dtype(share.dtype))
    # a select: the product with 0 keeps the NaN of a part that counts nothing
    counted = jnp.where(part != 0, wide(share), 0)
    if axis_name is not None:
        # stacked, so that it is one collective
        total, part = lax.psum(jnp.stack([part * counted, part]), axis_name)
        counted = total / jnp.where(part != 0, part, 1)
    return BatchLoss(counted.astype(share.dtype), part)


def own_state(state: Any, kind: type, call: str) -> Any:
    """The state, which must be of this transformation."""
    if not isinstance(state, kind):
        raise TypeError(
            f"`{call}.update(state)` must be a {kind.__name__}, as its `init` gives, "
            f"got {type(state).__name__}. How to go on from a checkpoint of plain "
            "training: docs/traps.md, Checkpoints."
        )
    return state


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
