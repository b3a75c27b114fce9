"""The runs of a setting, kept as they end, and what every rule makes of a seed's."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.choosing import rules
from benchmarks.choosing.rules import Outcome, Trunk
from benchmarks.choosing.settings import Constants, Draw, Setting, classes
from benchmarks.choosing.training import Model, Rival
from flood_optax import levels, sweep

Arrays = dict[str, Any]


def floor(setting: Setting, factor: float) -> float:
    """The floor of the rate, or of a rate that is off by a factor."""
    number, rate = classes(setting), factor * setting.flips
    if setting.pair:  # all flips of a class go to one other
        matrix = (1 - rate) * np.eye(number) + rate * np.roll(np.eye(number), 1, 1)
        return float(levels.noise_floor(matrix)[0])
    return float(levels.noise_floor(rate, number))


@dataclasses.dataclass(frozen=True)
class Runner:
    """A setting, and the folder that keeps its runs."""

    setting: Setting
    constants: Constants
    draw: Draw
    work: pathlib.Path

    @property
    def model(self) -> Model:
        setting = self.setting
        return Model(classes(setting), setting.optimizer, setting.batch, self.constants)

    @property
    def grid(self) -> list[float]:
        """The levels, after plain training."""
        top = math.log(classes(self.setting))
        return [round(share * top, 4) for share in self.constants.grid]

    @property
    def fold_cost(self) -> float:
        """Of the models that leave a fold out, in plain runs."""
        c = self.constants
        part = 1 if self.setting.batch else (c.folds - 1) / c.folds
        return c.folds * self.model.held_out_steps * part / c.steps

    def runs(self, seed: int, key: jax.Array) -> Arrays:
        """All runs of a seed; what the folder holds is not run again."""
        about = [dataclasses.asdict(self.setting), dataclasses.asdict(self.constants)]
        header = json.dumps([*about, np.asarray(jax.random.key_data(key)).tolist()])
        path = self.work / f"{self.setting.name}-seed{seed}.npz"
        if path.exists():
            with np.load(path) as kept:
                if str(kept["header"]) != header:
                    raise ValueError(
                        f"{path.name} must be of the same setting and constants: "
                        "name another folder by --work."
                    )
                return dict(kept)
        found = {"header": np.array(header), **self.train(key)}
        self.work.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **found)
        part.replace(path)
        return found

    def train(self, key: jax.Array) -> Arrays:
        """The plain run, a branch for every level, and the rivals."""
        c, model = self.constants, self.model
        keys = jax.random.split(key, 4)
        start = model.start(self.draw(keys[0]), keys[1])
        batches = model.batches(len(start.predicted), keys[2])
        held_out, estimated = model.held_out(start, keys[3])
        named = {
            "floor": floor(self.setting, 1),
            "floor_half": floor(self.setting, 0.5),
            "floor_more": floor(self.setting, 1.5),
            "floor_estimated": float(estimated),
        }

        def chosen(metrics: Mapping[str, np.ndarray]) -> np.ndarray:
            trunk = Trunk.of(metrics, c.every)
            named.update(rules.read_off(trunk, c))
            values = np.array([*self.grid, *named.values()], np.float32)
            return np.unique(np.append(values[np.isfinite(values)], -np.inf))

        result = sweep.forked(model.flooded_step, start, batches, chosen)
        tried = rival_runs(c, named["floor"])
        trunk = Trunk.of({n: x[0] for n, x in result.metrics.items()}, c.every)
        return {
            **trunk._asdict(),
            "levels": result.levels,
            "rules": np.array([*named]),
            "rule_levels": np.array([*named.values()], np.float32),
            "branches": result.metrics["seen"][:, c.every - 1 :: c.every],
            "averaged": result.metrics["averaged"][:, -1],
            "rivals": np.asarray(model.rivals(start, batches, held_out, tried)),
        }


def rival_runs(constants: Constants, floor: float) -> Rival:
    """Weight decays, label smoothings, AdaFlood, and the plateau from 0 and a floor."""
    runs = [
        *(Rival(decay=number) for number in constants.decays),
        *(Rival(smoothing=number) for number in constants.smoothing),
        Rival(gamma=constants.gamma),
        Rival(initial=0.0),
        Rival(initial=floor),
    ]
    return Rival(
        *(jnp.array(column, jnp.float32) for column in zip(*runs, strict=True))
    )


def outcomes(runner: Runner, seed: int, key: jax.Array) -> dict[str, Outcome]:
    """Every rule of one seed."""
    c = runner.constants
    runs = runner.runs(seed, key)
    trunk = Trunk(*(runs[field] for field in Trunk._fields))
    at = {float(level): i for i, level in enumerate(runs["levels"])}
    begins = {level: rules.leaves(trunk.losses, level, c.every) for level in at}
    grid = [rules.PLAIN, *np.array(runner.grid, np.float32).tolist()]
    which = [at[level] for level in grid]
    found = rules.plain_rules(trunk, runs["averaged"][0], c.wave)
    found |= rules.grid_rules(
        runs["branches"][which],
        runs["averaged"][which],
        [begins[level] for level in grid],
        cuts=c.halving,
        steps=c.steps,
    )

    for rule, number in zip(map(str, runs["rules"]), runs["rule_levels"], strict=True):
        level = float(number)
        end = runs["branches"][at[level], -1]
        averaged = runs["averaged"][at[level], rules.REACHED]
        if rule.startswith("floor"):
            cost = 1 + (runner.fold_cost if rule == "floor_estimated" else 0)
            found[rule] = Outcome(end[rules.REACHED], cost)
        else:
            cost = 1 + (1 - begins[level] / c.steps if np.isfinite(level) else 0)
            found[f"{rule}_again"] = Outcome(end[rules.REACHED], 2)
            found[f"{rule}_forked"] = Outcome(end[rules.REACHED], cost)
        found[f"{rule}_average"] = Outcome(averaged, cost)
        if rule in ("best_loss", "best_accuracy"):
            found[f"{rule}_better"] = rules.keep_better(trunk, end, cost)

    first, second = len(c.decays), len(c.decays) + len(c.smoothing)
    rivals = runs["rivals"]
    found["decay"] = rules.validated(trunk, rivals[:first])
    found["smoothing"] = rules.validated(trunk, rivals[first:second])
    adaflood, *plateaus = rivals[second:, rules.REACHED]
    found["adaflood"] = Outcome(adaflood, 1 + runner.fold_cost)
    found["plateau"] = Outcome(plateaus[0], 1)
    found["plateau_floor"] = Outcome(plateaus[1], 1)
    return found
