"""The problems: data to draw from a key, and the network that is trained on them."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import networks, pools
from benchmarks.pools import Sets
from benchmarks.rivals import text
from benchmarks.rivals.settings import SIZES, Drop, Problem, flip


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


def problem(name: str, directory: pathlib.Path | None = None) -> Problem:
    """The data and the network of a name.

    Raises:
      FileNotFoundError: if the files of the data are not there.
    """
    if name == "text":
        return Problem(name, SIZES[name], text.CLASSES, text.Transformer(), text.draw)
    size, classes = SIZES[name], pools.CLASSES.get(name, 10)
    pool_x, pool_y = pools.load(name, directory)
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
