"""What every training loop of the studies is made of."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

# As they are, but for their types: the carry of a loop is a tree of any kind.
scan = cast(Callable[..., Any], lax.scan)
cond = cast(Callable[..., Any], lax.cond)
grad = cast(Callable[..., Any], jax.grad)
value_and_grad = cast(Callable[..., Any], jax.value_and_grad)

Train = Callable[[jax.Array, jax.Array], dict[str, jax.Array]]  # (number, key)


def cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    """One loss for each example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def loss_and_accuracy(logits: Any, labels: jax.Array) -> jax.Array:
    """The mean loss and the accuracy, never flooded."""
    right = jnp.mean(logits.argmax(-1) == labels)
    return jnp.stack([cross_entropy(logits, labels).mean(), right])


def expected_calibration_error(
    logits: jax.Array, labels: jax.Array, bins: int
) -> jax.Array:
    """Sum over bins of confidence of |accuracy - confidence|, weighted by their size.

    The bins are (i/m, (i+1)/m]. Guo et al., On Calibration of Modern Neural Networks,
    ICML 2017, equation 3.
    """
    confidence = jax.nn.softmax(logits).max(-1)
    index = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = (logits.argmax(-1) == labels) - confidence
    return jnp.abs(jax.ops.segment_sum(gap, index, bins)).sum() / len(labels)


def batches(key: jax.Array, size: int, batch: int) -> jax.Array:
    """One epoch of indices below `size`, [steps, batch]; a rest is left out."""
    order = jax.random.permutation(key, size)
    return order[: size - size % batch].reshape(-1, batch)
