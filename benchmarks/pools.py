"""Small data sets whole, of which a study draws its sets by a key."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from benchmarks import data

CLASSES = {
    "two_gaussians": 2,
    "spiral": 2,
    "sinusoid": 2,
    "breast_cancer": 2,
    "wine": 3,
}
POOL = 5000  # of the images of Fashion-MNIST


class Sets(NamedTuple):
    """Inputs [n, features]; the labels of the test set are the true ones."""

    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load(name: str, directory: pathlib.Path | None) -> tuple[np.ndarray, np.ndarray]:
    """All examples of a set; images of 28 x 28 pixels become 14 x 14 means."""
    if name in ("wine", "breast_cancer"):
        from sklearn import datasets  # noqa: PLC0415 - the extra `bench`

        make = cast(Callable[..., Any], getattr(datasets, f"load_{name}"))
        x, y = make(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        return np.asarray(x, np.float32), np.asarray(y, np.int32)
    if name == "digits":
        split = data.digits(train=1)
    elif name == "mnist-5k":
        split = data.mnist_5k(train=1)
    else:
        split = data.idx_split("fashion-mnist", train=POOL, directory=directory)
        split = split._replace(test_x=split.test_x[:0], test_y=split.test_y[:0])
    x = np.concatenate([split.train_x, split.test_x])
    y = np.concatenate([split.train_y, split.test_y])
    if x.shape[1] == 784:
        x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)
    return x, y
