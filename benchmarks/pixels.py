"""Images, drawn anew for each key, with labels flipped at an exact rate."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data

CLASSES = 10
TITLES = {
    "mnist-5k": "MNIST-5k",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "digits": "digits",
}
WHOLE = {  # training, validation; test is what is left, or the official one
    "mnist-5k": (1000, 1000),
    "mnist": (48_000, 12_000),
    "fashion-mnist": (48_000, 12_000),
    "digits": (100, 50),  # for --smoke
}
Set = tuple[jax.Array, jax.Array]


class Images(NamedTuple):
    """Pixels as bytes; train and validation are drawn from the pool for each seed."""

    pool_x: np.ndarray
    pool_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    train_size: int


def load(
    name: str, directory: pathlib.Path | None, sizes: Mapping[str, tuple[int, int]]
) -> Images:
    """The images of a set; missing ones are an error that says how to get them."""
    train, validation = sizes[name]
    pool = train + validation
    if name == "digits":
        split = data.digits(train=pool)
    elif name == "mnist-5k":
        split = data.mnist_5k(train=pool)
    else:
        known = cast(Any, name)
        split = data.idx_split(known, train=pool, directory=directory)
    return Images(
        np.round(255 * split.train_x).astype(np.uint8),
        split.train_y,
        np.round(255 * split.test_x).astype(np.uint8),
        split.test_y,
        train,
    )


def draw(images: Images, noise: float, key: jax.Array) -> tuple[Set, Set, Set]:
    """Training, validation and test set; the labels of the test set are clean."""
    order_key, train_key, validation_key = jax.random.split(key, 3)
    order = jax.random.permutation(order_key, len(images.pool_x))
    x = jnp.asarray(images.pool_x)[order].astype(jnp.float32) / 255
    y = jnp.asarray(images.pool_y)[order]
    n = images.train_size
    test_x = jnp.asarray(images.test_x).astype(jnp.float32) / 255
    return (
        (x[:n], flip(train_key, y[:n], noise)),
        (x[n:], flip(validation_key, y[n:], noise)),
        (test_x, jnp.asarray(images.test_y)),
    )


def flip(key: jax.Array, labels: jax.Array, rate: float) -> jax.Array:
    """Gives an exact share of the labels another of the ten classes."""

    def chosen(size: int, count: int) -> tuple[jax.Array, jax.Array]:
        chosen_key, shift_key = jax.random.split(key)
        order = jax.random.permutation(chosen_key, size)
        return order[:count], jax.random.randint(shift_key, (count,), 1, CLASSES)

    return data.flip(labels, rate, CLASSES, chosen)
