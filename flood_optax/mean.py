"""The mean of many losses, flooded over a partition of the batch."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flood_optax.bend import (
    AxisName,
    flood_share,
    global_mean,
    like,
    wide,
    with_slope,
)
from flood_optax.checks import (
    broadcast_level,
    check_level,
    check_scalar_level,
    loss_mask,
    loss_weights,
    one_of,
    real_array,
    segments,
)
from flood_optax.shape_rules import check_shape
from flood_optax.shapes import Shape, reflect


def flood_mean(
    losses: ArrayLike,
    level: ArrayLike,
    *,
    over: Literal["batch", "example", "segment"] = "batch",
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
      per class or per task; empty segments count nothing.

    These are different objectives: flooding examples or devices one by one bounds
    flooding the batch from above (Jensen). With ``weights`` every mean is a weighted
    one, and n and :math:`n_k` are sums of weights. At a tie a group descends. A NaN
    loss that counts gives NaN. Means are taken in float32 at least. No gradient flows
    into level, weights and the numbers of the shape.

    An example is an entry of ``losses``: for losses [B, T] of sequences,
    ``over="example"`` floods each token. To flood each sequence, make it a segment.

    Args:
      losses: real floats of any shape, one entry per example (and step, ...); those of
        8 or 4 bits are refused.
      level: a scalar for "batch"; broadcasts to ``losses`` for "example" (a level per
        sequence is ``level[:, None]``), to (num_segments,) for "segment". -inf means
        off.
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
        and segments of uneven size included.
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

      Sequences of unequal length, each flooded by itself and counted alike; without
      ``weights`` each counts as many times as it has tokens:

      >>> tokens = jnp.array([[0.05, 0.03, 0.7], [0.2, 0.3, 0.4]])
      >>> real = jnp.array([[True, True, False], [True, True, True]])
      >>> per_sequence = flood_mean(
      ...     tokens,
      ...     jnp.array([0.1, 0.1]),
      ...     over="segment",
      ...     segment_ids=jnp.broadcast_to(jnp.arange(2)[:, None], tokens.shape),
      ...     num_segments=2,
      ...     weights=real / real.sum(axis=1, keepdims=True),
      ... )
      >>> print(f"{per_sequence:.4f}")  # ((0.2 - 0.04) + 0.3) / 2
      0.2300

    References:
      Ishida et al., ICML 2020, section 3, https://arxiv.org/abs/2002.08709;
      Xie et al., iFlood, ICLR 2022; Bae et al., AdaFlood, TMLR 2024.
    """
    losses = real_array(losses, "flood_mean(losses)")
    check_level(level, "flood_mean(level=...)")
    check_shape(shape, "flood_mean(shape=...)")
    one_of("flood_mean(over=...)", over, ("batch", "example", "segment"))
    if over != "segment" and (segment_ids is not None or num_segments is not None):
        raise ValueError(
            '`flood_mean(segment_ids=..., num_segments=...)` need over="segment", '
            f"got over={over!r}."
        )
    split = axis_name is not None
    mask = loss_mask(where, losses.shape, split=split)
    weighed = loss_weights(weights, losses.shape, split=split)
    # not ones_like(losses), which would inherit their sharding: the number of the
    # losses would then be summed over the devices too
    counted = jnp.ones(losses.shape, bool) if mask is None else mask
    precise = wide(losses)
    counts = counted.astype(precise.dtype)
    if weighed is not None:
        weighed = lax.stop_gradient(weighed.astype(precise.dtype))
        counts = jnp.where(counted, weighed, jnp.zeros_like(counts))
        counted = counts != 0  # a NaN among the weights counts, and shows
    if mask is not None or weighed is not None:
        precise = jnp.where(counted, precise, jnp.zeros_like(precise))
    mean_of = functools.partial(_share, axis_name=axis_name)

    def weigh(x: jax.Array) -> jax.Array:
        return x if weighed is None else counts * x

    if over == "batch":
        check_scalar_level(level, "flood_mean(level=...)")
        mean = mean_of(weigh(precise).sum(), counts.sum())
        value, _ = flood_share(mean, jnp.asarray(level), shape, axis_name)
    elif over == "example":
        levels = broadcast_level(level, losses.shape, "flood_mean(level=...)")
        bent, _ = flood_share(precise, levels, shape)
        bent = jnp.where(counted, weigh(bent), 0 * counts)
        mean = mean_of(bent.sum(), counts.sum())
        value = like(global_mean(mean, axis_name), mean)
        value = with_slope(mean, value, jnp.ones_like(mean))
    else:
        ids, number = segments(segment_ids, num_segments, losses.shape)
        levels = broadcast_level(level, (number,), "flood_mean(level=...)")
        sums = jax.ops.segment_sum(weigh(precise).ravel(), ids.ravel(), number)
        sizes = jax.ops.segment_sum(counts.ravel(), ids.ravel(), number)
        total = global_mean(counts.sum(), axis_name)
        sizes = global_mean(sizes, axis_name)
        means = sums / jnp.where(sizes > 0, sizes, jnp.ones_like(sizes))
        bent, _ = flood_share(means, levels, shape, axis_name)
        value = jnp.where(sizes > 0, sizes / total * bent, jnp.zeros_like(bent)).sum()
        lost = jnp.any(counted & ((ids < 0) | (ids >= number)))
        valid = jnp.where((total > 0) & jnp.logical_not(lost), jnp.ones_like(value), 0)
        value = value * (valid / valid)  # NaN, without a NaN in a branch not taken
    return value.astype(losses.dtype)


def _share(total: jax.Array, count: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """This device's share of the mean: the mean of the shares is the global mean."""
    return total / global_mean(count, axis_name)
