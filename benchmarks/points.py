"""The paper's synthetic problems: points, exact shares of flips, the truth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import data


class Set(NamedTuple):
    """Inputs [n, features], labels as given to the learner, and the true ones."""

    x: jax.Array
    noisy: jax.Array
    clean: jax.Array


def two_gaussians(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Ten dimensions: n points each of N(0, I) and N(1, I)."""
    labels = jnp.repeat(jnp.arange(2), n)
    return jax.random.normal(key, (2 * n, 10)) + labels[:, None], labels


def spiral(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """Two arms of two turns, n points each, without noise: the same in every draw."""
    del key
    t = jnp.linspace(0, 4 * jnp.pi, n)
    arm = jnp.stack([jnp.cos(t), jnp.sin(t)], 1)
    x = jnp.concatenate([t[:, None] * arm, (t[:, None] + jnp.pi) * arm])
    return x, jnp.repeat(jnp.arange(2), n)


def sinusoid(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The disc of radius 2, n points, labelled by the side of a sine wave."""
    normal = jax.random.normal(key, (n, 4))
    x = 2 * normal[:, :2] / jnp.sqrt((normal**2).sum(1, keepdims=True))
    return x, (1.5 * x[:, 0] + jnp.sin(1.5 * x[:, 1]) > 0).astype(jnp.int32)


GENERATORS = {"two_gaussians": two_gaussians, "spiral": spiral, "sinusoid": sinusoid}


def flip(key: jax.Array, labels: jax.Array, rate: float) -> jax.Array:
    """Flips an exact share of binary labels: there is one other class to go to."""

    def chosen(size: int, count: int) -> tuple[jax.Array, int]:
        return jax.random.permutation(key, size)[:count], 1

    return data.flip(labels, rate, 2, chosen)


def draw(key: jax.Array, problem: str, noise: float, points: int) -> Set:
    points_key, flip_key = jax.random.split(key)
    x, clean = GENERATORS[problem](points_key, points)
    return Set(x, flip(flip_key, clean, noise), clean)
