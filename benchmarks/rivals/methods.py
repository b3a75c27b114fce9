"""The methods: the space that each draws its configurations from, and its defaults."""

from collections.abc import Mapping
from typing import NamedTuple


class Span(NamedTuple):
    """A number of a method's own: from low to high, evenly in itself or in its log."""

    low: float
    high: float
    log: bool = True


SCHEDULES = "constant", "cosine"
TRIES = 20  # configurations of each method
BUDGETS = (1, 2, 4, 8, 20)  # how many of them somebody tries
PIECES = (  # in the order of the pages
    *("wine", "iris", "breast_cancer", "two_gaussians", "sinusoid", "digits"),
    *("mnist-5k", "fashion-mnist", "mnist-5k-cnn", "mnist-5k-cnn-shifted"),
    *("fashion-mnist-cnn", "fashion-mnist-cnn-shifted", "text"),
)


class Method(NamedTuple):
    """A method, its space beside learning rate and schedule, and its defaults.

    Attributes:
      title: what the tables call it.
      space: a span for each number of its own.
      defaults: its numbers where nothing is tuned, as published (for ours: as we
        recommend); None where it is not defined without a validation set.
      stop: where its run is read off without a validation set: at the end, or where
        a rule stops it.
      of: the method whose runs it is read off.
      cost: of a run, in plain runs: forward and backward passes.
      told: whether it is told the share of wrong labels.
      ours: whether it is flooding, by itself or with another.
      reads_text: whether it is defined for sequences of labels.
    """

    title: str
    space: Mapping[str, Span] = {}
    defaults: Mapping[str, float] | None = None
    stop: str = "last"
    of: str = ""
    cost: float = 1.0
    told: bool = False
    ours: bool = False
    reads_text: bool = True

    def fits(self, flips: float, *, is_text: bool) -> bool:
        """Whether it is defined there, and something else than plain training."""
        return (self.reads_text or not is_text) and (flips > 0 or not self.told)


LEVELS = {"level": Span(0.05, 0.75, log=False)}  # of log(classes)
OF_FLOOR = {"level": Span(0.5, 1.1, log=False)}
DECAY = {"decay": Span(0.01, 10.0)}
RADIUS = {"strength": Span(0.03, 1.5)}
SHARE = {"strength": Span(0.1, 0.7, log=False)}

METHODS = {
    "plain": Method("plain training", defaults={}),
    "wave": Method("Label Wave", defaults={}, stop="wave", of="plain"),
    "evidence": Method(
        "stopped by the gradients' evidence", defaults={}, stop="evidence", of="plain"
    ),
    "decay": Method("weight decay", DECAY, {"decay": 0.01}),
    "smoothing": Method(
        "label smoothing", {"smoothing": Span(0.02, 0.6)}, {"smoothing": 0.1}
    ),
    "dropout": Method("dropout", SHARE, {"strength": 0.5}),
    "mixup": Method(
        "mixup", {"strength": Span(0.1, 8.0)}, {"strength": 1.0}, reads_text=False
    ),
    "sam": Method("SAM", RADIUS, {"strength": 0.05}, cost=2.0),
    "msam": Method("Momentum-SAM", {"strength": Span(0.1, 3.0)}, {"strength": 3.0}),
    "schedule_free": Method("schedule-free AdamW", defaults={"rate": 2.5e-3}),
    "gce": Method(
        "generalised cross-entropy",
        {"exponent": Span(0.1, 1.0, log=False)},
        {"exponent": 0.7},
    ),
    "elr": Method(
        "early-learning regularisation",
        {"strength": Span(1.0, 10.0), "memory": Span(0.5, 0.95, log=False)},
        {"strength": 3.0, "memory": 0.7},
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
    "forward": Method("forward correction", defaults={}, told=True),
    "adaflood": Method(
        "AdaFlood", {"strength": Span(0.05, 0.8, log=False)}, cost=2.0, reads_text=False
    ),
    "flooding": Method("flooding, last weights", LEVELS, ours=True),
    "band": Method("flooding in a band", LEVELS, ours=True),
    "band_decay": Method(
        "flooding in a band and weight decay", LEVELS | DECAY, ours=True
    ),
    "band_dropout": Method("flooding in a band and dropout", LEVELS | SHARE, ours=True),
    "band_sam": Method(
        "flooding in a band and SAM", LEVELS | RADIUS, cost=2.0, ours=True
    ),
    "estimated": Method(
        "flooding in a band at the estimated noise floor",
        OF_FLOOR,
        {},
        ours=True,
        reads_text=False,
    ),
    "floor": Method(
        "flooding in a band at the noise floor", OF_FLOOR, {}, told=True, ours=True
    ),
}
