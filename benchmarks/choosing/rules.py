"""What each rule makes of the runs of one seed: arithmetic on their curves."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.choosing.settings import Constants
from benchmarks.own_rules import accordance_level
from flood_optax import levels

VALID_LOSS, VALID_ACCURACY, ACCURACY = 0, 1, 2  # in what a check reads off
REACHED = slice(2, 5)  # test accuracy, test loss, calibration error
PLAIN = -math.inf


class Trunk(NamedTuple):
    """The plain run: [steps] losses and accordances, and what its checks read off."""

    losses: np.ndarray
    accordances: np.ndarray
    changed: np.ndarray
    seen: np.ndarray

    @classmethod
    def of(cls, metrics: Mapping[str, np.ndarray], every: int) -> "Trunk":
        checks = slice(every - 1, None, every)
        return cls(
            metrics["loss"],
            metrics["accordance"],
            metrics["changed"][checks],
            metrics["seen"][checks],
        )

    def means(self, of_steps: np.ndarray) -> np.ndarray:
        """The mean over the steps up to each check."""
        return of_steps.reshape(len(self.changed), -1).mean(1)


class Outcome(NamedTuple):
    """What a rule ends with, [accuracy, loss, calibration error], and its cost."""

    reached: np.ndarray
    cost: float


def first_best(metric: np.ndarray, mode: str) -> int:
    """The first check of the best metric."""
    return int(metric.argmax() if mode == "max" else metric.argmin())


def label_wave(changed: np.ndarray, window: int) -> int:
    """The check of the first local minimum of the moving average of the changes.

    The average at a check is over the window that ends there; it must have fallen to
    the minimum, or stayed, and rise after it. Without one it is the last check.
    """
    average = np.convolve(changed, np.ones(window) / window, "valid")
    fell, rises = average[1:-1] <= average[:-2], average[2:] > average[1:-1]
    found = np.flatnonzero(fell & rises)
    return int(found[0]) + window if len(found) else len(changed) - 1


def leaves(losses: np.ndarray, level: float, every: int) -> int:
    """The step of the last check before the loss first is below the level."""
    below = np.flatnonzero(losses < np.float32(level))
    return int(below[0]) // every * every if len(below) else len(losses)


def halving(
    scores: np.ndarray, cuts: Sequence[float], begins: Sequence[int], steps: int
) -> tuple[int, float]:
    """Successive halving on a shared trunk, and its cost in plain runs.

    Args:
      scores: [levels, checks], higher is better; the first level is plain training.
      cuts: the parts of the run after which the worse half of the levels is dropped.
      begins: the step at which each level leaves the trunk.
      steps: of a run.

    Returns:
      Which level is left and best, the lowest of equals, and the cost: of each level
      from where it leaves the trunk, and of the trunk as long as a level follows it.
    """
    checks = scores.shape[1]
    alive = list(range(len(scores)))
    stops = np.full(len(scores), steps)
    for cut in cuts:
        at = round(cut * checks)
        alive.sort(key=lambda i: (-scores[i, at - 1], i))
        kept = math.ceil(len(alive) / 2)
        stops[alive[kept:]] = at * (steps // checks)
        alive = alive[:kept]
    best = min(alive, key=lambda i: (-scores[i, -1], i))
    own = np.maximum(stops - np.asarray(begins), 0)[1:].sum()
    trunk = max(stops[0], np.minimum(begins, stops)[1:].max())
    return best, float(own + trunk) / steps


def read_off(trunk: Trunk, constants: Constants) -> dict[str, float]:
    """The levels that rules read off the plain run."""
    losses, window = trunk.means(trunk.losses), constants.window
    accordances = trunk.means(trunk.accordances)
    wave = label_wave(trunk.changed, constants.wave)
    loss, accuracy = trunk.seen[:, VALID_LOSS], trunk.seen[:, VALID_ACCURACY]
    return {
        "best_loss": float(levels.at_best(losses, loss, mode="min", window=window)),
        "best_accuracy": float(
            levels.at_best(losses, accuracy, mode="max", window=window)
        ),
        "wave": float(losses[wave]),
        "accordance": float(
            accordance_level(losses, accordances, threshold=constants.threshold)
        ),
    }


def plain_rules(trunk: Trunk, averaged: np.ndarray, wave: int) -> dict[str, Outcome]:
    """What the plain run alone gives; the wave's needs a window and one more check."""
    checks = len(trunk.changed)
    at = label_wave(trunk.changed, wave)

    def stopped(which: int) -> np.ndarray:
        return trunk.seen[which, REACHED]

    return {
        "plain": Outcome(stopped(-1), 1),
        "early_loss": Outcome(stopped(first_best(trunk.seen[:, 0], "min")), 1),
        "early_accuracy": Outcome(stopped(first_best(trunk.seen[:, 1], "max")), 1),
        "label_wave": Outcome(stopped(at), min(at + 2, checks) / checks),
        "average": Outcome(averaged[REACHED], 1),
    }


def grid_rules(
    seen: np.ndarray,
    averaged: np.ndarray,
    begins: Sequence[int],
    *,
    cuts: Sequence[float],
    steps: int,
) -> dict[str, Outcome]:
    """What choosing among levels gives, plain training the first.

    Args:
      seen: what the checks have seen, [levels, checks, 5].
      averaged: what is seen of the averaged weights at the end, [levels, 5].
      begins: the step at which each level leaves the trunk.
      cuts: see `halving`.
      steps: of a run.
    """
    each, level = seen.reshape(-1, seen.shape[2]), averaged[:, VALID_ACCURACY].argmax()
    best = each[int(each[:, VALID_ACCURACY].argmax())]  # lowest level, first check
    valid, test = seen[:, -1, VALID_ACCURACY], seen[:, -1, ACCURACY]
    picked = int(valid.argmax())
    number = len(seen)
    shared = 1 + sum(steps - begin for begin in begins[1:]) / steps
    survivor, cost = halving(seen[..., VALID_ACCURACY], cuts, begins, steps)
    return {
        "grid": Outcome(seen[picked, -1, REACHED], number),
        "grid_shared": Outcome(seen[picked, -1, REACHED], shared),
        "grid_best": Outcome(best[REACHED], number),
        "grid_average": Outcome(averaged[int(level), REACHED], number),
        "oracle": Outcome(seen[int(test.argmax()), -1, REACHED], number),
        "halving": Outcome(seen[survivor, -1, REACHED], cost),
    }


def keep_better(trunk: Trunk, flooded: np.ndarray, cost: float) -> Outcome:
    """The flooded run's end, unless the best check before validates better."""
    stopped = trunk.seen[first_best(trunk.seen[:, VALID_ACCURACY], "max")]
    better = flooded[VALID_ACCURACY] >= stopped[VALID_ACCURACY]
    return Outcome((flooded if better else stopped)[REACHED], cost)


def validated(trunk: Trunk, ends: np.ndarray) -> Outcome:
    """The best of plain training and of other runs, by validation accuracy."""
    every = np.concatenate([trunk.seen[-1:], ends])
    picked = every[int(every[:, VALID_ACCURACY].argmax())]
    return Outcome(picked[REACHED], len(every))
