"""The small net on which the drift is measured, and its batches."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

# A tanh net on 64 points, in 8 batches; no rule is told which is which.
EXAMPLES, BATCHES, INPUTS, HIDDEN, SEED = 64, 8, 4, 3, 1

Loss = Callable[..., jax.Array]


def gradient_of(loss_fn: Loss) -> Loss:
    """`jax.grad`, typed."""
    return cast(Loss, jax.grad(loss_fn))


def norm(v: jax.Array) -> float:
    """The Euclidean norm."""
    return float(jnp.sqrt(v @ v))


def net() -> tuple[Loss, jax.Array]:
    """The mean loss of a batch (None: all), and random parameters, in float64."""
    rng = np.random.default_rng(SEED)
    x = jnp.asarray(rng.normal(size=(EXAMPLES, INPUTS)))
    noise = 0.3 * jnp.asarray(rng.normal(size=EXAMPLES))
    y = jnp.sin(x @ jnp.array([1.0, -1.0, 0.5, 0.0])) + noise
    params = 0.7 * jnp.asarray(rng.normal(size=(INPUTS + 1) * HIDDEN))
    xs, ys = x.reshape(BATCHES, -1, INPUTS), y.reshape(BATCHES, -1)

    def loss_fn(w: jax.Array, batch: jax.Array | None = None) -> jax.Array:
        x_batch, y_batch = (x, y) if batch is None else (xs[batch], ys[batch])
        first, second = w[:-HIDDEN].reshape(INPUTS, HIDDEN), w[-HIDDEN:]
        return jnp.mean((jnp.tanh(x_batch @ first) @ second - y_batch) ** 2) / 2

    return loss_fn, params
