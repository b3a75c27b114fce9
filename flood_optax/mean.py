"""The mean of many losses, flooded over a partition of the batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flood_optax.bend import flood_value, nan_where, shared_mean, with_slope
from flood_optax.checks import (
    as_mask,
    as_real_array,
    as_segments,
    as_weights,
    broadcast_level,
    check_level,
    check_one_of,
    check_scalar_level,
    check_that,
)
from flood_optax.devices import (
    AxisName,
    check_axes,
    global_mean,
    on_any_mesh,
    split_like,
    zeros_like,
)
from flood_optax.precision import segment_sums, wide
from flood_optax.shape_rules import check_shape
from flood_optax.shapes import Shape, reflect

PARTITIONS = ("batch", "example", "segment", "sequence")


def flood_mean(
    losses: ArrayLike,
    level: ArrayLike,
    *,
    over: Literal["batch", "example", "segment", "sequence"] = "batch",
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    shape: Shape = reflect(),
) -> jax.Array:
    r"""Floods the mean of losses over a partition of the batch.

    With :math:`\phi` = ``shape`` and b = ``level``, for n counted losses:

    * ``over="batch"``: :math:`\phi(\bar\ell - b) + b`, flooding;
    * ``over="example"``: :math:`\frac1n\sum_i \phi(\ell_i - b_i) + b_i`, iFlood and
      AdaFlood, SoftAD with the soft shape;
    * ``over="segment"``: :math:`\sum_k \frac{n_k}{n}[\phi(\bar\ell_k - b_k) + b_k]`,
      per class or per task; empty segments count nothing;
    * ``over="sequence"``: the same sum over sequences, each the last axis of
      ``losses``; empty ones count nothing.

    These are different objectives: flooding examples or devices one by one bounds
    flooding the batch from above (Jensen). With ``weights`` every mean is a weighted
    one, and n and :math:`n_k` are sums of weights. At a tie a group descends. A NaN
    loss that counts gives NaN. Means are taken in float32 at least, and right to 1e-5
    for ten million losses. No gradient flows into level, weights and the numbers of the
    shape.

    An example is an entry of ``losses``: for losses [B, T] of sequences,
    ``over="example"`` floods each token, ``over="sequence"`` each sequence. A sequence
    then counts as many times as it has tokens; to count each alike, give weights that
    sum to 1 in each.

    Args:
      losses: real floats of any shape, one entry per example (and step, ...); those of
        8 or 4 bits are refused.
      level: a scalar for "batch"; broadcasts to ``losses`` for "example", to
        (num_segments,) for "segment", to ``losses.shape[:-1]`` for "sequence". -inf
        means off.
      over: what is averaged before it is bent.
      segment_ids: for "segment", integers in [0, num_segments), shaped as ``losses``.
        An id out of range raises if the ids are a NumPy array, and gives NaN otherwise.
      num_segments: for "segment", their number, a static int.
      where: boolean mask shaped as ``losses``; entries that are False count nowhere,
        even if NaN. If all are masked the result is NaN; for a NumPy mask, which is
        known at trace time, that is an error unless ``axis_name`` is given.
      weights: what each loss counts, non-negative real numbers shaped as ``losses``;
        None weighs all alike. Weight 0 is the same as a mask that is False.
      axis_name: mapped axis or axes (shard_map, pmap) over which the batch is split.
        The value is then that of the global batch and the gradient is this device's
        share, whose mean over devices is the gradient of the whole, masks, weights
        and segments of uneven size included. A sequence must be whole on its device:
        where the last axis is split too, make sequences segments. ``()`` floods the
        batch of each device by itself.
      shape: how to bend, see `flood_optax.shapes`.

    Returns:
      A scalar of the dtype of ``losses``.

    Examples:
      >>> import jax.numpy as jnp
      >>> losses = jnp.array([0.01, 0.02, 0.2, 0.3])
      >>> print(f"{flood_mean(losses, 0.1):.4f}")
      0.1325
      >>> print(f"{flood_mean(losses, 0.1, over='example'):.4f}")
      0.2175
      >>> classes = jnp.array([0, 0, 1, 1])
      >>> per_class = flood_mean(
      ...     losses, 0.1, over="segment", segment_ids=classes, num_segments=2
      ... )
      >>> print(f"{per_class:.4f}")
      0.2175

      Sequences of unequal length, each flooded by itself and counted by its tokens, or
      alike:

      >>> tokens = jnp.array([[0.05, 0.03, 0.7], [0.2, 0.3, 0.4]])
      >>> real = jnp.array([[True, True, False], [True, True, True]])
      >>> flooded = flood_mean(tokens, 0.1, over="sequence", where=real)
      >>> print(f"{flooded:.4f}")  # (2 (0.2 - 0.04) + 3 * 0.3) / 5
      0.2440
      >>> alike = real / real.sum(axis=1, keepdims=True)
      >>> flooded = flood_mean(tokens, 0.1, over="sequence", weights=alike)
      >>> print(f"{flooded:.4f}")  # ((0.2 - 0.04) + 0.3) / 2
      0.2300

    References:
      Ishida et al., ICML 2020, section 3, https://arxiv.org/abs/2002.08709;
      Xie et al., iFlood, ICLR 2022; Bae et al., AdaFlood, TMLR 2024.
    """
    losses = as_real_array(losses, "flood_mean(losses)")
    call = "flood_mean(level=...)"
    check_level(level, call)
    check_shape(shape, "flood_mean(shape=...)")
    check_one_of("flood_mean(over=...)", over, PARTITIONS)
    if over != "segment" and (segment_ids is not None or num_segments is not None):
        raise ValueError(
            '`flood_mean(segment_ids=..., num_segments=...)` need over="segment", '
            f"got over={over!r}."
        )
    check_axes("flood_mean", losses, axis_name)
    counted = _counted(losses, where, weights, split=bool(axis_name))
    if over == "batch":
        check_scalar_level(level, call)
        mean = counted.sum() / _global_size(counted, axis_name)
        value, _ = flood_value(mean, jnp.asarray(level), shape, axis_name)
    elif over == "segment":
        ids, number = as_segments(segment_ids, num_segments, losses.shape)
        levels = broadcast_level(level, (number,), call, of="segments")
        value = _over_segments(counted, ids, levels, shape, axis_name)
    else:
        of = "losses"
        if over == "sequence":
            counted, of = _sequences(counted), "sequences"
        levels = broadcast_level(level, counted.losses.shape, call, of=of)
        value = _one_by_one(counted, levels, shape, axis_name)
    return value.astype(losses.dtype)


class _Counted(NamedTuple):
    """Losses, zero where masked, and what each counts: None is 1, as for no mask."""

    losses: jax.Array
    mask: jax.Array | None
    weights: jax.Array | None

    def sum(self, axis: int | None = None) -> jax.Array:
        return self.weighted().sum(axis)

    def weighted(self) -> jax.Array:
        return self.losses if self.weights is None else self.weights * self.losses

    def size(self, axis: int | None = None) -> jax.Array:
        """What all of them count."""
        counts = self.mask if self.weights is None else self.weights
        if counts is not None:
            return counts.sum(axis, dtype=self.losses.dtype)
        # no ones_like(losses).sum(): split as they are, it would be a collective more
        number = self.losses.size if axis is None else self.losses.shape[axis]
        return jnp.asarray(number, self.losses.dtype)


def _counted(
    losses: jax.Array,
    where: ArrayLike | None,
    given: ArrayLike | None,
    *,
    split: bool,
) -> _Counted:
    mask = as_mask("flood_mean", where, losses.shape, split=split)
    weights = as_weights(given, losses.shape, split=split)
    losses = wide(losses)
    mask = None if mask is None else split_like(mask, losses)
    if weights is not None:
        weights = split_like(lax.stop_gradient(weights.astype(losses.dtype)), losses)
        weights = _zero_outside(mask, weights)
        mask = weights != 0  # a NaN among the weights shows: their sum is NaN
    return _Counted(_zero_outside(mask, losses), mask, weights)


def _zero_outside(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if mask is None else jnp.where(mask, x, zeros_like(x))


def _global_size(counted: _Counted, axis_name: AxisName | None) -> jax.Array:
    """The mean over the devices of what each counts: divided by it, sums are shares."""
    size = counted.size()
    return size if counted.mask is None else global_mean(size, axis_name)


def _sequences(counted: _Counted) -> _Counted:
    """The mean of each sequence, which counts what its losses count."""
    call, rule = "flood_mean(losses)", 'have a last axis for over="sequence"'
    check_that(counted.losses.ndim, call, rule, "a scalar")
    sizes = counted.size(-1)
    if counted.mask is None:
        return _Counted(counted.sum(-1) / sizes, None, None)
    means = counted.sum(-1) / jnp.where(sizes != 0, sizes, jnp.ones_like(sizes))
    return _Counted(means, sizes != 0, sizes)


def _one_by_one(
    counted: _Counted, levels: jax.Array, shape: Shape, axis_name: AxisName | None
) -> jax.Array:
    bent, _ = flood_value(counted.losses, levels, shape)
    bent = counted._replace(losses=_zero_outside(counted.mask, bent))
    return shared_mean(bent.sum() / _global_size(bent, axis_name), axis_name)


def _over_segments(
    counted: _Counted,
    ids: jax.Array,
    levels: jax.Array,
    shape: Shape,
    axis_name: AxisName | None,
) -> jax.Array:
    totals = on_any_mesh(_segment_totals, counted.losses)
    sums, sizes, outside = totals(counted, ids, jnp.zeros_like(levels, jnp.int32))
    total = _global_size(counted, axis_name)
    sizes = global_mean(sizes, axis_name)
    means = sums / jnp.where(sizes > 0, sizes, jnp.ones_like(sizes))
    bent, _ = flood_value(means, levels, shape, axis_name)
    value = jnp.where(sizes > 0, sizes / total * bent, jnp.zeros_like(bent)).sum()
    return nan_where(outside | jnp.logical_not(total > 0), value)


def _segment_totals(
    counted: _Counted, ids: jax.Array, zeros: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum and the size of each segment; whether a loss that counts is in none."""
    number = zeros.shape[0]
    if ids.dtype.itemsize > 4:  # a number that does not fit would come round again
        ids = ids.clip(-1, number)
    ids = ids.astype(jnp.int32).ravel()
    one = jnp.ones(ids.shape, jnp.int32)
    ones = one if counted.mask is None else counted.mask.astype(jnp.int32).ravel()
    members = jax.ops.segment_sum(ones, ids, number)
    outside = members.sum() != ones.sum()
    values = counted.weighted().ravel()
    plain = jax.ops.segment_sum(values, ids, number)
    sizes = members.astype(values.dtype)
    symbolic = not isinstance(ids.size, int)  # pyright: ignore[reportUnnecessaryIsInstance]
    most = 2**31 - 1 if symbolic else ids.size
    if counted.weights is None:
        sums = segment_sums(values, ids, members, most)
    else:
        both = jnp.stack([values, counted.weights.ravel()], -1)
        sums, sizes = segment_sums(both, ids, members, most).T
    # The plain sums are for derivatives alone, which need no further places.
    return with_slope(plain, sums, jnp.ones_like(sums)), sizes, outside
