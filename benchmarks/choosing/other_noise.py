"""What the rules give on labels whose noise depends on the class or on the input."""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import networks, pixels, pools, report, statistics, study, training
from benchmarks.choosing import noise
from benchmarks.choosing.noise import Noise
from benchmarks.pools import Sets
from benchmarks.training import cross_entropy, grad, scan
from flood_optax import levels, scale_by_flood

RECORD = "choosing-noise"
SEEDS, FIRST_SEED = 6, 100  # other seeds than any constant was fixed on
BAND = 0.2  # x the level
EVERY = 12  # steps between two checks
GRID = (0.1, 0.25, 0.5)  # x log c
DECAYS = (3e-3, 3e-2)
PLAIN, KNOWN, KNOWN_BAND, ESTIMATED, ESTIMATED_BAND = range(5)


@dataclasses.dataclass(frozen=True)
class Constants:
    """Of the network and its training."""

    widths: tuple[int, ...] = (100, 100)
    steps: int = 360
    adam: float = 2e-3
    average: float = 0.98  # of the weights, a step


class Recipe(NamedTuple):
    """What a run does; scalars, or arrays [recipes]."""

    level: Any = -math.inf
    band: Any = 0.0
    decay: Any = 0.0


class Seen(NamedTuple):
    """Noisy validation accuracy, and test accuracy on right labels."""

    valid: Any
    test: Any


class Ends(NamedTuple):
    """The last weights, their average, and those of the best check."""

    last: Seen
    averaged: Seen
    early: Seen


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data, noise and batch; `batch` None is all training examples."""

    data: str
    noise: Noise
    batch: int | None

    @property
    def name(self) -> str:
        return f"{self.data}-{self.noise.name}-{self.batch or 'full'}"


def kinds(name: str) -> list[Noise]:
    teachers = [Noise("teacher", taught=size) for size in noise.TEACHERS[name]]
    even = [Noise("even", rate) for rate in (0.0, 0.2, 0.4)]
    return [*even, Noise("class", 0.2), *teachers]


BATCHES = {"digits": 50, "mnist-5k": 100, "wine": None, "breast_cancer": None}
SETTINGS = [
    *(
        Setting(name, one, batch)
        for name, batch in BATCHES.items()
        for one in kinds(name)
    ),
    *(Setting("digits", one, None) for one in kinds("digits")[1::3]),
    Setting("wine", Noise("even", 0.2), 10),
    Setting("breast_cancer", Noise("even", 0.2), 30),
]
SMOKE = Setting("wine", Noise("teacher", taught=6), 10)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The network and how it is trained; equal ones share their program."""

    classes: int
    batch: int | None
    constants: Constants

    @functools.partial(jax.jit, static_argnums=0)
    def run(self, sets: Sets, keys: jax.Array, recipes: Recipe) -> Ends:
        """Every recipe on every draw, [draws, recipes], in one program.

        Args:
          sets: stacked, [draws, ...].
          keys: of the initialisation and the batches, one for each draw.
          recipes: fields [draws, recipes].
        """
        shape = recipes.level.shape
        flat = jax.tree.map(lambda field: field.reshape(-1), recipes)
        draws = jnp.repeat(jnp.arange(shape[0]), shape[1])

        def one(given: tuple[jax.Array, Recipe]) -> Ends:
            draw, recipe = given
            return self.train(jax.tree.map(lambda a: a[draw], sets), keys[draw], recipe)

        # Not by vmap: on a CPU products of one net are faster than those of a batch.
        ends = jax.lax.map(one, (draws, flat))
        return jax.tree.map(lambda field: field.reshape(shape), ends)

    def train(self, sets: Sets, key: jax.Array, recipe: Recipe) -> Ends:
        c = self.constants
        x, y = sets.train
        size, batch = len(y), self.batch or len(y)
        net = networks.MLP(c.widths, self.classes)
        start_key, order_key = jax.random.split(key)
        params: Any = net.init(start_key, x)
        optimizer = optax.chain(
            scale_by_flood(recipe.level, band=recipe.band),
            optax.add_decayed_weights(recipe.decay),
            optax.adam(c.adam),
        )
        orders = training.order(order_key, size, batch, c.steps)
        orders = orders.reshape(-1, EVERY, batch)

        def logits(params: Any, x: jax.Array) -> Any:
            return net.apply(params, x)

        def seen(params: Any) -> Seen:
            return Seen(
                *(
                    training.loss_and_accuracy(logits(params, part[0]), part[1])[1]
                    for part in (sets.validation, sets.test)
                )
            )

        def step(carry: Any, at: jax.Array) -> Any:
            params, state, average = carry

            def loss_fn(params: Any) -> Any:
                loss = cross_entropy(logits(params, x[at]), y[at]).mean()
                return loss, loss

            grads, loss = grad(loss_fn, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params, value=loss)
            params = optax.apply_updates(params, updates)
            average = optax.incremental_update(params, average, 1 - c.average)
            return (params, state, average), None

        def check(carry: Any, part: jax.Array) -> Any:
            carry, best = scan(step, carry[0], part)[0], carry[1]
            now = seen(carry[0])
            better = now.valid > best.valid
            best = jax.tree.map(lambda a, b: jnp.where(better, a, b), now, best)
            return (carry, best), None

        begin = (params, optimizer.init(params), params)
        worst = Seen(jnp.float32(-1), jnp.float32(0))
        (carry, best), _ = scan(check, (begin, worst), orders)
        return Ends(seen(carry[0]), seen(carry[2]), best)


def recipes(known: float, estimated: float, classes: int) -> list[Recipe]:
    """Plain, at the levels without and with a band, a grid, and weight decay."""
    return [
        Recipe(),
        Recipe(known),
        Recipe(known, BAND * known),
        Recipe(estimated),
        Recipe(estimated, BAND * estimated),
        *(Recipe(share * math.log(classes)) for share in GRID),
        *(Recipe(decay=decay) for decay in DECAYS),
    ]


def measure_setting(
    setting: Setting, constants: Constants, seeds: int
) -> dict[str, Any]:
    """What every rule reaches in a setting, by seed."""
    number = pools.CLASSES.get(setting.data, 10)
    draw = noise.drawing(setting.data, setting.noise)
    keys = [jax.random.split(jax.random.key(FIRST_SEED + i)) for i in range(seeds)]
    drawn = jax.jit(jax.vmap(draw))(jnp.stack([key[0] for key in keys]))
    wrong = np.asarray(drawn.wrong, np.float64)
    tried: list[list[Recipe]] = []
    rates: list[float] = []
    for i in range(seeds):
        x, y = (np.asarray(part[i]) for part in drawn.sets.train)
        scores = levels.leave_one_out(x, y, number)
        rates.append(float(levels.noise_rate(scores, y)))
        known = noise.known_level(setting.noise, float(wrong[i]), y, number)
        estimate = float(levels.noise_floor(min(rates[-1], 1 - 1 / number), number))
        tried.append(recipes(known, estimate, number))
    columns = Recipe(
        *(
            jnp.array([[recipe[field] for recipe in row] for row in tried], jnp.float32)
            for field in range(len(Recipe._fields))
        )
    )
    trainer = Trainer(number, setting.batch, constants)
    ends = trainer.run(drawn.sets, jnp.stack([key[1] for key in keys]), columns)
    found = rules(jax.tree.map(lambda field: np.asarray(field, np.float64), ends))
    return {
        "setting": setting.name,
        "data": setting.data,
        "batch": setting.batch,
        "noise": dataclasses.asdict(setting.noise),
        "overlap": round(noise.overlap(setting.data), 5),
        "wrong": np.round(100 * wrong, 3).tolist(),
        "estimated": np.round(100 * np.array(rates), 3).tolist(),
        "rules": {
            rule: np.round(100 * reached, 4).tolist() for rule, reached in found.items()
        },
    }


def rules(ends: Ends) -> dict[str, np.ndarray]:
    """Test accuracies [draws] of each rule, from ends [draws, recipes]."""
    first_decay = ends.last.test.shape[1] - len(DECAYS)

    def best(seen: Seen, among: Sequence[int]) -> np.ndarray:
        valid, test = seen.valid[:, among], seen.test[:, among]
        return np.take_along_axis(test, valid.argmax(1)[:, None], 1)[:, 0]

    grid = [PLAIN, *range(ESTIMATED_BAND + 1, first_decay)]
    decays = [PLAIN, *range(first_decay, first_decay + len(DECAYS))]
    return {
        "plain": ends.last.test[:, PLAIN],
        "average": ends.averaged.test[:, PLAIN],
        "early": ends.early.test[:, PLAIN],
        "decay": best(ends.last, decays),
        "decay_average": best(ends.averaged, decays),
        "grid": best(ends.last, grid),
        "grid_average": best(ends.averaged, grid),
        "known": ends.last.test[:, KNOWN],
        "known_average": ends.averaged.test[:, KNOWN],
        "known_band": ends.averaged.test[:, KNOWN_BAND],
        "estimated": ends.last.test[:, ESTIMATED],
        "estimated_average": ends.averaged.test[:, ESTIMATED],
        "estimated_band": ends.averaged.test[:, ESTIMATED_BAND],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All settings; each is kept in the folder of the work as it ends."""
    constants, seeds, chosen, work = Constants(), SEEDS, SETTINGS, args.work
    if args.smoke:
        constants = Constants(widths=(8,), steps=24)
        seeds, chosen, work = 2, [SMOKE], args.out / "choosing-smoke"
    rows = [
        study.kept(
            work / "noise.jsonl",
            [dataclasses.asdict(setting), dataclasses.asdict(constants), seeds],
            functools.partial(measure_setting, setting, constants, seeds),
        )
        for setting in chosen
    ]
    return {
        "protocol": {
            "seeds": seeds,
            "first_seed": FIRST_SEED,
            "steps": constants.steps,
            "adam": constants.adam,
            "average": constants.average,
            "band": BAND,
            "grid": GRID,
            "decays": DECAYS,
            "sizes": noise.SIZES,
        },
        "noise": rows,
    }


SHOWN = {  # rules, and the heads of their columns
    "average": "averaged",
    "early": "early stopping",
    "decay": "weight decay",
    "known": "`noise_floor`, last",
    "known_average": "averaged",
    "known_band": "in a band, averaged",
    "estimated": "share estimated, last",
    "estimated_average": "averaged",
    "estimated_band": "in a band, averaged",
}
NAMES = {
    "average": "averaged weights alone",
    "early": "early stopping, validation accuracy",
    "decay": "weight decay, by validation",
    "decay_average": "weight decay, averaged weights, by validation",
    "grid": "three levels, by validation, last weights",
    "grid_average": "three levels, by validation, averaged weights",
    "known": "`noise_floor`, share known, last weights",
    "known_average": "`noise_floor`, share known, averaged weights",
    "known_band": "`noise_floor`, share known, band, averaged weights",
    "estimated": "`noise_floor`, share estimated, last weights",
    "estimated_average": "`noise_floor`, share estimated, averaged weights",
    "estimated_band": "`noise_floor`, share estimated, band, averaged weights",
}
Rows = Sequence[Mapping[str, Any]]
GROUPS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "none": ("none", lambda n: n["kind"] == "even" and n["rate"] == 0),
    "even": ("even, 20 and 40 %", lambda n: n["kind"] == "even" and n["rate"] > 0),
    "class": ("by class, 20 %", lambda n: n["kind"] == "class"),
    "teacher": ("by a weak teacher", lambda n: n["kind"] == "teacher"),
}


def gains(row: Mapping[str, Any], rule: str, over: str = "plain") -> np.ndarray:
    return np.array(row["rules"][rule]) - np.array(row["rules"][over])


def over_data(rows: Rows, rule: str, over: str = "plain") -> statistics.Effect:
    """The mean gain over the settings, data sets being the unit."""
    return statistics.over_data((row["data"], gains(row, rule, over)) for row in rows)


def of_kind(rows: Rows, group: str) -> Rows:
    return [row for row in rows if GROUPS[group][1](row["noise"])]


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """The gains of every rule by kind of noise, and setting by setting."""
    rows = payload["noise"]
    source = report.provenance(payload)
    chosen = {group: found for group in GROUPS if (found := of_kind(rows, group))}
    columns = [  # each is a family
        statistics.marked({rule: over_data(found, rule) for rule in NAMES})
        for found in chosen.values()
    ]
    heads = (f"{GROUPS[g][0]} ({len(found)} settings)" for g, found in chosen.items())
    means = report.markdown(
        ["rule", *heads],
        [
            [title, *(column[rule] for column in columns)]
            for rule, title in NAMES.items()
        ],
    )

    def wrong(row: Mapping[str, Any]) -> str:
        return f"{np.mean(row['wrong']):.0f} ({np.mean(row['estimated']):.0f})"

    def gain(rule: str) -> report.Cell:
        return lambda row: (
            f"{statistics.corrected(gains(row, rule), row['overlap']):+.1f}"
        )

    settings = report.table(
        rows,
        [
            ("data, batch", setting_title),
            ("wrong labels", lambda row: noise.title(Noise(**row["noise"]))),
            ("%, found %", wrong),
            ("plain", lambda row: f"{np.mean(row['rules']['plain']):.1f}"),
            *((head, gain(rule)) for rule, head in SHOWN.items()),
        ],
    )
    return {
        RECORD: "\n\n".join((means, note(payload), source)),
        f"{RECORD}-settings": f"{settings}\n\n{source}",
    }


def note(payload: Mapping[str, Any]) -> str:
    """What the table is of, and what averaging the weights does at the known level."""
    rows = payload["noise"]
    noisy = [row for row in rows if np.mean(row["wrong"]) > 0]
    batches = {
        "full batches": [row for row in noisy if row["batch"] is None],
        "mini-batches": [row for row in noisy if row["batch"] is not None],
    }
    averaged = " and ".join(
        f"{over_data(chosen, 'known_average', 'known'):+.1f} on {title}"
        for title, chosen in batches.items()
        if chosen
    )
    return (
        f"Points over plain training, {len({row['data'] for row in rows})} data sets, "
        f"{payload['protocol']['seeds']} seeds. **Bold**: ahead or behind, by Holm's "
        "steps over the rows of the column. Averaged less last weights, where labels "
        f"are wrong and the share is known: {averaged}."
    )


def setting_title(row: Mapping[str, Any]) -> str:
    known = pixels.TITLES | {"breast_cancer": "breast cancer"}
    return f"{known.get(row['data'], row['data'])}, {row['batch'] or 'full'}"
