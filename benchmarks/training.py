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


def batches(key: jax.Array, size: int, batch: int) -> jax.Array:
    """One epoch of indices below `size`, [steps, batch]; a rest is left out."""
    order = jax.random.permutation(key, size)
    return order[: size - size % batch].reshape(-1, batch)


def order(key: jax.Array, size: int, batch: int, steps: int) -> jax.Array:
    """The batches of as many epochs as the steps need, [steps, batch]."""
    keys = jax.random.split(key, -(-steps // (size // batch)))
    made = jax.vmap(lambda k: batches(k, size, batch))(keys)
    return made.reshape(-1, batch)[:steps]
