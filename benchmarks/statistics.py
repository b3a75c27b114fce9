"""Spreads, 95% intervals and paired gains, and how a table writes them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and half the width of its 95% confidence interval (Student's t)."""

    mean: float
    half: float

    @property
    def above(self) -> bool:
        """Whether all of it is above 0."""
        return self.mean - self.half > 0

    @property
    def below(self) -> bool:
        return self.mean + self.half < 0

    def __format__(self, spec: str) -> str:
        """Both in one format, a sign for the mean alone; one value has no interval."""
        mean = format(self.mean, spec)
        if not math.isfinite(self.half):
            return mean
        return f"{mean} ± {format(self.half, spec.removeprefix('+'))}"


def sd(values: np.ndarray) -> float:
    """The sample standard deviation, 0 for one value."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of independent values; for one value the interval is infinite."""
    seen = np.asarray(values)
    if len(seen) < 2:
        return Interval(float(seen.mean()), math.inf)
    t = float(stats.t.ppf(0.975, len(seen) - 1))
    return Interval(float(seen.mean()), t * sd(seen) / math.sqrt(len(seen)))


def gain(entry: Mapping[str, Any], plain: Mapping[str, Any]) -> Interval:
    """How much more accurate an entry is than plain training, paired by seed."""
    return interval(np.array(entry["accuracies"]) - np.array(plain["accuracies"]))


def verdicts(gains: Iterable[Interval]) -> tuple[int, int]:
    """How many are ahead of 0, and how many behind; the others' intervals hold it."""
    seen = list(gains)
    return sum(one.above for one in seen), sum(one.below for one in seen)


def summary(name: str, values: np.ndarray) -> dict[str, float]:
    """Two columns of a row: the mean and the standard deviation."""
    return {f"{name}_mean": float(values.mean()), f"{name}_sd": sd(values)}
