"""Does a band help a network with label noise? Foretold from a run without one."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import flood_optax
from benchmarks import data, networks, training
from benchmarks.strokes.formulas import RULES, Rule
from flood_optax.levels import noise_floor

TRAIN, BATCH, WIDTHS, DECAY = 600, 60, (100, 100), 0.99
EPOCHS, SEEDS, WATCHED = 120, 5, 40  # measured on the last epochs of these
FIFTH, POINTS = 5, 1.0  # the level over its band; what counts as a gain
# The rule as it was before any run, and as the runs with a fifth of the labels flipped
# have amended it: by how much the drift must grow, how many bands the loss may swing,
# and how many strokes must fit into the training.
GROWTH, EXCESS, FEWEST = 2.0, 2.0, 4
AMENDED_GROWTH, AMENDED_EXCESS, AMENDED_FEWEST = 3.0, 3.0, 40
SIMULATED = 100_000  # steps of the scalar model


class Optimizer(NamedTuple):
    """A rule of optax at a learning rate."""

    rule: Rule
    rate: float

    def transform(self) -> optax.GradientTransformation:
        rule = self.rule
        if rule.beta2 is not None:
            return optax.adam(self.rate, b1=rule.momentum, b2=rule.beta2)
        return optax.sgd(self.rate, momentum=rule.momentum, nesterov=rule.nesterov)


FIRST = (
    *(("SGD", 0.1), ("heavy ball 0.5", 0.05)),
    *(("heavy ball 0.9", rate) for rate in (0.003, 0.01, 0.03, 0.1)),
    *(("Nesterov 0.9", 0.01), ("Adam", 3e-4), ("Adam", 1e-3), ("Adam", 3e-3)),
)
FURTHER = (("SGD", 0.3), ("heavy ball 0.9", 0.2), ("Nesterov 0.9", 0.1), ("Adam", 0.01))
SETTINGS = {0.2: FIRST, 0.4: (*FIRST, *FURTHER)}  # by the share of flipped labels


@functools.partial(jax.jit, static_argnums=0)
def straight(
    nesterov: bool, momentum: float, rate: float, sd: float, band: float
) -> tuple[jax.Array, jax.Array]:
    """The parameter after each step, and the sign of the step."""
    transform = optax.chain(
        flood_optax.scale_by_flood(0.0, band=band),
        optax.sgd(rate, momentum=momentum, nesterov=nesterov),
    )

    def step(carry: Any, noise: jax.Array) -> tuple[Any, Any]:
        x, state = carry
        updates, state = cast(
            Any, transform.update(jnp.ones([]), state, x, value=x + sd * noise)
        )
        rises = state[0].flood_value < state[0].flood_level
        return (x + updates, state), (x, jnp.where(rises, -1.0, 1.0))

    noise = jax.random.normal(jax.random.key(0), (SIMULATED,))
    start = (jnp.zeros([]), transform.init(jnp.zeros([])))
    return training.scan(step, start, noise)[1]


def simulated(rule: Rule, *, speed: float, sd: float, band: float) -> dict[str, Any]:
    """The strokes of a loss that is straight along the way, with noisy losses.

    The parameter is the loss: steps of a formed velocity change it by `speed`, and the
    flood sees it with normal noise of standard deviation `sd`. `ratio` is the drift
    that its signs s make, -2 cov(s, a) / (eta (1 - m)), with a the way gone down, over
    whole strokes (None where there are not two) and without the part of Adam's second
    moment; `swing` is the amplitude of the triangle whose standard deviation is that of
    the loss.
    """
    rate = speed * (1 - rule.momentum)
    x, signs = straight(rule.nesterov, rule.momentum, rate, sd, band)
    x, signs = np.asarray(x), np.asarray(signs)
    rises = np.flatnonzero((signs[1:] == -1) & (signs[:-1] == 1)) + 1
    if len(rises) < 3:
        return {"ratio": None, "steps": len(x), "swing": None}
    whole = slice(rises[1], rises[-1])  # the first one starts from rest
    x, signs = x[whole], signs[whole]
    ratio = 2 * float(np.cov(signs, x)[0, 1]) / (rate * (1 - rule.momentum))
    if rule.beta2 is not None:
        ratio *= (1 - rule.momentum) ** 2
    return {
        "ratio": ratio,
        "steps": len(x) / (2 * (len(rises) - 2)),
        "swing": 3**0.5 * float(x.std()),
    }


def foretold(
    rule: Rule, *, speed: float, sd: float, band: float, num_steps: int
) -> dict[str, Any]:
    """Whether a band will help, from what a run without it shows.

    It helps where it multiplies the drift along the level set; where it is the band
    that sets the stroke, and not what the velocity does after the turn: the loss swings
    by no more than so many bands; and where enough strokes fit into the training. The
    rule as amended counts strokes of 2 band / speed steps, what they are long without
    noise.
    """
    without = simulated(rule, speed=speed, sd=sd, band=0.0)
    within = simulated(rule, speed=speed, sd=sd, band=band)
    found = {"growth": None, "excess": None, "foretold_steps": within["steps"]}
    if within["ratio"] is None or without["ratio"] is None:
        return {**found, "foretold": False, "amended": False}
    growth, excess = within["ratio"] / without["ratio"], within["swing"] / band
    crossing = 2 * band / speed
    return {
        **found,
        "growth": growth,
        "excess": excess,
        "foretold": growth >= GROWTH
        and excess <= EXCESS
        and FEWEST * within["steps"] <= num_steps,
        "amended": growth >= AMENDED_GROWTH
        and excess <= AMENDED_EXCESS
        and AMENDED_FEWEST * crossing <= num_steps,
    }


class Seen(NamedTuple):
    """Of one run: averaged weights on the test set, and what it was at the level."""

    accuracy: jax.Array
    loss: jax.Array
    squared: jax.Array  # g'D g of the whole training set, D = 1 but for Adam
    deviation: jax.Array  # of the batch losses
    steps: jax.Array  # of a stroke
    swing: jax.Array  # of the training loss, as in `simulated`


def train(
    split: data.Split,
    optimizer: Optimizer,
    key: jax.Array,
    band: jax.Array | float,
    *,
    level: float,
    epochs: int,
) -> Seen:
    """One run of a flooded network whose weights are averaged from step to step."""
    network = networks.MLP(WIDTHS, 10)
    x, y = jnp.asarray(split.train_x), jnp.asarray(split.train_y)
    transform = optax.chain(
        flood_optax.scale_by_flood(level, band=band), optimizer.transform()
    )
    init_key, order_key = jax.random.split(key)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return training.cross_entropy(network.apply(params, x), y).mean()

    def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        params, average, state = carry
        value, grads = training.value_and_grad(loss_fn)(params, x[batch], y[batch])
        updates, state = cast(Any, transform.update(grads, state, params, value=value))
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 1 - DECAY)
        flood = state[0]
        return (params, average, state), flood.flood_value < flood.flood_level

    def watch(carry: Any, batches: jax.Array) -> tuple[jax.Array, ...]:
        params, _, state = carry
        loss, g = training.value_and_grad(loss_fn)(params, x, y)
        scaled, moments = g, optax.tree.get(state, "nu", None)
        if moments is not None:
            bias = 1 - optimizer.rule.beta2 ** state[0].flood_step
            scaled = jax.tree.map(
                lambda g, v: g / (jnp.sqrt(v / bias) + 1e-8), g, moments
            )
        each = jax.vmap(lambda batch: loss_fn(params, x[batch], y[batch]))(batches)
        return jnp.asarray(optax.tree.vdot(g, scaled)), each.std(), loss

    def epoch(carry: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        key, watched = given
        batches = training.batches(key, len(x), BATCH)
        carry, rises = training.scan(step, carry, batches)
        nothing = (jnp.zeros([]),) * 3
        seen = training.cond(watched, lambda: watch(carry, batches), lambda: nothing)
        return carry, (rises, *seen)

    params = network.init(init_key, x[:1])
    start = (params, params, transform.init(params))
    keys = jax.random.split(order_key, epochs)
    watched = np.arange(epochs) >= epochs - WATCHED
    (_, average, _), (rises, squared, deviation, losses) = training.scan(
        epoch, start, (keys, watched)
    )
    logits = network.apply(average, jnp.asarray(split.test_x))
    loss, accuracy = training.loss_and_accuracy(logits, jnp.asarray(split.test_y))
    last = slice(-WATCHED, None)
    rises = rises[last].ravel()
    turns = jnp.mean(rises[1:] != rises[:-1])
    return Seen(
        accuracy,
        loss,
        squared[last].mean(),
        deviation[last].mean(),
        1 / jnp.maximum(turns, 1 / len(rises)),
        3**0.5 * losses[last].std(),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def runs(
    rule: Rule,
    plan: tuple[float, int],
    numbers: tuple[float, float, float],
    split: data.Split,
    keys: jax.Array,
) -> Seen:
    """A run for each seed: of a rule, whose numbers share one program.

    Args:
      rule: its momentum does not count.
      plan: the level, and how many epochs.
      numbers: the momentum, the learning rate, the band.
      split: the data of each seed, stacked.
      keys: one for each seed.
    """
    (level, epochs), (momentum, rate, band) = plan, numbers
    optimizer = Optimizer(rule._replace(momentum=momentum), rate)

    def one(part: data.Split, key: jax.Array) -> Seen:
        return train(part, optimizer, key, band, level=level, epochs=epochs)

    return jax.vmap(one)(split, keys)


def rows(
    noise: float,
    chosen: Iterable[tuple[str, float]],
    *,
    seeds: int = SEEDS,
    epochs: int = EPOCHS,
) -> list[dict[str, Any]]:
    """Each optimizer without and with a band of level / 5, paired by seed."""
    level = float(noise_floor(noise, num_classes=10))
    band = level / FIFTH
    splits = [data.digits(train=TRAIN, noise=noise, seed=seed) for seed in range(seeds)]
    split = data.Split(*(np.stack(part) for part in zip(*splits, strict=True)))
    keys = jax.random.split(jax.random.key(0), seeds)
    found: list[dict[str, Any]] = []
    for name, rate in chosen:
        rule = RULES[name]
        kind, plan = rule._replace(momentum=0.0), (level, epochs)
        without, within = (
            runs(kind, plan, (rule.momentum, rate, d), split, keys) for d in (0.0, band)
        )
        speed = rate * rule.gain * float(without.squared.mean())
        deviation = float(without.deviation.mean())
        found.append(
            {
                "flipped": noise,
                "optimizer": name,
                "learning_rate": rate,
                "speed": speed,
                "deviation": deviation,
                **foretold(
                    rule,
                    speed=speed,
                    sd=deviation,
                    band=band,
                    num_steps=epochs * (TRAIN // BATCH),
                ),
                "steps": float(within.steps.mean()),
                "swing": float(within.swing.mean()) / band,
                "accuracies_without": np.asarray(without.accuracy).tolist(),
                "accuracies_within": np.asarray(within.accuracy).tolist(),
                "loss_without": float(without.loss.mean()),
                "loss_within": float(within.loss.mean()),
            }
        )
    return found
