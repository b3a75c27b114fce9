"""The methods: the space that each draws its configurations from, and its defaults."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import qmc

from benchmarks.rivals.settings import OFF, SEED, TRIES
from flood_optax import levels


class Recipe(NamedTuple):
    """What a run does beside descending the mean loss: numbers, traced in a run."""

    rate: Any = 1e-3  # of Adam
    cosine: Any = 0.0  # 1: the rate decays to 0 by half a cosine
    decay: Any = 0.0  # of the weights, decoupled
    smoothing: Any = 0.0  # of the labels
    assumed: Any = 0.0  # share of wrong labels that the loss is corrected for
    exponent: Any = 0.0  # of generalised cross-entropy; 0 is cross-entropy
    kept: Any = 0.0  # 1, 2: only labels that leave-one-out scores, held-out nets uphold
    level: Any = OFF
    of_estimate: Any = 0.0  # > 0: the level as a part of the estimated noise floor
    band: Any = 0.0  # as a part of the level
    strength: Any = 0.0  # dropout's share, mixup's alpha, a radius, ELR's lambda, ...
    memory: Any = 0.0  # ELR's decay of its targets


class Span(NamedTuple):
    """A number of a method's own: from low to high, evenly in itself or in its log."""

    low: float
    high: float
    log: bool = True

    def at(self, unit: float) -> float:
        if self.log:
            return self.low * (self.high / self.low) ** unit
        return self.low + (self.high - self.low) * unit


RATES = Span(2e-4, 2e-2)
DEFAULT_RATE = 1e-3  # Adam's
BAND = 0.2  # of the level: the recipe's
SCHEDULES = {"constant": 0.0, "cosine": 1.0}


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, its space beside learning rate and schedule, and its defaults.

    Attributes:
      title: what the tables call it.
      space: a span for each number of its own, by the field of the recipe. The level
        is a part of what `level` says.
      defaults: its numbers where nothing is tuned, as published (for ours: as we
        recommend); None where it is not defined without a validation set.
      level: what levels are parts of: the `classes`' logarithm, the noise floor at the
        share that the method is `told`, or at the `estimated` one.
      kind: of its step, see `training.Fit`.
      stop: where its run is read off without a validation set: at the end, or where
        a rule of `stops` says.
      of: the method whose runs it is read off.
      cost: of a run, in plain runs: forward and backward passes.
      averages: whether its averaged weights may be chosen as well.
      told: whether it is told the share of wrong labels.
      corrected: whether it corrects its loss for that share.
      ours: whether it is flooding, by itself or with another.
      reads_text: whether it is defined for sequences of labels.
    """

    title: str
    space: Mapping[str, Span] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, float] | None = None
    level: str = ""
    band: float = 0.0
    kind: str = "plain"
    stop: str = "last"
    of: str = ""
    cost: float = 1.0
    averages: bool = True
    told: bool = False
    corrected: bool = False
    ours: bool = False
    reads_text: bool = True

    def fits(self, flips: float, *, is_text: bool) -> bool:
        """Whether it is defined there, and something else than plain training."""
        return (self.reads_text or not is_text) and (flips > 0 or not self.told)

    def recipe(
        self, numbers: Mapping[str, float], flips: float, classes: int
    ) -> Recipe:
        """The numbers as a step takes them."""
        fields = {"band": self.band} | dict(numbers)
        if self.level:
            share = fields.pop("level", 1.0)
            if self.level == "estimated":
                fields["of_estimate"] = share
            elif self.level == "told":
                fields["level"] = share * float(levels.noise_floor(flips, classes))
            else:
                fields["level"] = share * math.log(classes)
        return Recipe(**fields, assumed=flips if self.corrected else 0.0)

    def recipes(self, flips: float, classes: int) -> dict[str, Recipe]:
        """By name: the defaults under each schedule, then what is drawn."""
        found: dict[str, Recipe] = {}
        if self.defaults is not None:
            for name, cosine in SCHEDULES.items():
                numbers = {"rate": DEFAULT_RATE} | dict(self.defaults)
                found[name] = self.recipe(numbers | {"cosine": cosine}, flips, classes)
        for number, unit in enumerate(units().tolist()):
            drawn = {"rate": RATES.at(unit[0]), "cosine": float(unit[1] < 0.5)}
            for (field, span), place in zip(self.space.items(), unit[2:], strict=False):
                drawn[field] = span.at(place)
            found[str(number)] = self.recipe(drawn, flips, classes)
        return found


@functools.cache
def units() -> np.ndarray:
    """Points [TRIES, 4] of a scrambled Halton sequence, the same for all methods."""
    return qmc.Halton(4, rng=SEED).random(TRIES)


LEVELS = {"level": Span(0.05, 0.75, log=False)}  # of log(classes)
OF_FLOOR = {"level": Span(0.5, 1.1, log=False)}
DECAY = {"decay": Span(0.01, 10.0)}
RADIUS = {"strength": Span(0.03, 1.5)}
SHARE = {"strength": Span(0.1, 0.7, log=False)}

METHODS = {
    "plain": Method("plain training", defaults={}, kind="stops"),
    "wave": Method("Label Wave", defaults={}, stop="wave", of="plain"),
    "evidence": Method(
        "stopped by the gradients' evidence", defaults={}, stop="evidence", of="plain"
    ),
    "decay": Method("weight decay", DECAY, {"decay": 0.01}),
    "smoothing": Method(
        "label smoothing", {"smoothing": Span(0.02, 0.6)}, {"smoothing": 0.1}
    ),
    "dropout": Method("dropout", SHARE, {"strength": 0.5}, kind="dropout"),
    "mixup": Method(
        "mixup",
        {"strength": Span(0.1, 8.0)},
        {"strength": 1.0},
        kind="mixup",
        reads_text=False,
    ),
    "sam": Method("SAM", RADIUS, {"strength": 0.05}, kind="sam", cost=2.0),
    "msam": Method(
        "Momentum-SAM", {"strength": Span(0.1, 3.0)}, {"strength": 3.0}, kind="msam"
    ),
    "schedule_free": Method(
        "schedule-free AdamW", defaults={"rate": 2.5e-3}, kind="schedule_free"
    ),
    "gce": Method(
        "generalised cross-entropy",
        {"exponent": Span(0.1, 1.0, log=False)},
        {"exponent": 0.7},
    ),
    "elr": Method(
        "early-learning regularisation",
        {"strength": Span(1.0, 10.0), "memory": Span(0.5, 0.95, log=False)},
        {"strength": 3.0, "memory": 0.7},
        kind="elr",
    ),
    "pruned": Method(
        "without contradicted labels (leave-one-out)",
        {"kept": Span(1.0, 1.0)},
        {"kept": 1.0},
        reads_text=False,
    ),
    "confident": Method(
        "without contradicted labels (confident learning)",
        {"kept": Span(2.0, 2.0)},
        {"kept": 2.0},
        cost=2.0,  # five models of a fifth of the steps come first
        reads_text=False,
    ),
    "forward": Method("forward correction", defaults={}, told=True, corrected=True),
    "adaflood": Method(
        "AdaFlood",
        {"strength": Span(0.05, 0.8, log=False)},
        kind="adaflood",
        cost=2.0,
        reads_text=False,
    ),
    "flooding": Method(
        "flooding, last weights", LEVELS, level="classes", averages=False, ours=True
    ),
    "band": Method("flooding in a band", LEVELS, level="classes", band=BAND, ours=True),
    "band_decay": Method(
        "flooding in a band and weight decay",
        LEVELS | DECAY,
        level="classes",
        band=BAND,
        ours=True,
    ),
    "band_dropout": Method(
        "flooding in a band and dropout",
        LEVELS | SHARE,
        level="classes",
        band=BAND,
        kind="dropout",
        ours=True,
    ),
    "band_sam": Method(
        "flooding in a band and SAM",
        LEVELS | RADIUS,
        level="classes",
        band=BAND,
        kind="sam",
        cost=2.0,
        ours=True,
    ),
    "estimated": Method(
        "flooding in a band at the estimated noise floor",
        OF_FLOOR,
        {},
        level="estimated",
        band=BAND,
        ours=True,
        reads_text=False,
    ),
    "floor": Method(
        "flooding in a band at the noise floor",
        OF_FLOOR,
        {},
        level="told",
        band=BAND,
        told=True,
        ours=True,
    ),
}
