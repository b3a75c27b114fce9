"""RelaxLoss: flooding in even epochs, flattened predictions in odd ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flood_optax.bend import flood_value, nan_where, shared_mean
from flood_optax.checks import (
    as_integers,
    as_mask,
    as_real_array,
    check_number,
    check_scalar_level,
    check_that,
)
from flood_optax.devices import (
    AxisName,
    check_axes,
    global_mean,
    split_like,
    zeros_like,
)
from flood_optax.precision import wide
from flood_optax.shapes import reflect


def relax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    level: ArrayLike,
    *,
    epoch: ArrayLike,
    upper: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Floods in even epochs and flattens predictions in odd ones (RelaxLoss).

    With L the mean cross-entropy and b = ``level``:

    * even ``epoch``: :math:`|L - b| + b`, flooding;
    * odd ``epoch``, L > b: L;
    * odd ``epoch`` otherwise: :math:`\frac1n\sum_i (1 - c_i) H(t_i, p_i) - \ell_i`,
      ascent on the losses, and where a prediction is wrong (:math:`c_i = 0`) descent on
      the cross-entropy H with the flattened target :math:`t_i`: on the label
      min(:math:`p_i`, ``upper``), the rest spread evenly over the other classes.

    Loss distributions of training and unseen examples so come to overlap, against
    membership inference. No gradient flows into level and targets; NaN gives NaN.

    Args:
      logits: real floats [..., num_classes], two classes at least.
      labels: integers [...]; one that counts and is no class gives NaN.
      level: a scalar; -inf means off, in all epochs.
      epoch: an integer scalar, from 0; a traced one is fine.
      upper: in (0, 1], the largest probability that a target keeps on its label.
      where: boolean mask [...]; examples that are False count nowhere, with any label
        and logits, NaN included. If all are masked the result is NaN.
      axis_name: mapped axis or axes (shard_map, pmap) over which the batch is split.
        L and :math:`1/n` are then those of the whole batch, as in
        `flood_optax.flood_mean`: the gradient is this device's share, whose mean over
        devices is that of the whole.

    Returns:
      A scalar of the dtype of ``logits``.

    Examples:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]])  # L = 0.767
      >>> labels = jnp.array([0, 2])
      >>> print([f"{relax_loss(logits, labels, 1.0, epoch=e):.3f}" for e in (0, 1)])
      ['1.233', '-0.211']

    References:
      Chen, Yu and Fritz, RelaxLoss, ICLR 2022, https://arxiv.org/abs/2207.05801
    """
    logits = as_real_array(logits, "relax_loss(logits)")
    labels = as_integers("relax_loss(labels)", labels)
    epoch = as_integers("relax_loss(epoch)", epoch)
    fit = logits.ndim > 0 and logits.shape[:-1] == labels.shape and labels.size > 0
    fit = fit and logits.shape[-1] > 1 and epoch.shape == ()
    rule = "be of shapes [..., num_classes], two classes at least, [...] and ()"
    got = f"{logits.shape}, {labels.shape} and {epoch.shape}"
    check_that(fit, "relax_loss(logits, labels, epoch=...)", rule, got)
    check_scalar_level(level, "relax_loss(level=...)")
    check_number("relax_loss(upper=...)", upper, "in (0, 1]")
    check_axes("relax_loss", logits, axis_name)
    mask = as_mask("relax_loss", where, labels.shape, split=bool(axis_name))
    scores, number_of = wide(logits), jnp.asarray(labels.size, wide(logits).dtype)
    if mask is not None:
        number_of = global_mean(mask.sum(dtype=scores.dtype), axis_name)
        # before log_softmax, whose derivative would make a NaN of a NaN times 0
        entries = split_like(jnp.broadcast_to(mask[..., None], logits.shape), scores)
        scores = jnp.where(entries, scores, zeros_like(scores))

    def mean(x: jax.Array) -> jax.Array:
        if mask is not None:
            x = jnp.where(split_like(mask, x), x, zeros_like(x))
        return x.sum() / number_of

    losses, flat = _losses(scores, labels, upper)
    loss = mean(losses)
    even, _ = flood_value(loss, jnp.asarray(level), reflect(), axis_name)
    plain, flat = (shared_mean(share, axis_name) for share in (loss, mean(flat)))
    odd = jnp.where(plain > jnp.asarray(level, plain.dtype), plain, flat)
    value = jnp.where(epoch % 2 == 0, even, odd)
    return value.astype(logits.dtype)


def _losses(
    scores: jax.Array, labels: jax.Array, upper: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The cross-entropy of each example, and what odd epochs put in its place."""
    classes = scores.shape[-1]
    log_probs = jax.nn.log_softmax(scores)
    is_label = split_like(jax.nn.one_hot(labels, classes, dtype=bool), log_probs)
    losses = -jnp.where(is_label, log_probs, zeros_like(log_probs)).sum(-1)
    losses = nan_where(jnp.logical_not(is_label.any(-1)), losses)
    kept = lax.stop_gradient(jnp.minimum(jnp.exp(-losses), upper))[..., None]
    targets = jnp.where(is_label, kept, (1 - kept) / (classes - 1))
    wrong = log_probs.argmax(-1) != labels
    flat = jnp.where(wrong, -(targets * log_probs).sum(-1), zeros_like(losses))
    return losses, flat - losses
