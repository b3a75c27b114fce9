"""The networks of the paper's experiments, and those whose steps are timed."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer


def uniform(fan_in: int) -> Initializer:
    """PyTorch's default for linear layers, weight and bias: U(-1, 1) / sqrt(fan_in)."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: object = None) -> jax.Array:
        del dtype
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return init


def keep(hidden: jax.Array, layer: int) -> jax.Array:
    """No dropout."""
    del layer
    return hidden


class MLP(nn.Module):
    """Hidden layers of ReLU units; `drop` is laid over the units of each."""

    widths: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        drop: Callable[[jax.Array, int], jax.Array] = keep,
    ) -> jax.Array:
        for layer, width in enumerate(self.widths):
            init = uniform(x.shape[-1])
            dense = nn.Dense(width, kernel_init=init, bias_init=init)
            x = drop(nn.relu(dense(x)), layer)
        init = uniform(x.shape[-1])
        return nn.Dense(self.num_classes, kernel_init=init, bias_init=init)(x)


class Wide(nn.Module):
    """Two hidden layers of 512 units."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Two convolutions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Transformer(nn.Module):
    """Two blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(64)(x.reshape(len(x), -1, 28))  # a row of the image is a token
        for _ in range(2):
            attention: Any = nn.MultiHeadDotProductAttention(num_heads=4)
            x += attention(nn.LayerNorm()(x))
            x += nn.Dense(64)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(10)(x.mean(1))


TIMED: dict[str, tuple[nn.Module, int]] = {  # and the batch size
    "mlp": (Wide(), 256),
    "cnn": (CNN(), 64),
    "transformer": (Transformer(), 32),
}
