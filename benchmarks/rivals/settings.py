"""The problems' sizes, and every constant that the methods share.

All of it was written down before the first recorded run, and no number was tuned for
it: spaces are about the grids of the first study, defaults are the published ones. How
long a run takes to learn its labels by heart was looked at for plain training, on
digits, breast cancer, sinusoid and wine with 40 % wrong labels and another seed, and
so on MNIST-5k with convolutions and on text.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from benchmarks import pixels
from benchmarks.pools import Sets

Drop = Callable[[jax.Array, int], jax.Array]  # (hidden units, which layer) -> the same

SEED = 20  # of the quasi-random configurations
TRIES = 20  # configurations of each method
BUDGETS = (1, 2, 4, 8, 20)  # how many of them somebody tries


class Network(Protocol):
    """What is trained; `drop` is laid over its hidden units."""

    def init(self, key: jax.Array, x: jax.Array) -> Any: ...

    def logits(self, params: Any, x: jax.Array, drop: Drop = ...) -> jax.Array: ...


class Size(NamedTuple):
    """How many examples there are, and how long a run is.

    Attributes:
      train, validation, test: how many examples.
      batch: examples of a step.
      steps: of a run.
      flips: the shares of wrong labels.
      lanes: configurations that are trained side by side, by `jax.vmap`.
      seeds: draws of the data that the study asks for.
    """

    train: int
    validation: int
    test: int
    batch: int
    steps: int
    flips: tuple[float, ...] = (0.0, 0.2, 0.4)
    lanes: int = TRIES + 2
    seeds: int = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """Data and a network.

    Attributes:
      name: of the piece of the study.
      data: of the data set, which several pieces may share: the unit of statistics.
      pool: how many examples there are to draw from.
      size: of the sets and the runs.
      classes: how many.
      network: what is trained.
      draw: from a key and the share of labels to flip to the three sets.
      shift: by how many pixels a training image is moved at most.
    """

    name: str
    data: str
    pool: int
    size: Size
    classes: int
    network: Network
    draw: Callable[[jax.Array, jax.Array], Sets]
    shift: int = 0

    @property
    def is_text(self) -> bool:
        return self.name == "text"


@dataclasses.dataclass(frozen=True)
class Constants:
    """What all methods share.

    Attributes:
      average: decay of the averaged weights, a step.
      checks: of the validation set, in a run.
      folds, held_out: models that see a part of the training set, and for which share
        of the steps they are trained: for AdaFlood and confident learning.
      patience: checks without a new minimum after which Label Wave stops.
      probed: examples whose gradients the stop by evidence compares.
    """

    average: float = 0.99
    checks: int = 40
    folds: int = 5
    held_out: float = 0.2
    patience: int = 5
    probed: int = 100


SMOKE = Constants(checks=2, folds=2, probed=8)

TABLE = Size(60, 60, 58, 20, 600)
IMAGES = Size(1000, 500, 2000, 50, 1600)
CONVOLVED = Size(500, 250, 2000, 50, 800, flips=(0.2, 0.4), lanes=1, seeds=2)
SIZES = {
    "wine": TABLE,
    "iris": TABLE._replace(validation=30, test=60),
    "breast_cancer": TABLE._replace(train=150, validation=150, test=269, batch=30),
    "two_gaussians": TABLE._replace(train=100, validation=100, test=800),
    "sinusoid": TABLE._replace(train=100, validation=100, test=800, steps=900),
    "digits": Size(600, 300, 800, 50, 1200),
    "mnist-5k": IMAGES,
    "fashion-mnist": IMAGES,
    "mnist-5k-cnn": CONVOLVED,
    "mnist-5k-cnn-shifted": CONVOLVED,
    "fashion-mnist-cnn": CONVOLVED,
    "fashion-mnist-cnn-shifted": CONVOLVED,
    "text": Size(256, 64, 256, 16, 600, (0.0, 0.02, 0.1), lanes=1, seeds=5),
}
TITLES = pixels.TITLES | {
    "breast_cancer": "breast cancer",
    "two_gaussians": "two Gaussians",
    "mnist-5k-cnn": "MNIST-5k, convolved",
    "mnist-5k-cnn-shifted": "MNIST-5k, convolved and shifted",
    "fashion-mnist-cnn": "Fashion-MNIST, convolved",
    "fashion-mnist-cnn-shifted": "Fashion-MNIST, convolved and shifted",
}


def small(size: Size) -> Size:
    """For --smoke and tests: the same sets, two checks of a few steps."""
    return size._replace(steps=10, seeds=2)


def flip(key: jax.Array, labels: jax.Array, rate: jax.Array, classes: int) -> jax.Array:
    """Gives an exact share of the labels, which may be traced, another class."""
    which_key, shift_key = jax.random.split(key)
    rank = jax.random.permutation(which_key, labels.size).reshape(labels.shape)
    shift = jax.random.randint(shift_key, labels.shape, 1, classes)
    flipped = rank < jnp.round(rate * labels.size)
    return jnp.where(flipped, (labels + shift) % classes, labels)


OFF = -math.inf  # a level that does not flood
