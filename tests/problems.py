"""A linear regression whose micro-batches differ much, and its training in NumPy."""

import jax.numpy as jnp
import numpy as np

from tests import oracles

FEATURES = 3


def micro_batches(number, seed, *, rows, spread):
    """Micro-batches of so many rows; their noise differs by up to `spread`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(number, rows, FEATURES))
    noise = rng.normal(size=(number, rows)) * rng.uniform(0, spread, size=(number, 1))
    y = x @ np.array([1.0, -2.0, 0.5]) + noise
    return x.astype(np.float32), y.astype(np.float32)


def parameters():
    return {"w": jnp.array([0.3, -0.4, 0.9]), "b": jnp.float32(0.2)}


def trained(x, y, windows, *, rate, level):
    """Flooded SGD in float64: the loss of each window and the parameters after it.

    Args:
        x: Of shape [..., FEATURES].
        y: Of shape [...].
        windows: The rows of each large batch; one without rows counts nowhere.
        rate: The learning rate.
        level: The level of every window.
    """
    x, y = x.reshape(-1, FEATURES).astype(np.float64), y.ravel().astype(np.float64)
    params = {name: np.asarray(p, np.float64) for name, p in parameters().items()}
    seen = []
    for rows in windows:
        if len(rows):
            r = x[rows] @ params["w"] + params["b"] - y[rows]
            loss = np.mean(r**2)
            step = rate * oracles.bend(loss, level)[1] * 2
            w = params["w"] - step * np.mean(r[:, None] * x[rows], 0)
            params = {"w": w, "b": params["b"] - step * np.mean(r)}
            seen.append((loss, params))
    return seen
