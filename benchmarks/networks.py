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


class BatchNorm(nn.Module):
    """PyTorch's batch normalisation: its running variance is the unbiased one."""

    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width = x.shape[-1:]
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = self.param("scale", ones, width)
        shift = self.param("shift", zeros, width)
        running_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(width))
        running_var = self.variable("batch_stats", "var", lambda: jnp.ones(width))
        if train:
            mean, var = x.mean(0), x.var(0)
            if not self.is_initializing():
                unbiased = var * len(x) / (len(x) - 1)
                new, old = self.momentum, 1 - self.momentum
                running_mean.value = old * running_mean.value + new * mean
                running_var.value = old * running_var.value + new * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        return (x - mean) * (scale * jax.lax.rsqrt(var + self.epsilon)) + shift


def keep(hidden: jax.Array, layer: int) -> jax.Array:
    """No dropout."""
    del layer
    return hidden


class MLP(nn.Module):
    """Hidden layers of ReLU units, with or without batch normalisation before each.

    `drop` is laid over the units of each hidden layer.
    """

    widths: tuple[int, ...]
    num_classes: int
    batch_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool = False,
        drop: Callable[[jax.Array, int], jax.Array] = keep,
    ) -> jax.Array:
        for layer, width in enumerate(self.widths):
            init = uniform(x.shape[-1])
            dense = nn.Dense(
                width, not self.batch_norm, kernel_init=init, bias_init=init
            )
            x = dense(x)
            if self.batch_norm:
                x = BatchNorm()(x, train=train)
            x = drop(nn.relu(x), layer)
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
