"""The problems: data to draw from a key, and the network that is trained on them."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, points, pools
from benchmarks.pools import Sets
from benchmarks.rivals import text
from benchmarks.rivals.settings import SIZES, Drop, Problem, Size, flip

SIDE = 14  # of an image
POINTS = 4000  # of a made-up problem, or of each of its classes, to draw from


@dataclasses.dataclass(frozen=True)
class MLP:
    """Two hidden layers."""

    classes: int
    widths: tuple[int, ...] = (64, 64)

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        return networks.MLP(self.widths, self.classes).init(key, x)

    def logits(
        self, params: Any, x: jax.Array, drop: Drop = networks.keep
    ) -> jax.Array:
        net: Any = networks.MLP(self.widths, self.classes)
        return net.apply(params, x, drop=drop)


@dataclasses.dataclass(frozen=True)
class ConvNet:
    """Two convolutions of 3 x 3 with stride 2, and a hidden layer."""

    classes: int
    channels: tuple[int, int] = (8, 16)
    width: int = 64

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        """Weights and biases as PyTorch's, U(-1, 1) / sqrt(fan-in)."""
        del x
        first, second = self.channels
        rest = (SIDE // 4 + 1) ** 2 * second
        shapes = [(3, 3, 1, first), (3, 3, first, second)]
        shapes += [(rest, self.width), (self.width, self.classes)]
        params: list[Any] = []
        for layer, shape in zip(jax.random.split(key, 4), shapes, strict=True):
            init = networks.uniform(int(np.prod(shape[:-1])))
            weight_key, bias_key = jax.random.split(layer)
            params.append((init(weight_key, shape), init(bias_key, shape[-1:])))
        return params

    def logits(
        self, params: Any, x: jax.Array, drop: Drop = networks.keep
    ) -> jax.Array:
        h = x.reshape(-1, SIDE, SIDE, 1)
        for place, (weights, bias) in enumerate(params[:2]):
            # a product with all patches: on a CPU a seventh of XLA's convolution's time
            out = patches(h) @ weights.reshape(-1, weights.shape[-1])
            h = drop(jax.nn.relu(out + bias), place)
        (hidden, shift), (out, last) = params[2:]
        h = drop(jax.nn.relu(h.reshape(len(h), -1) @ hidden + shift), 2)
        return h @ out + last


def patches(h: jax.Array) -> jax.Array:
    """The patches of 3 x 3 at every second place, [n, s, s, c] to [n, t, t, 9 c].

    t is s / 2 rounded up, and zeros surround h, as "SAME" has it.
    """
    side = h.shape[1]
    wide = 2 * -(-side // 2) + 1  # of what all patches cover
    low = (wide - side) // 2
    h = jnp.pad(h, ((0, 0), *[(low, wide - side - low)] * 2, (0, 0)))
    ends = [slice(i, i + wide - 2, 2) for i in range(3)]
    return jnp.concatenate([h[:, rows, cols] for rows in ends for cols in ends], -1)


def shifted(key: jax.Array, x: jax.Array, by: int) -> jax.Array:
    """Moves each image [n, SIDE * SIDE] by up to `by` pixels each way; zeros enter."""
    wide = jnp.pad(x.reshape(-1, SIDE, SIDE), ((0, 0), (by, by), (by, by)))
    starts = jax.random.randint(key, (len(x), 2), 0, 2 * by + 1)
    cut = jax.vmap(lambda one, at: jax.lax.dynamic_slice(one, at, (SIDE, SIDE)))
    return cut(wide, starts).reshape(x.shape)


@functools.cache
def pool(name: str, directory: pathlib.Path | None) -> tuple[np.ndarray, np.ndarray]:
    """All examples of a data set; made-up points are the same for every draw."""
    if name == "iris":
        from sklearn.datasets import load_iris  # noqa: PLC0415 - the extra `bench`

        made: Any = load_iris(return_X_y=True)
    elif name in points.GENERATORS:
        made = points.GENERATORS[name](jax.random.key(1), POINTS)
    else:
        return pools.load(name, directory)
    x, y = (np.asarray(part) for part in made)
    x = (x - x.mean(0)) / x.std(0)
    return x.astype(np.float32), y.astype(np.int32)


def problem(
    name: str, directory: pathlib.Path | None = None, size: Size | None = None
) -> Problem:
    """The data and the network of a name, with its own size unless one is given.

    Raises:
      FileNotFoundError: if the files of the data are not there.
    """
    size = size or SIZES[name]
    if name == "text":
        net, pieces = text.Transformer(width=32, blocks=1), len(text.pieces())
        return Problem(name, name, pieces, size, text.CLASSES, net, text.draw)
    data, convolved, shift = name.partition("-cnn")
    pool_x, pool_y = pool(data, directory)
    classes = int(pool_y.max()) + 1
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

    network = ConvNet(classes) if convolved else MLP(classes)
    shift_by = int(bool(shift))
    return Problem(name, data, len(pool_y), size, classes, network, draw, shift_by)
