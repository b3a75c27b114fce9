"""Wrong labels of four kinds: none, even, by class, and by a weak teacher."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import data, pools
from benchmarks.pools import Sets
from flood_optax import levels

RIDGE = 1.0  # of the teacher
TEACHERS = {  # examples that each has learned from: the fewer, the weaker it is
    "digits": (20, 40, 80),
    "mnist-5k": (40, 100, 300),
    "wine": (4, 6, 15),
    "breast_cancer": (4, 12, 40),
}
SIZES = {  # training, validation, test; what is left teaches
    "digits": (300, 300, 1000),
    "mnist-5k": (500, 500, 1000),
    "wine": (50, 50, 60),
    "breast_cancer": (150, 150, 200),
}


@dataclasses.dataclass(frozen=True)
class Noise:
    """How labels come to be wrong.

    Attributes:
      kind: "even" moves a share of the labels to any other class, "class" a share of
        each class to the next, from 0 for the first to twice the mean for the last;
        "teacher" takes all labels from a linear model of few examples.
      rate: the share, in the mean over the classes; of a teacher it is not given.
      taught: the examples of the teacher.
    """

    kind: str
    rate: float = 0.0
    taught: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.taught or f'{self.rate:g}'}"


class Drawn(NamedTuple):
    """The sets of a key, their labels noisy but in the test, and the wrong share."""

    sets: Sets
    wrong: jax.Array


def rates(noise: Noise, number: int) -> np.ndarray:
    """The share of each class that moves to the next, [classes]."""
    return np.linspace(0, 2 * noise.rate, number)


def by_class(key: jax.Array, labels: jax.Array, noise: Noise, number: int) -> jax.Array:
    """Each label moves to the next class with the probability of its own."""
    moves = (
        jax.random.uniform(key, labels.shape)
        < jnp.asarray(rates(noise, number))[labels]
    )
    return jnp.where(moves, (labels + 1) % number, labels)


def taught(x: jax.Array, y: jax.Array, number: int) -> Callable[[jax.Array], jax.Array]:
    """The classes that ridge regression on one-hot labels gives."""

    def with_one(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.ones((len(x), 1))], 1)

    own = with_one(x)
    gram = own.T @ own + RIDGE * jnp.eye(own.shape[1])
    weights = jnp.linalg.solve(gram, own.T @ jax.nn.one_hot(y, number))
    return lambda x: (with_one(x) @ weights).argmax(1).astype(y.dtype)


def drawing(name: str, noise: Noise) -> Callable[[jax.Array], Drawn]:
    """From a key to sets that share no example, also not with the teacher's."""
    number = pools.CLASSES.get(name, 10)
    pool_x, pool_y = (jnp.asarray(part) for part in pools.load(name))
    ends = np.cumsum(SIZES[name])
    if len(pool_x) < ends[2] + noise.taught:
        raise ValueError(f"{name} has no {noise.taught} examples left for a teacher.")

    def drawn(key: jax.Array) -> Drawn:
        keys = jax.random.split(key, 3)
        order = jax.random.permutation(keys[0], len(pool_x))
        x, y = pool_x[order], pool_y[order]
        teaching = slice(ends[2], ends[2] + noise.taught)

        def given(key: jax.Array, part: slice) -> jax.Array:
            if noise.kind == "teacher":
                return taught(x[teaching], y[teaching], number)(x[part])
            if noise.kind == "class":
                return by_class(key, y[part], noise, number)
            return data.flip(key, y[part], noise.rate, number)

        train, validation = slice(ends[0]), slice(ends[0], ends[1])
        labels = given(keys[1], train)
        return Drawn(
            Sets(
                (x[train], labels),
                (x[validation], given(keys[2], validation)),
                (x[ends[1] : ends[2]], y[ends[1] : ends[2]]),
            ),
            (labels != y[train]).mean(),
        )

    return drawn


def known_level(noise: Noise, wrong: float, labels: Any, number: int) -> float:
    """`noise_floor` of what a user would know: the matrix by class, or the share."""
    if noise.kind == "class":
        moved = rates(noise, number)
        matrix = np.diag(1 - moved) + np.roll(np.eye(number), 1, 1) * moved[:, None]
        share = np.bincount(labels, minlength=number) / len(labels)
        return float(levels.noise_floor(matrix, label_frequencies=share))
    return float(levels.noise_floor(min(wrong, 1 - 1 / number), number))


def title(noise: Noise) -> str:
    """As a table writes it."""
    if noise.kind == "teacher":
        return f"a teacher of {noise.taught}"
    words = {"even": "", "class": " by class"}[noise.kind]
    return f"{noise.rate:.0%}{words}" if noise.rate else "none"


def overlap(name: str) -> float:
    """Examples tested over those that are not, as `statistics.corrected` asks."""
    size, tested = len(pools.load(name)[1]), SIZES[name][2]
    return tested / (size - tested)
