"""Spreads, 95% intervals and paired gains, and what may be said of them.

Seeds of one data set tell nothing about another: over several data sets, these are the
unit (`clustered`). Draws from one pool overlap (`corrected`). Many comparisons are
judged together (`verdicts_of`, after Holm), and the best of a group by other seeds than
those that chose it (`cross_fitted`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

AHEAD, BEHIND, OPEN = "ahead", "behind", "not told apart"
DRAWS = 4_000  # of a bootstrap


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
    t = float(special.stdtrit(len(seen) - 1, 0.975))
    return Interval(float(seen.mean()), t * sd(seen) / math.sqrt(len(seen)))


def gain(entry: Mapping[str, Any], plain: Mapping[str, Any]) -> Interval:
    """How much more accurate an entry is than plain training, paired by seed."""
    return interval(np.array(entry["accuracies"]) - np.array(plain["accuracies"]))


def verdicts(gains: Iterable[Interval]) -> tuple[int, int]:
    """How many are ahead of 0, and how many behind; the others' intervals hold it."""
    seen = list(gains)
    return sum(one.above for one in seen), sum(one.below for one in seen)


class Effect(NamedTuple):
    """A mean difference, its standard error, and the degrees of freedom of that."""

    mean: float
    error: float
    freedom: int

    @property
    def interval(self) -> Interval:
        if self.freedom < 1:
            return Interval(self.mean, math.inf)
        return Interval(
            self.mean, float(special.stdtrit(self.freedom, 0.975)) * self.error
        )

    @property
    def p(self) -> float:
        """Two-sided, of a difference of 0."""
        if self.freedom < 1 or self.error == 0 == self.mean:
            return 1.0
        with np.errstate(divide="ignore"):
            ratio = np.divide(abs(self.mean), self.error)
        return 2 * float(special.stdtr(self.freedom, -ratio))

    def __format__(self, spec: str) -> str:
        return format(self.interval, spec)


def corrected(values: Sequence[float] | np.ndarray, ratio: float) -> Effect:
    """The mean of differences on draws that overlap (Nadeau and Bengio 2003).

    J draws with sample variance s^2 have the squared error (1/J + ratio) s^2 instead of
    s^2 / J.

    Args:
      values: a difference for each draw [draws].
      ratio: the examples that a draw tests, over those of the pool that it does not;
        0 for draws that share nothing.
    """
    seen = np.asarray(values)
    scale = math.sqrt(1 / len(seen) + ratio)
    return Effect(float(seen.mean()), scale * sd(seen), len(seen) - 1)


def clustered(
    differences: Mapping[str, Sequence[Sequence[float] | np.ndarray]],
    *,
    draws: int = DRAWS,
) -> Effect:
    """The mean over settings, data sets being the unit.

    A two-stage bootstrap with a fixed key draws data sets, then seeds within each; its
    standard deviation, times sqrt(G / (G - 1)) for G data sets, is the error, and
    Student's t with G - 1 degrees of freedom makes the interval (Hesterberg 2015): the
    percentiles of so few units would be too narrow.

    Args:
      differences: for each data set its settings, each a difference for each seed.
        Settings with equally many seeds have them drawn together.
      draws: of the bootstrap.
    """
    sets = [[np.asarray(one) for one in settings] for settings in differences.values()]
    mean = float(np.mean([one.mean() for settings in sets for one in settings]))
    number = len(sets)
    if number < 2:
        return Effect(mean, math.inf, 0)
    rng = np.random.default_rng(0)
    chosen = rng.integers(number, size=(draws, number))
    means = np.empty((draws, number))
    for place, settings in enumerate(sets):
        drawn = chosen == place
        means[drawn] = _resampled(settings, int(drawn.sum()), rng)
    sizes = np.array([len(settings) for settings in sets])[chosen]
    found = (means * sizes).sum(1) / sizes.sum(1)
    scale = math.sqrt(number / (number - 1))
    return Effect(mean, scale * float(found.std()), number - 1)


def over_data(settings: Iterable[tuple[str, np.ndarray]]) -> Effect:
    """`clustered`, of pairs: a data set, and a difference for each seed."""
    sets: dict[str, list[np.ndarray]] = {}
    for data, differences in settings:
        sets.setdefault(data, []).append(differences)
    return clustered(sets)


def _resampled(
    settings: Sequence[np.ndarray], draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Means [draws] of the settings, their seeds drawn anew."""
    together = len({len(one) for one in settings}) == 1
    rows = [np.mean(settings, 0)] if together else settings
    means = [
        row[rng.integers(len(row), size=(draws, len(row)))].mean(1) for row in rows
    ]
    return np.mean(means, 0)


def holm(ps: Sequence[float]) -> list[float]:
    """The p-values of a family, adjusted so that below 0.05 none is false in 95%."""
    order = np.argsort(ps, kind="stable")
    scaled = np.asarray(ps)[order] * np.arange(len(ps), 0, -1)
    found = np.empty(len(ps))
    found[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return found.tolist()


def verdicts_of(family: Iterable[Effect]) -> list[str]:
    """Which of a family of differences are ahead of 0 or behind, after Holm."""
    seen = list(family)
    return [
        OPEN if p >= 0.05 else AHEAD if one.mean > 0 else BEHIND
        for one, p in zip(seen, holm([one.p for one in seen]), strict=True)
    ]


def judged(family: Mapping[Any, Effect]) -> dict[Any, str]:
    """The verdict on each of a family by its name."""
    return dict(zip(family, verdicts_of(family.values()), strict=True))


def marked(family: Mapping[Any, Effect], spec: str = "+.1f") -> dict[Any, str]:
    """The differences of a family with their intervals, bold where not left open."""
    verdicts = judged(family)
    return {
        name: f"{one:{spec}}" if verdicts[name] == OPEN else f"**{one:{spec}}**"
        for name, one in family.items()
    }


def cross_fitted(group: Mapping[str, Sequence[float] | np.ndarray]) -> np.ndarray:
    """What the best of a group reaches [seeds], chosen on the other half of the seeds.

    The best in the mean of the even seeds is judged on the odd ones, and the other way
    round, so that no seed judges a choice that it had a part in. At a tie the first is
    the best.
    """
    values = np.array([np.asarray(one) for one in group.values()])
    found = np.empty(values.shape[1])
    if len(found) < 2:
        raise ValueError("One seed cannot both choose and judge.")
    for half in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - half.start, None, 2)
        found[half] = values[values[:, other].mean(1).argmax(), half]
    return found


def expected_best(
    k: int,
    validation: Sequence[float] | np.ndarray,
    test: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """The expected result of the best of k configurations (Dodge et al. 2019).

    The k are drawn with replacement from the n that were run, the one with the highest
    validation wins, ties by lot: the i-th lowest wins with the probability
    (i / n)^k - ((i - 1) / n)^k.

    Args:
      k: how many are tried.
      validation: of each configuration [..., n], -inf where a run diverged.
      test: what the winner is judged by [..., n]; the validation if left out.

    Returns:
      Expectations [...].
    """
    seen = np.asarray(validation, np.float64)
    judged = seen if test is None else np.asarray(test, np.float64)
    if np.isnan(seen).any():
        raise ValueError(
            "A configuration without a validation result cannot be chosen."
        )
    above = (seen[..., None, :] <= seen[..., :, None]).mean(-1)
    below = (seen[..., None, :] < seen[..., :, None]).mean(-1)
    ties = (seen[..., None, :] == seen[..., :, None]).sum(-1)
    return ((above**k - below**k) / ties * judged).sum(-1)
