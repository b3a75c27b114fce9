"""The networks whose steps are timed."""

from typing import Any

import flax.linen as nn
import jax


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
