"""What is memorised and forgotten: images with or without wrong labels, and text."""

import dataclasses
from collections.abc import Callable
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import characters, data, networks, pixels, pools, training
from benchmarks.training import cross_entropy, order, scan
from benchmarks.unlearning.settings import Constants, Setting

LENGTH = 32  # characters of a passage
Set = tuple[jax.Array, jax.Array]


class Data(NamedTuple):
    """Inputs and labels of each set, no example in two of them."""

    retain: Set
    forget: Set
    held_out: Set
    test: Set


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, the data that a key draws, and where the model starts from."""

    setting: Setting
    classes: int
    logits: Callable[[Any, jax.Array], Any]
    draw: Callable[[jax.Array], Data]
    start: Callable[[jax.Array], Any]


def per_example(losses: jax.Array) -> jax.Array:
    """[n] from [n] or, the mean of a passage, from [n, T]."""
    return losses.reshape(len(losses), -1).mean(-1)


def fit(problem: Problem, rate: float, params: Any, data: Set, order: jax.Array) -> Any:
    """Trains by Adam on the batches of an order, [steps, batch]."""
    optimizer = optax.adam(rate)
    x, y = data

    def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
        def loss_fn(params: Any) -> jax.Array:
            return cross_entropy(problem.logits(params, x[batch]), y[batch]).mean()

        params, state = carry
        updates, state = optimizer.update(training.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return scan(step, (params, optimizer.init(params)), order)[0][0]


def images(setting: Setting, name: str = "mnist-5k") -> Problem:
    """Images of 14 x 14 pixels, or digits, and a network of two hidden layers."""
    pool_x, pool_y = pools.load(name)
    net = networks.MLP((100, 100), pixels.CLASSES)
    sizes = setting.retain, setting.forget, setting.held_out, setting.test

    def draw(key: jax.Array) -> Data:
        order_key, flip_key = jax.random.split(key)
        at = jax.random.permutation(order_key, len(pool_x))
        sets: list[Set] = []
        begin = 0
        for size, one in zip(sizes, jax.random.split(flip_key, 4), strict=True):
            part = at[begin : begin + size]
            labels = jnp.asarray(pool_y)[part]
            labels = data.flip(one, labels, setting.flips, pixels.CLASSES)
            sets.append((jnp.asarray(pool_x)[part], labels))
            begin += size
        return Data(*sets)

    def start(key: jax.Array) -> Any:
        return net.init(key, jnp.zeros((1, pool_x.shape[1])))

    return Problem(setting, pixels.CLASSES, net.apply, draw, start)


def text(setting: Setting, constants: Constants, width: int = 64) -> Problem:
    """Passages of one half of the topics; the model has read the other half before."""
    names = sorted(topics.topics)
    halves = (names[::2], names[1::2])
    size = LENGTH + 1
    other, pieces = (
        characters.cut(characters.coded(" ".join(topics.topics[n] for n in half)), size)
        for half in halves
    )
    net = characters.Transformer(width)
    sizes = setting.retain, setting.forget, setting.held_out, setting.test

    def sets_of(chosen: jax.Array) -> Set:
        return chosen[:, :-1], chosen[:, 1:]

    def draw(key: jax.Array) -> Data:
        at = jax.random.permutation(key, len(pieces))
        chosen = jnp.asarray(pieces)[at[: sum(sizes)]]
        ends = (sizes[0], sum(sizes[:2]), sum(sizes[:3]))
        return Data(*(sets_of(part) for part in jnp.split(chosen, ends)))

    def start(key: jax.Array) -> Any:
        init_key, order_key = jax.random.split(key)
        read = sets_of(jnp.asarray(other))
        params = net.init(init_key, read[0][:1])
        batches = order(order_key, len(other), 32, setting.pretrain)
        return fit(problem, constants.train_rate, params, read, batches)

    problem = Problem(setting, characters.CLASSES, net.logits, draw, start)
    return problem


def problem(name: str, setting: Setting, constants: Constants) -> Problem:
    if name == "text":
        width = 64 if setting.pretrain > 10 else 8
        return text(setting, constants, width)
    return images(setting, "digits" if setting.title == "digits" else "mnist-5k")
