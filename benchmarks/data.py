"""Splits of a data set by a seed, and labels flipped at an exact rate."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np


class Split(NamedTuple):
    """Inputs are float32 [n, features], labels int32 [n]; flipped where noisy."""

    train_x: np.ndarray
    train_y: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def count(size: int, rate: float) -> int:
    """The whole number below the share of so many labels."""
    return math.floor(round(rate * size, 9))  # 0.29 * 100 is below 29


def flip(
    rng: np.random.Generator, labels: np.ndarray, rate: float, classes: int
) -> np.ndarray:
    """Gives exactly `count` of the labels [n] another class, each alike."""
    number = count(len(labels), rate)
    which = rng.choice(len(labels), number, replace=False)
    flipped = labels.copy()
    flipped[which] = (labels[which] + rng.integers(1, classes, number)) % classes
    return flipped


def digits(
    *, train: int, validation: int = 0, noise: float = 0.0, seed: int = 0
) -> Split:
    """scikit-learn's 1797 digits of 64 pixels in [0, 1]; test is what is left."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - the extra `bench`

    pixels, labels = cast(Callable[..., Any], load_digits)(return_X_y=True)
    x, y = np.asarray(pixels, np.float32) / 16, np.asarray(labels, np.int32)
    return shuffled_split(
        x, y, train=train, validation=validation, noise=noise, seed=seed
    )


def shuffled_split(
    x: np.ndarray,
    y: np.ndarray,
    *,
    train: int,
    validation: int,
    noise: float,
    seed: int,
) -> Split:
    """Shuffles, splits, and flips labels of the training and validation sets.

    The test labels stay clean.

    Raises:
      ValueError: if nothing is left to test on.
    """
    end, classes = train + validation, int(y.max()) + 1
    if end >= len(x):
        raise ValueError(
            f"train + validation must leave examples of the {len(x)}, got {end}."
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = x[order], y[order]
    return Split(
        x[:train],
        flip(rng, y[:train], noise, classes),
        x[train:end],
        flip(rng, y[train:end], noise, classes),
        x[end:],
        y[end:],
    )
