"""The paper's synthetic problems: points, and the truth."""

import jax
import jax.numpy as jnp


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
