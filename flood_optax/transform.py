"""The optax form: flooding as a gradient transformation, first in the chain."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export, lax
from jax.typing import ArrayLike

from flood_optax.bend import Bent, bend
from flood_optax.checks import (
    DROPS_VALUE,
    FloodWarning,
    as_scalar_loss,
    check_number,
    check_scalar_level,
    known_numbers,
    largest,
    must,
)
from flood_optax.devices import AxisName, check_axes, global_mean
from flood_optax.dispatch import on_chosen, one_dispatch
from flood_optax.precision import wide
from flood_optax.shape_rules import check_shape, check_turns_around, is_static
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
    ``flooded(loss_fn, level)``: bit for bit in float32 and float64 where m is -1, 0 or
    1, else to rounding. 0 times an infinite gradient is 0.

    With ``band`` = d the level is b + d after a step that was below its level, and
    b - d after any other, also the first and one with a NaN loss: the loss sinks to
    b - d, climbs to b + d, and so on, in strokes of many steps. No step ascends from a
    loss of b + d or above. With Adam, or momentum at moderate steps, the *averaged*
    weights gained points of accuracy under label noise (docs/averaging.md); the last
    ones are those of some point of a stroke. A band needs a shape that turns around:
    `pause`, which does not climb, `soft`, which rests before an end, and a dead band,
    which holds the loss below the upper end, are refused.

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
        as a loss that is never negative cannot for d > b, this is plain training: that
        gets a `flood_optax.FloodWarning`.
      shape: how to bend, see `flood_optax.shapes`.
      axis_name: mapped axis or axes (shard_map, pmap) over which ``value`` is averaged
        before it is compared; ``()`` floods each device by itself, as for separate
        models. Under `jax.jit` with sharded data nothing is needed.

    Returns:
      A transformation with the state `FloodState`. Its update takes

      * ``value``, the raw loss, a real scalar; ``loss`` where ``value`` is not given;
      * ``weight``, what this loss counts (its number of examples or tokens), a
        non-negative real scalar, 1 by default. Over ``axis_name`` the loss is then
        sum(weight * value) / sum(weight), in one collective; the gradient must be
        averaged by the same weights. A part of weight 0 leaves no trace here, NaN
        included: where all is of weight 0, updates are 0 and this state stays as it
        was. What stands behind in the chain sees zeros, by which Adam goes on with its
        momentum; ``flood(inner, level)`` takes no step at all.

      Every leaf keeps its dtype; integer, float0, None, masked and key leaves pass.

    Raises:
      ValueError: if the level is NaN or +inf, or an end of the band is not finite, or
        the shape does not turn a band around; in update, if the loss is missing or not
        a scalar, if ``value_fn`` is handed over, if ``axis_name`` is not mapped, or
        if it is missing where the loss is known to vary over a mapped axis.
      TypeError: in update, for arguments that only flooding could mean and that it
        would ignore, as ``weights``, ``values`` or ``level``.

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
    flood_updates = flooding("scale_by_flood", level, band, shape)

    def init_fn(params: optax.Params) -> FloodState:
        del params
        return initial_state()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if extra_args.get("value_fn") is not None:
            raise ValueError(
                "`scale_by_flood` must not stand in front of an optimizer that "
                "evaluates the loss itself, got `value_fn`: it would search on the raw "
                "loss. Use `flood_optax.flood(inner, level)` or "
                "`flood_optax.flooded(loss_fn, level)`."
            )
        if not isinstance(state, FloodState):
            refuse_state(FloodState, state, "scale_by_flood()")
        loss, _, counts = batch_loss(
            "scale_by_flood()", extra_args, axis_name, updates, params
        )
        updates, _, after = flood_updates(state, loss, updates, counts)
        return updates, after

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


Flooding = Callable[..., tuple[Any, Bent, FloodState]]


def initial_state() -> FloodState:
    """Zeros, each an array of its own, so that the state can be donated."""
    return FloodState(
        flood_step=jnp.zeros([], jnp.int32),
        flood_level=jnp.zeros([], jnp.float32),
        flood_value=jnp.zeros([], jnp.float32),
        flood_below=jnp.zeros([], jnp.int32),
    )


def flooding(call: str, level: Level, band: ArrayLike | None, shape: Shape) -> Flooding:
    """Checks what an optax form is given, and returns how it floods one update."""
    check_shape(shape, f"{call}(shape=...)")
    if not callable(level):
        check_scalar_level(level, f"{call}(level=...)")
    has_band = _check_band(call, level, band, shape)
    never_zero = shape == reflect()
    # A shape of traced numbers must not be kept with what is compiled for it.
    run = _compiled_flooded if is_static(shape) else _flooded

    def flood_updates(
        state: FloodState,
        loss: jax.Array,
        updates: Any,
        counts: jax.Array | None = None,
    ) -> tuple[Any, Bent, FloodState]:
        now = level
        if callable(now):
            now = now(state.flood_step)
            check_scalar_level(now, f"{call}(level=...)")
            _check_ends(call, now, band)
        flood_leaves = functools.partial(
            run,
            *(state, loss, jnp.asarray(now)),
            band=band if has_band else None,
            counts=counts,
            shape=shape,
            never_zero=never_zero,
        )
        dtypes = map(jax.dtypes.result_type, jax.tree.leaves(updates))  # of keys, too
        inexact = [jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes]
        return on_chosen(flood_leaves, updates, inexact)

    return flood_updates


def _flooded(
    state: FloodState,
    loss: jax.Array,
    level: jax.Array,
    updates: list[Any],
    *,
    band: ArrayLike | None,
    counts: jax.Array | None,
    shape: Shape,
    never_zero: bool,
) -> tuple[list[jax.Array], Bent, FloodState]:
    """One loss, bent, and its updates times m.

    Each leaf keeps its dtype; what counts nothing leaves no trace.
    """
    bent, after = _compare(state, loss, level, band, shape)
    if counts is not None:
        bent = bent._replace(multiplier=jnp.where(counts, bent.multiplier, 0))
        after = jax.tree.map(functools.partial(jnp.where, counts), after, state)
    m = bent.multiplier
    # 0 times inf is 0; a select costs an operation per entry, and memory unless fused
    zero = None if never_zero and counts is None else m == 0
    scaled = []
    for update in map(jnp.asarray, updates):
        is_complex = jnp.issubdtype(update.dtype, jnp.complexfloating)
        parts = [jnp.real(update), jnp.imag(update)] if is_complex else [update]
        for i, part in enumerate(parts):
            work = np.promote_types(part.dtype, np.float32)  # 16 bits are rounded once
            product = (part.astype(work) * m.astype(work)).astype(part.dtype)
            if zero is not None:
                product = jnp.where(zero, jnp.zeros_like(product), product)
            parts[i] = product
        scaled.append(lax.complex(*parts) if is_complex else parts[0])
    return scaled, bent, after


_compiled_flooded = one_dispatch(_flooded, static=("shape", "never_zero"))


def _compare(
    state: FloodState,
    loss: jax.Array,
    level: jax.Array,
    band: ArrayLike | None,
    shape: Shape,
) -> tuple[Bent, FloodState]:
    """One loss at its level or end of the band, and the state with it."""
    dtype = np.promote_types(loss.dtype, np.float32)
    if band is not None:
        climbs = state.flood_value < state.flood_level  # as the last step did
        level = level.astype(dtype)
        # off stays off, also for a traced band such as a fifth of the level, -inf here
        half = jnp.where(level == -jnp.inf, 0, jnp.asarray(band, dtype))
        level += jnp.where(climbs, half, -half)
    bent = bend(loss, level, shape)
    is_below = bent.loss < bent.level
    end, value = bent.level.astype(jnp.float32), bent.loss.astype(jnp.float32)
    if band is not None and dtype == np.float64:
        # Rounding must not hide that it was below, nor XLA, to which a subnormal is 0.
        tiny = float(np.finfo(np.float32).tiny)
        subnormal = jnp.abs(end) < tiny
        just_below = jnp.where(subnormal, -tiny, jnp.nextafter(end, -jnp.inf))
        value = jnp.where(is_below, jnp.minimum(value, just_below), value)
    below = jnp.asarray(optax.safe_increment(state.flood_below))
    after = FloodState(
        # a run of more than 2^31 steps must not start again at negative ones
        flood_step=jnp.asarray(optax.safe_increment(state.flood_step)),
        flood_level=end,
        flood_value=value,
        flood_below=jnp.where(is_below, below, state.flood_below),
    )
    return bent, after


def _check_band(call: str, level: Level, band: ArrayLike | None, shape: Shape) -> bool:
    """Whether there is a band, as far as it is known: 0 is none."""
    if band is None:
        return False
    check_number(f"{call}(band=...)", band, "non-negative and finite")
    d = known_numbers(band)
    if d is not None and d == 0:
        return False
    check_turns_around(shape, 1.0 if d is None else float(d), f"{call}(band=...)")
    if callable(level):
        return True
    _check_ends(call, level, band)
    b = known_numbers(level)
    if d is not None and b is not None and d > b > 0:
        warnings.warn(
            f"`{call}(band=...)` should not be above the level, got {band} above "
            f"{level}: a loss that is never negative does not sink to {b - d:.6g}, so "
            "this is plain training. A fifth of the level is common.",
            FloodWarning,
            stacklevel=4,
        )
    return True


def _check_ends(call: str, level: ArrayLike, band: ArrayLike | None) -> None:
    """An end at +inf would be climbed to for ever, one at -inf be off in silence."""
    if band is None:
        return
    b, d = known_numbers(level), known_numbers(band)
    if b is not None and d is not None and np.isfinite(b) and abs(b) + d > largest():
        got = f"{band} about {level}"
        raise ValueError(must(f"{call}(band=...)", "leave both ends finite", got))


class BatchLoss(NamedTuple):
    """The raw loss of the whole batch.

    Attributes:
      loss: the loss.
      weight: what it counts; without weights the number of devices.
      counts: whether its weight is not 0; None where no weight was given.
    """

    loss: jax.Array
    weight: jax.Array | int
    counts: jax.Array | None


# What only flooding could mean, and no update knows: it would be ignored.
_NEAR_MISSES = {
    "weights": "`weight=`, one number: what this loss counts",
    "values": "`value=`, the mean loss of the batch",
    "losses": "`value=`, the mean loss of the batch",
    "level": "`{form}(..., level)`; one that changes is a schedule",
    "levels": "`{form}(..., level)`; one that changes is a schedule",
    "band": "`{form}(..., level, band=...)`",
    "every_k": "`flood(inner, level, every_k=...)`",
    "axis_name": "`{form}(..., level, axis_name=...)`",
}


def _refuse_name(call: str, name: str) -> NoReturn:
    remedy = _NEAR_MISSES[name].format(form=call[: call.index("(")])
    got = f"one, which would be ignored: use {remedy}"
    raise TypeError(must(f"{call}.update({name}=...)", "not be given", got))


def batch_loss(
    call: str,
    extra_args: dict[str, Any],
    axis_name: AxisName | None,
    updates: Any,
    params: Any,
) -> BatchLoss:
    """The raw loss handed to an update, checked and averaged over the mapped axis."""
    names = {name for name, given in extra_args.items() if given is not None}
    misses = _NEAR_MISSES.keys() & names
    if misses and "value_fn" not in names:  # whose arguments may have any name
        _refuse_name(call, min(misses))
    name = "value" if "value" in names else "loss"
    given, weight = extra_args.get(name), extra_args.get("weight")
    if given is None:
        _refuse_without_loss(call, updates, params)
    share = as_scalar_loss(
        given,
        f"{call}.update({name}=...)",
        "Pass the mean over the batch, the scalar you differentiate.",
    )
    check_axes(call, share, axis_name)
    if weight is None and axis_name is None:
        return BatchLoss(share, 1, None)
    if weight is None:  # each device counts 1
        return BatchLoss(global_mean(share, axis_name), lax.axis_size(axis_name), None)
    check_number(f"{call}.update(weight=...)", weight, "non-negative and finite")
    counted = wide(share)
    part = jnp.asarray(weight, counted.dtype)
    # a select: the product with 0 keeps the NaN of a part that counts nothing
    counted = jnp.where(part != 0, counted, 0)
    if axis_name is not None:
        # stacked, so that it is one collective
        total, part = lax.psum(jnp.stack([part * counted, part]), axis_name)
        counted = total / jnp.where(part != 0, part, 1)
    return BatchLoss(counted.astype(share.dtype), part, part != 0)


def _refuse_without_loss(call: str, updates: Any, params: Any) -> NoReturn:
    def is_scalar(tree: Any) -> bool:
        kinds = float | np.generic | np.ndarray | jax.Array
        return isinstance(tree, kinds) and np.shape(tree) == ()

    got = "None"
    if is_scalar(params) and not is_scalar(updates):
        got = "None, and a scalar, perhaps the loss, in the place of params"
    raise ValueError(
        f"`{call}.update(value=...)` needs the current loss, got {got}: "
        f"pass `optimizer.update(grads, state, params, value=loss)`. {DROPS_VALUE}"
    )


def refuse_state(kind: type, state: Any, call: str) -> NoReturn:
    """Says that it is none that this transformation's `init` gave."""
    raise TypeError(
        f"`{call}.update(state)` must be a {kind.__name__}, as its `init` gives, "
        f"got {type(state).__name__}. How to go on from a checkpoint of plain "
        "training: docs/traps.md, Checkpoints."
    )
