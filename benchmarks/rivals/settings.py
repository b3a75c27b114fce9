"""The data, how it is trained, and every constant that the methods share.

The constants and the numbers to choose from (`methods.py`) were fixed on digits and
MNIST-5k with 20 % flips; those of weight decay once these two had run at all shares of
flips, and before any other data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from benchmarks import pixels
from benchmarks.pools import Sets

Drop = Callable[[jax.Array, int], jax.Array]  # (hidden units, which layer) -> the same


class Network(Protocol):
    """What is trained; `drop` is laid over its hidden units."""

    def init(self, key: jax.Array, x: jax.Array) -> Any: ...

    def logits(self, params: Any, x: jax.Array, drop: Drop = ...) -> jax.Array: ...


class Size(NamedTuple):
    """How many examples there are, and how long a run is.

    Attributes:
      train, validation, test: how many examples; of the test set at most.
      batch: examples of a step.
      steps: of a run.
      seeds: runs of each method and number.
      flips: the shares of wrong labels.
    """

    train: int
    validation: int
    test: int
    batch: int
    steps: int
    seeds: int = 5
    flips: tuple[float, ...] = (0.0, 0.2, 0.4)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data and a network: `draw` takes a key and the share of the labels to flip."""

    name: str
    size: Size
    classes: int
    network: Network
    draw: Callable[[jax.Array, jax.Array], Sets]

    @property
    def is_text(self) -> bool:
        return self.name == "text"


@dataclasses.dataclass(frozen=True)
class Constants:
    """What all methods share."""

    rate: float = 1e-3  # of Adam, where a method has a number of its own to choose
    average: float = 0.995  # of the weights, a step
    band: float = 0.2  # x the level
    checks: int = 50  # of the validation set, in a run
    folds: int = 5  # of AdaFlood
    held_out: float = 0.2  # of the steps, for a model of a fold
    bins: int = 15  # of the calibration error


SMOKE = Constants(checks=2, folds=2)

SIZES = {
    "digits": Size(600, 300, 800, 60, 1500),
    "mnist-5k": Size(1000, 1000, 2000, 100, 1200),
    "fashion-mnist": Size(1000, 1000, 2000, 100, 1200),
    "breast_cancer": Size(150, 150, 269, 30, 900, seeds=10),
    "wine": Size(60, 60, 58, 12, 900, seeds=10),
    "text": Size(512, 128, 256, 16, 800, seeds=3, flips=(0.0,)),  # sequences
}
TITLES = pixels.TITLES | {"breast_cancer": "breast cancer", "text": "text"}


def flip(key: jax.Array, labels: jax.Array, rate: jax.Array, classes: int) -> jax.Array:
    """Gives an exact share of the labels, which may be traced, another class."""
    which_key, shift_key = jax.random.split(key)
    rank = jax.random.permutation(which_key, labels.size).reshape(labels.shape)
    shift = jax.random.randint(shift_key, labels.shape, 1, classes)
    flipped = rank < jnp.round(rate * labels.size)
    return jnp.where(flipped, (labels + shift) % classes, labels)
