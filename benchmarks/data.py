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
    """scikit-learn's 1797 digits of 64 pixels in [0, 1], mixed; test is what is left.

    Labels of the training and validation sets are flipped, those of the test are not.

    Raises:
      ValueError: if nothing is left to test on.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - the extra `bench`

    pixels, labels = cast(Callable[..., Any], load_digits)(return_X_y=True)
    x, y = np.asarray(pixels, np.float32) / 16, np.asarray(labels, np.int32)
    end = train + validation
    if end >= len(x):
        raise ValueError(
            f"train + validation must leave examples of the {len(x)}, got {end}."
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = x[order], y[order]
    return Split(
        x[:train],
        flip(rng, y[:train], noise, 10),
        x[train:end],
        flip(rng, y[train:end], noise, 10),
        x[end:],
        y[end:],
    )
