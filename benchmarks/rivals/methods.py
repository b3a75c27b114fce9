"""The methods: for each eight recipes to choose from, and the kind of its step."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.rivals.settings import Constants, Problem
from flood_optax import levels

OFF = -math.inf


class Recipe(NamedTuple):
    """What a run does beside descending the mean loss: numbers, traced in a run."""

    flips: Any = 0.0  # of the data; what a method may know of it is in `assumed`
    rate: Any = 1e-3
    cosine: Any = 0.0  # 1: the rate decays to 0 by half a cosine
    decay: Any = 0.0  # of the weights, decoupled
    smoothing: Any = 0.0  # of the labels
    assumed: Any = 0.0  # share of flips that the loss is corrected for
    level: Any = OFF
    band: Any = 0.0
    strength: Any = 0.0  # dropout's share, mixup's alpha, a radius, AdaFlood's gamma


@dataclasses.dataclass(frozen=True)
class Method:
    """Eight recipes, for a share of flips and a number of classes.

    Attributes:
      title: what the tables call it.
      recipes: from the constants, the share of flips and the classes to eight of them.
      kind: of its step, see `training.Fit`.
      cost: of a run, in plain runs: forward and backward passes.
      flooded: whether it is one of ours.
      knows_rate: whether it is told the share of the flips.
      reads_text: whether it is defined for sequences of labels as it is.
    """

    title: str
    recipes: Callable[[Constants, float, int], Sequence[Recipe]]
    kind: str = "plain"
    cost: float = 1.0
    flooded: bool = False
    knows_rate: bool = False
    reads_text: bool = True

    def fits(self, problem: Problem) -> bool:
        """Whether it is defined there, and something else than plain training."""
        noisy = max(problem.size.flips) > 0
        return (self.reads_text or not problem.is_text) and (
            noisy or not self.knows_rate
        )


RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
DECAYS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75)  # of log(classes): levels
FEW_SHARES, FEW_DECAYS = (0.1, 0.25, 0.4, 0.6), (0.8, 3.2)
OF_FLOOR = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)


def over_rates(**more: float) -> Callable[[Constants, float, int], list[Recipe]]:
    """For a method without a number of its own: the learning rate."""
    return lambda c, flips, classes: [
        Recipe(flips, rate=rate, **more) for rate in RATES
    ]


def over(
    name: str, numbers: Sequence[float]
) -> Callable[[Constants, float, int], list[Recipe]]:
    """The shared learning rate, and these values of a field."""
    return lambda c, flips, classes: [
        Recipe(flips, c.rate)._replace(**{name: number}) for number in numbers
    ]


def over_levels(
    *, band: bool, **others: Sequence[float]
) -> Callable[[Constants, float, int], list[Recipe]]:
    """Levels by their share of log(classes): eight, or four with each of two others."""

    def recipes(c: Constants, flips: float, classes: int) -> list[Recipe]:
        flooded = [
            Recipe(flips, c.rate, level=level, band=c.band * level if band else 0.0)
            for share in (FEW_SHARES if others else SHARES)
            for level in [share * math.log(classes)]
        ]
        for name, numbers in others.items():
            flooded = [
                one._replace(**{name: number}) for one in flooded for number in numbers
            ]
        return flooded

    return recipes


def corrected(c: Constants, flips: float, classes: int) -> list[Recipe]:
    """The loss is corrected for the flips, whose share is known."""
    return [Recipe(flips, rate, assumed=flips) for rate in RATES]


def corrected_and_flooded(c: Constants, flips: float, classes: int) -> list[Recipe]:
    floor = float(levels.noise_floor(flips, num_classes=classes))
    return [
        Recipe(flips, c.rate, assumed=flips, level=share * floor) for share in OF_FLOOR
    ]


def at_the_floor(c: Constants, flips: float, classes: int) -> list[Recipe]:
    """The level is known; so what is chosen is the learning rate."""
    floor = float(levels.noise_floor(flips, num_classes=classes))
    return [Recipe(flips, rate, level=floor, band=c.band * floor) for rate in RATES]


METHODS = {
    "plain": Method("plain training", over_rates()),
    "decay": Method("weight decay", over("decay", DECAYS)),
    "smoothing": Method(
        "label smoothing",
        over("smoothing", (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
    ),
    "cosine": Method("learning rate decayed (cosine)", over_rates(cosine=1.0)),
    "dropout": Method(
        "dropout",
        over("strength", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)),
        kind="dropout",
    ),
    "mixup": Method(
        "mixup",
        over("strength", (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)),
        kind="mixup",
        reads_text=False,
    ),
    "sam": Method(
        "SAM",
        over("strength", (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6)),
        kind="sam",
        cost=2.0,
    ),
    "msam": Method(
        "Momentum-SAM",
        over("strength", (0.1, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4, 3.2)),
        kind="msam",
    ),
    "schedule_free": Method(
        "schedule-free AdamW",
        over_rates(),
        kind="schedule_free",
    ),
    "forward": Method(
        "forward correction",
        corrected,
        knows_rate=True,
    ),
    "forward_flooded": Method(
        "forward correction, flooded",
        corrected_and_flooded,
        flooded=True,
        knows_rate=True,
    ),
    "adaflood": Method(
        "AdaFlood",
        over("strength", (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)),
        kind="adaflood",
        cost=2.0,  # five models of a fifth of the steps come first
        flooded=True,
        reads_text=False,
    ),
    "flooding": Method("flooding", over_levels(band=False), flooded=True),
    "band": Method("flooding in a band", over_levels(band=True), flooded=True),
    "flooding_decay": Method(
        "flooding and weight decay",
        over_levels(band=False, decay=FEW_DECAYS),
        flooded=True,
    ),
    "band_decay": Method(
        "flooding in a band and weight decay",
        over_levels(band=True, decay=FEW_DECAYS),
        flooded=True,
    ),
    "band_dropout": Method(
        "flooding in a band and dropout",
        over_levels(band=True, strength=(0.3, 0.6)),
        kind="dropout",
        flooded=True,
    ),
    "band_sam": Method(
        "flooding in a band and SAM",
        over_levels(band=True, strength=(0.4, 0.8)),
        kind="sam",
        cost=2.0,
        flooded=True,
    ),
    "band_msam": Method(
        "flooding in a band and Momentum-SAM",
        over_levels(band=True, strength=(0.8, 1.6)),
        kind="msam",
        flooded=True,
    ),
    "floor": Method(
        "flooding in a band at the noise floor",
        at_the_floor,
        flooded=True,
        knows_rate=True,
    ),
}
