"""Levels from the targets themselves, and from a slowly moving copy of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.checks import as_real_array, broadcast_level, check_that, must
from flood_optax.precision import wide


def wavebound(target_loss: ArrayLike, epsilon: ArrayLike) -> jax.Array:
    r"""Returns levels a little below the loss of a slowly moving target model.

    :math:`b = L(\tau) - \epsilon` with :math:`L(\tau)` = ``target_loss`` on the same
    mini-batch, :math:`\tau` a moving average of the parameters
    (`optax.incremental_update`). No gradient flows into it. Where the models agree the
    loss is :math:`\epsilon` above its level and descends. In the paper the losses are
    [steps, features], each a mean over the batch, and the objective is
    ``flood_loss(losses, wavebound(target_losses, epsilon)).mean()``.

    Args:
      target_loss: real floats of any shape, that of the loss to flood.
      epsilon: finite and non-negative; a scalar, or broadcasts to ``target_loss``.

    Returns:
      Levels of the shape and dtype of ``target_loss``.

    Examples:
      >>> print(wavebound(jnp.array([0.5, 0.25]), epsilon=0.125))
      [0.375 0.125]

    References:
      Cho et al., WaveBound, NeurIPS 2022, https://arxiv.org/abs/2210.14303
    """
    loss = as_real_array(target_loss, "wavebound(target_loss)")
    gap = broadcast_level(epsilon, loss.shape, "wavebound(epsilon=...)")
    fits = isinstance(gap, Tracer) or (jnp.isfinite(gap) & (gap >= 0)).all()
    rule = "be non-negative and finite"
    check_that(fits, "wavebound(epsilon=...)", rule, epsilon)
    return jax.lax.stop_gradient(loss - gap.astype(loss.dtype))


def entropy_floor(target_probs: ArrayLike) -> jax.Array:
    r"""Returns the smallest cross-entropy that soft targets leave reachable.

    :math:`\min_q -\sum_c p_c \log q_c = -\sum_c p_c \log p_c` with p =
    ``target_probs``: the entropy of the targets, 0 for a one-hot row. Under label
    smoothing or mixup no loss lies below it, and a constant level below it never acts:
    give levels relative to it, ``flood_mean(losses, entropy_floor(p) + b,
    over="example")``, or ``entropy_floor(p).mean() + b`` for the batch.

    Args:
      target_probs: real floats [..., num_classes]; rows non-negative, with sum 1.

    Returns:
      The floor of each example, [...], float32 at least. No gradient flows into it.

    Examples:
      >>> floor = entropy_floor(jnp.array([[0.0, 1.0], [0.1, 0.9]]))
      >>> print([f"{nats:.4f}" for nats in floor])
      ['0.0000', '0.3251']
    """
    return entropies(probabilities(target_probs, "entropy_floor(target_probs)"))


def entropies(probs: jax.Array) -> jax.Array:
    """The entropy of each row of checked probabilities."""
    # The second term, 0 for a sum of 1, is what rounded targets add to the minimum.
    return _plogp(probs.sum(-1)) - _plogp(probs).sum(-1)


def _plogp(p: jax.Array) -> jax.Array:
    # 0 log 0 = 0, without the infinite log that `jax.debug_nans` stops at
    return p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


def probabilities(given: ArrayLike, call: str) -> jax.Array:
    """Rows of probabilities, float32 at least, into which no gradient flows."""
    probs = as_real_array(given, call)
    fits, got = probs.shape[-1:] not in ((), (0,)), f"shape {probs.shape}"
    check_that(fits, call, "have an axis of classes", got)
    tolerance = float(jnp.finfo(probs.dtype).eps) ** 0.5
    probs = jax.lax.stop_gradient(wide(probs))
    total = jnp.asarray(probs.sum(-1))
    valid = (probs >= 0).all() & (abs(total - 1) <= tolerance).all()
    if not isinstance(valid, Tracer) and not valid:
        sums = f"sums from {total.min()} to {total.max()}"
        got = f"numbers from {probs.min()} and {sums}"
        raise ValueError(must(call, "be rows of probabilities", got))
    return probs
