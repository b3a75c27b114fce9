"""What the training loops of the benchmarks share."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

# As it is, but for its type.
value_and_grad = cast(Callable[..., Any], jax.value_and_grad)


def cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
    """One loss for each example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def loss_and_accuracy(logits: Any, labels: jax.Array) -> jax.Array:
    """The mean loss and the accuracy, never flooded."""
    right = jnp.mean(logits.argmax(-1) == labels)
    return jnp.stack([cross_entropy(logits, labels).mean(), right])
