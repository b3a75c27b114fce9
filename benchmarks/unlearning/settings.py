"""The three settings, and every constant that the methods share.

Nothing was tuned. Rates, horizons and the form of `findings.BEST` were named before the
first run, the latter from a probe with other seeds.
"""

import dataclasses
from typing import NamedTuple


class Setting(NamedTuple):
    """What is memorised, and how much of it is to be forgotten.

    Attributes:
      title: as a table writes it.
      flips: the share of wrong labels, in every set.
      forget, retain, held_out, test: how many examples, or passages of text. The level
        is read off the held-out ones, all measures off the test ones.
      batch, forget_batch: how many of a step.
      steps: of training the model, and the golds, which see no forget example.
      pretrain: steps on other text before; 0 for a model that starts anew.
      seeds: each with data and a model of its own.
      shadows: models of the membership attack; 0 for none.
    """

    title: str
    flips: float
    forget: int
    retain: int
    held_out: int
    test: int
    batch: int
    forget_batch: int
    steps: int
    pretrain: int = 0
    seeds: int = 10
    shadows: int = 0

    @property
    def train_batch(self) -> int:
        """How many of a step in training; of text more than in unlearning."""
        return min(self.retain, 32 if self.pretrain else self.batch)


IMAGES = Setting("MNIST-5k", 0.0, 100, 900, 1000, 1000, 100, 100, 3000, shadows=8)
SETTINGS = {
    "images": IMAGES,
    "noisy": IMAGES._replace(title="MNIST-5k, 20 % wrong labels", flips=0.2, shadows=0),
    "text": Setting("text", 0.0, 48, 240, 96, 96, 8, 8, 1500, pretrain=2000, seeds=6),
}


@dataclasses.dataclass(frozen=True)
class Constants:
    """What all methods share.

    Attributes:
      rates: of Adam, for unlearning.
      train_rate: of Adam, for training and relearning.
      factors: of the level, beside 1, at the middle rate.
      horizons: steps of unlearning after which everything is measured. No method knows
        the horizon, so one run serves all.
      checks: steps after which the cheap measures are taken too.
      relearn: steps of relearning at most.
      npo, simnpo: beta of the two, as published (NPO .1, SimNPO 2.5, its gamma 0).
    """

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    train_rate: float = 1e-3
    factors: tuple[float, ...] = (0.5, 2.0)
    horizons: tuple[int, ...] = (100, 300, 3000)
    checks: tuple[int, ...] = (
        *(1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 140, 200, 300),
        *(400, 550, 750, 1000, 1400, 2000, 3000),
    )
    relearn: int = 100
    npo: float = 0.1
    simnpo: float = 2.5

    @property
    def middle(self) -> float:
        return self.rates[len(self.rates) // 2]


SMOKE = Constants(
    rates=(1e-3,), factors=(0.5,), horizons=(2, 4), checks=(1, 2, 4), relearn=3
)
SMALL = {  # for --smoke
    "images": Setting("digits", 0.0, 8, 16, 12, 12, 8, 8, 5, seeds=2, shadows=2),
    "text": Setting("text", 0.0, 4, 8, 6, 6, 2, 2, 3, pretrain=2, seeds=2),
}
