"""The settings, what all runs share, and every constant of the rules, in one place.

The constants were fixed on the settings with `development=True` before the others were
run, and no setting was left out after it was run.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import data, pixels, points, pools
from benchmarks.pools import Sets


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data, flips, and how it is trained; `batch` None is all training examples."""

    data: str
    flips: float
    optimizer: str = "adam"
    batch: int | None = None
    pair: bool = False
    development: bool = False

    @property
    def name(self) -> str:
        kind = "pair" if self.pair else "even"
        batch = "full" if self.batch is None else f"batch{self.batch}"
        return f"{self.data}-{self.flips:g}-{kind}-{batch}-{self.optimizer}"


@dataclasses.dataclass(frozen=True)
class Constants:
    """Of the training and of the rules."""

    widths: tuple[int, ...] = (100, 100)
    adam: float = 2e-3
    sgd: float = 0.1
    momentum: float = 0.9
    steps: int = 360
    every: int = 6  # steps between two checks: an epoch, where the batch is a sixth
    grid: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7)  # x log c
    window: int = 3  # checks that `at_best` averages over
    wave: int = 3  # checks that Label Wave averages over
    halving: tuple[float, ...] = (0.25, 0.5, 0.75)  # where the worse half is dropped
    decays: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    smoothing: tuple[float, ...] = (0.1, 0.2, 0.4)
    average: float = 0.98  # of the weights, a step
    folds: int = 5
    held_out: float = 0.2  # of the steps, for a model of a fold
    gamma: float = 0.4  # of AdaFlood
    threshold: float = 0.0  # of the accordance
    patience: int = 3  # of the plateau, in checks
    rise: float = 0.05  # of the plateau, x log c
    ece_bins: int = 15


SMOKE = Constants(
    widths=(8,), steps=12, every=2, grid=(0.2, 0.5), decays=(1e-2,), smoothing=(0.2,)
)

SIZES = {  # training, validation, test at most
    "two_gaussians": (200, 200, 1000),
    "spiral": (200, 200, 1000),
    "sinusoid": (100, 100, 1000),
    "digits": (300, 300, 1000),
    "breast_cancer": (150, 150, 1000),
    "wine": (60, 60, 1000),
    "mnist-5k": (500, 500, 1000),
    "fashion-mnist": (500, 500, 1000),
}


def cell(problem: str, flips: float) -> Setting:
    return Setting(problem, flips, development=True)


# By priority: a run that is cut holds the first of them. Those of the same shapes stand
# together, so that they share their programs.
SETTINGS = (
    Setting("digits", 0.2),
    Setting("digits", 0.1, development=True),
    Setting("digits", 0.2, "sgd", 50),
    Setting("digits", 0.2, "adam", 50),
    Setting("digits", 0.2, "adam", 50, pair=True),
    Setting("mnist-5k", 0.2, "adam", 100),
    Setting("breast_cancer", 0.2),
    Setting("wine", 0.2),
    cell("two_gaussians", 0.1),
    cell("spiral", 0.1),
    cell("sinusoid", 0.1),
    Setting("mnist-5k", 0.4, "sgd", 100),
    Setting("digits", 0.4),
    Setting("digits", 0.0, development=True),
    Setting("digits", 0.3, development=True),
    Setting("breast_cancer", 0.1, "sgd", 30),
    Setting("wine", 0.4, "sgd", 10),
    Setting("fashion-mnist", 0.2, "adam", 100),
    Setting("mnist-5k", 0.1, "adam", 100, pair=True),
    cell("two_gaussians", 0.05),
    cell("spiral", 0.05),
    cell("sinusoid", 0.05),
    Setting("breast_cancer", 0.0),
    Setting("mnist-5k", 0.0, "sgd", 100),
    Setting("fashion-mnist", 0.0, "sgd", 100),
    Setting("breast_cancer", 0.4, "sgd", 30),
    Setting("wine", 0.0, "sgd", 10),
    Setting("digits", 0.2, "sgd"),
    cell("two_gaussians", 0.01),
    cell("spiral", 0.01),
    cell("sinusoid", 0.01),
)


Draw = Callable[[jax.Array], Sets]  # from a key


def classes(setting: Setting) -> int:
    return pools.CLASSES.get(setting.data, 10)


def flip(key: jax.Array, labels: jax.Array, setting: Setting) -> jax.Array:
    """Flips an exact share: evenly to the other classes, or each to the next one."""
    number = classes(setting)

    def chosen(size: int, count: int) -> tuple[jax.Array, Any]:
        chosen_key, shift_key = jax.random.split(key)
        which = jax.random.permutation(chosen_key, size)[:count]
        if setting.pair:
            return which, 1
        return which, jax.random.randint(shift_key, (count,), 1, number)

    return data.flip(labels, setting.flips, number, chosen)


def drawing(setting: Setting, directory: pathlib.Path | None = None) -> Draw:
    """Sets for each key: new points, or new draws of a data set, and new flips."""
    sizes = SIZES[setting.data]
    if setting.data in points.GENERATORS:
        make = points.GENERATORS[setting.data]
        each = 1 if setting.data == "sinusoid" else 2  # what they call n

        def fresh(key: jax.Array) -> Sets:
            keys = jax.random.split(key, 5)
            made = [make(k, n // each) for k, n in zip(keys[:3], sizes, strict=True)]
            (x, y), (other_x, other_y), test = made
            return Sets(
                (x, flip(keys[3], y, setting)),
                (other_x, flip(keys[4], other_y, setting)),
                test,
            )

        return jax.jit(fresh)

    pool_x, pool_y = pools.load(setting.data, directory)
    train, validation, test = sizes
    ends = train, train + validation, train + validation + test

    def drawn(key: jax.Array) -> Sets:
        keys = jax.random.split(key, 3)
        order = jax.random.permutation(keys[0], len(pool_x))[: ends[2]]
        x, y = jnp.asarray(pool_x)[order], jnp.asarray(pool_y)[order]
        return Sets(
            (x[: ends[0]], flip(keys[1], y[: ends[0]], setting)),
            (x[ends[0] : ends[1]], flip(keys[2], y[ends[0] : ends[1]], setting)),
            (x[ends[1] :], y[ends[1] :]),
        )

    return jax.jit(drawn)


def title(setting: Setting) -> str:
    """As the tables write it."""
    known = pixels.TITLES | {
        "two_gaussians": "two Gaussians",
        "breast_cancer": "breast cancer",
    }
    return known.get(setting.data, setting.data)
