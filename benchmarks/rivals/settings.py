"""The data, how it is trained, and every constant that the methods share.

The constants and the numbers to choose from (`methods.py`) were fixed on digits and
MNIST-5k with 20 % flips, before any other setting was run.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from benchmarks import networks, pixels
from benchmarks.choosing import settings as shared

Sets = shared.Sets
Drop = Callable[[jax.Array, int], jax.Array]  # (hidden units, which layer) -> the same


class Network(Protocol):
    """What is trained; `drop` is laid over its hidden units."""

    def init(self, key: jax.Array, x: jax.Array) -> Any: ...

    def logits(self, params: Any, x: jax.Array, drop: Drop = ...) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class MLP:
    """Two hidden layers."""

    classes: int
    widths: tuple[int, ...] = (200, 200)

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        return networks.MLP(self.widths, self.classes).init(key, x)

    def logits(
        self, params: Any, x: jax.Array, drop: Drop = networks.keep
    ) -> jax.Array:
        net: Any = networks.MLP(self.widths, self.classes)
        return net.apply(params, x, drop=drop)


class Size(NamedTuple):
    """How many examples there are, and how long a run is.

    Attributes:
      train, validation, test: how many examples; of the test set at most.
      batch: examples of a step.
      steps: of a run.
      seeds: runs of each method and number.
    """

    train: int
    validation: int
    test: int
    batch: int
    steps: int
    seeds: int = 5


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

FLIPS = (0.0, 0.2, 0.4)
SIZES = {
    "digits": Size(600, 300, 800, 60, 1500),
    "mnist-5k": Size(1000, 1000, 2000, 100, 1200),
    "fashion-mnist": Size(1000, 1000, 2000, 100, 1200),
    "breast_cancer": Size(150, 150, 269, 30, 900, seeds=10),
    "wine": Size(60, 60, 58, 12, 900, seeds=10),
}
TITLES = pixels.TITLES | {"breast_cancer": "breast cancer", "text": "text"}


def problem(name: str, directory: pathlib.Path | None = None) -> Problem:
    """The data and the network of a name.

    Raises:
      FileNotFoundError: if the files of the data are not there.
    """
    size, classes = SIZES[name], shared.CLASSES.get(name, 10)
    pool_x, pool_y = shared.load(name, directory)
    ends = size.train, size.train + size.validation
    total = ends[1] + size.test

    def draw(key: jax.Array, flips: jax.Array) -> Sets:
        keys = jax.random.split(key, 3)
        order = jax.random.permutation(keys[0], len(pool_x))[:total]
        x, y = jnp.asarray(pool_x)[order], jnp.asarray(pool_y)[order]
        first, second, third = (slice(0, ends[0]), slice(*ends), slice(ends[1], None))
        return Sets(
            (x[first], flip(keys[1], y[first], flips, classes)),
            (x[second], flip(keys[2], y[second], flips, classes)),
            (x[third], y[third]),
        )

    return Problem(name, size, classes, MLP(classes), draw)


def flip(key: jax.Array, labels: jax.Array, rate: jax.Array, classes: int) -> jax.Array:
    """Gives an exact share of the labels, which may be traced, another class."""
    which_key, shift_key = jax.random.split(key)
    rank = jax.random.permutation(which_key, labels.size).reshape(labels.shape)
    shift = jax.random.randint(shift_key, labels.shape, 1, classes)
    flipped = rank < jnp.round(rate * labels.size)
    return jnp.where(flipped, (labels + shift) % classes, labels)
