"""What a sweep found: metrics with named axes, and which level to choose."""

import dataclasses
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np

from flood_optax.checks import FloodWarning, check_one_of, check_that
from flood_optax.sweep import export
from flood_optax.sweep.inputs import Array

Mode = Literal["max", "min"]
CURVES_LEVEL = "Result.curves(level=...)"
At = int | Literal["best"] | None


class Choice(NamedTuple):
    """A level chosen for all keys together.

    Attributes:
      level: the level.
      mean: the mean of the metric over the keys at this level.
      standard_error: of that mean, s / sqrt(n) with s over n - 1; NaN for one key, and
        where a run is infinite.
      num_keys: n.
    """

    level: float
    mean: float
    standard_error: float
    num_keys: int


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What `flood_optax.sweep.run` and `flood_optax.sweep.forked` return.

    Attributes:
      levels: the levels as given, shape [levels].
      metrics: each metric as a NumPy array, [levels, keys, ...] from `run`, which is
        ``axes`` ("level", "key"), and [levels, steps, ...] from `forked`, which is
        ("level", "step").
      axes: the names of the first two axes of every metric.
      keys: the key data of the keys, uint32 of shape [keys, words]; None from `forked`.
      steps_run: for `forked`, the training steps it took; None from `run`.
      steps_separate: for `forked`, the steps of separate runs, levels times steps.

    Examples:
      >>> import numpy as np
      >>> accuracy = np.array([[0.7, 0.8], [0.9, 0.75], [0.85, np.inf - np.inf]])
      >>> result = Result(np.array([0.0, 0.1, 0.2]), {"accuracy": accuracy})
      >>> print(result.nan_runs("accuracy"))
      [[2 1]]
      >>> import warnings
      >>> with warnings.catch_warnings():  # which report the NaN
      ...     warnings.simplefilter("ignore")
      ...     print(result.best("accuracy", "max"))
      ...     choice = result.best_overall("accuracy", "max")
      ...     careful = result.best_overall("accuracy", "max", one_standard_error=True)
      [0.1 0. ]
      >>> print(f"{choice.level} ({choice.mean:.3f} +- {choice.standard_error:.3f})")
      0.1 (0.825 +- 0.075)
      >>> print(careful.level)
      0.0
    """

    levels: Array
    metrics: dict[str, Array]
    axes: tuple[str, str] = ("level", "key")
    keys: Array | None = None
    steps_run: int | None = None
    steps_separate: int | None = None

    def best(self, metric: str, mode: Mode, *, at: At = None) -> Array:
        """Returns the level that is best for each key.

        NaN is never chosen, and a warning counts the runs that have it; a key with
        nothing but NaN gets the level NaN. Of equally good levels the lowest is
        returned, the one closest to training without flooding.

        Args:
          metric: the name of a metric of one number per run, or per step with ``at``.
          mode: "max" or "min", what is good: an accuracy, or a loss.
          at: of a learning curve, the step to compare, -1 for the last, or "best" for
            each run's own best step (early stopping). Required for curves.

        Returns:
          The levels, shape [keys]; for a result without keys, a scalar array.
        """
        scores = self._scores(metric, mode, at, "best")
        self._warn_of_nan(metric, scores)
        ascending = np.argsort(self.levels, kind="stable")
        best = scores[ascending] == _extreme(scores, mode, axis=0)
        chosen = self.levels[ascending][np.argmax(best, axis=0)]
        return np.where(best.any(axis=0), chosen, np.nan)

    def best_overall(
        self,
        metric: str,
        mode: Mode,
        *,
        at: At = None,
        one_standard_error: bool = False,
    ) -> Choice:
        """Returns the level whose mean over the keys is best.

        A level that has NaN for any key is not eligible. Of equally good levels the
        lowest is returned. With the one-standard-error rule it is the most conservative
        level whose mean is within one standard error (that of the best level) of the
        best mean, where most conservative is the lowest: closest to no flooding.

        Args:
          metric, mode, at: as in `best`.
          one_standard_error: whether to apply the one-standard-error rule, which needs
            two keys.

        Returns:
          A `Choice`.

        References:
          Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
        """
        scores = self._scores(metric, mode, at, "best_overall")
        self._warn_of_nan(metric, scores)
        scores = scores.reshape(len(self.levels), -1)
        number = scores.shape[1]
        means, errors = _mean_and_deviation(scores.T)
        errors /= np.sqrt(number)
        call, some = f"Result.best_overall({metric!r})", not np.isnan(means).all()
        check_that(some, call, "have a level without NaN", "NaN at every level")
        loss = np.where(np.isnan(means), np.inf, -means if mode == "max" else means)
        # A level whose mean is the worst there is, infinite, still goes before NaN.
        candidates = (loss == loss.min()) & ~np.isnan(means)
        if one_standard_error:
            call = "Result.best_overall(one_standard_error=True)"
            got = f"{number}: one run has no standard error"
            check_that(number > 1, call, "have two keys at least", got)
            best = min(np.flatnonzero(candidates), key=lambda i: self.levels[i])
            # An infinite best mean has no standard error, only its equals beside it.
            candidates |= (loss <= loss[best] + errors[best]) & ~np.isnan(means)
        index = min(np.flatnonzero(candidates), key=lambda i: self.levels[i])
        return Choice(
            level=float(self.levels[index]),
            mean=float(means[index]),
            standard_error=float(errors[index]),
            num_keys=number,
        )

    def nan_runs(self, metric: str) -> Array:
        """Returns the runs that have a NaN in a metric.

        Args:
          metric: the name of a metric.

        Returns:
          Index pairs (level, key), shape [runs, 2]; without keys (level,), [runs, 1].
        """
        return np.argwhere(self._any_nan(self._metric(metric, "nan_runs")))

    def curves(self, metric: str, level: Any) -> Array:
        """Returns the learning curves of a chosen level.

        Args:
          metric: the name of a metric.
          level: a level of the sweep, or one per key as `best` returns it.

        Returns:
          The metric at that level: [keys, ...], or [steps, ...] without keys.
        """
        values = self._metric(metric, "curves")
        wanted = np.asarray(level, np.float64)
        index = np.array([self._index(one) for one in wanted.ravel()])
        if wanted.shape == ():
            return values[index[0]]
        fits = "key" in self.axes and wanted.shape == values.shape[1:2]
        axes = f"for the axes {self.axes} of shape {values.shape[:2]}"
        got = f"shape {wanted.shape} {axes}"
        check_that(fits, CURVES_LEVEL, "be one level, or one per key", got)
        return values[index, np.arange(values.shape[1])]

    def to_xarray(self) -> Any:
        """Returns the metrics as an `xarray.Dataset` with named axes.

        The axes are "level" (with the levels as coordinate), "key" or "step", and of a
        curve from `run` "step"; further axes are "axis_3", ... An axis that is not
        equally long in all metrics carries the metric's name: "step_loss". A metric
        named like an axis gets an underscore: ``level_``.

        Returns:
          The dataset.
        """
        named = {name: (self._names(x), x) for name, x in self.metrics.items()}
        return export.to_xarray(self.levels, named)

    def to_json(self) -> str:
        """Returns the result as strict JSON; `from_json` gives it back bit for bit."""
        return export.to_json(vars(self))

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Reads what `to_json` wrote.

        Args:
          text: the JSON text.

        Returns:
          The result.

        Raises:
          ValueError: if the text is not such a document.
        """
        return cls(**export.from_json(text))

    def plot(
        self,
        metric: str,
        mode: Mode | None = None,
        *,
        at: At = None,
        ax: Any = None,
    ) -> Any:
        """Plots a metric against the level: the runs, their mean, and the spread.

        The band is one standard deviation over the keys. A level of -inf, which is no
        flooding, is a dashed line.

        Args:
          metric, mode, at: as in `best`; mode is needed for ``at="best"`` alone.
          ax: matplotlib axes to draw on; new ones by default.

        Returns:
          The matplotlib axes.
        """
        any_mode = None if at == "best" else "max"
        scores = self._scores(metric, mode or any_mode, at, "plot")
        scores = scores.reshape(len(self.levels), -1)
        ax = export.axes_for(ax, "Result.plot()")
        order = np.argsort(self.levels)
        order = order[np.isfinite(self.levels[order])]
        levels, finite = self.levels[order], scores[order]
        line = export.draw_band(ax, levels, *_mean_and_deviation(finite.T), "mean")
        if scores.shape[1] > 1:
            ax.plot(levels, finite, ".", color=line.get_color(), alpha=0.4)
        for plain in scores[~np.isfinite(self.levels)]:
            ax.axhline(plain.mean(), color="0.4", linestyle="--", label="no flooding")
        ax.set(xlabel="flood level", ylabel=metric)
        ax.legend()
        return ax

    def plot_curves(self, metric: str, level: Any, *, ax: Any = None) -> Any:
        """Plots the learning curves of a chosen level: the runs, mean and spread.

        Args:
          metric: the name of a metric with one number per step.
          level: as in `curves`.
          ax: matplotlib axes to draw on; new ones by default.

        Returns:
          The matplotlib axes.
        """
        self._check_curve(metric, "plot_curves")
        curves = np.atleast_2d(self.curves(metric, level).astype(np.float64))
        ax = export.axes_for(ax, "Result.plot_curves()")
        steps = np.arange(curves.shape[1], dtype=np.float64)
        name = f"level {level:g}" if np.ndim(level) == 0 else "level per key"
        export.draw_band(ax, steps, *_mean_and_deviation(curves), name)
        ax.set(xlabel="step", ylabel=metric)
        ax.legend()
        return ax

    def _metric(self, metric: str, call: str) -> Array:
        rule = f"be one of {', '.join(map(repr, self.metrics))}"
        known = metric in self.metrics
        check_that(known, f"Result.{call}(metric=...)", rule, repr(metric))
        return self.metrics[metric]

    def _index(self, level: float) -> int:
        """The index of a level; float32 copies of float64 levels are found too."""
        same = self.levels == level
        if not same.any():
            same = self.levels.astype(np.float32) == np.float32(level)
        got = f"{level:g}; there are {', '.join(f'{b:g}' for b in self.levels)}"
        check_that(same.any(), CURVES_LEVEL, "be a level of the sweep", got)
        return int(np.argmax(same))

    def _names(self, value: Array) -> list[str]:
        own = [*self.axes] if "step" in self.axes else [*self.axes, "step"]
        return [*own, *(f"axis_{i}" for i in range(len(own), value.ndim))][: value.ndim]

    def _check_curve(self, metric: str, call: str) -> None:
        names = self._names(self._metric(metric, call))
        where, got = f"Result.{call}({metric!r})", f"the axes {tuple(names)}"
        check_that(names[-1] == "step", where, "have one number per step", got)

    def _any_nan(self, value: Array) -> Array:
        runs = 2 if "key" in self.axes else 1
        axes = tuple(range(runs, value.ndim))
        return np.asarray(np.isnan(_numbers(value)).any(axis=axes))

    def _scores(self, metric: str, mode: str | None, at: At, call: str) -> Array:
        """One number per run: [levels, keys], or [levels] without keys."""
        values = _numbers(self._metric(metric, call))
        where, real = f"Result.{call}({metric!r})", values.dtype.kind != "c"
        check_that(real, where, "be of real numbers", values.dtype, error=TypeError)
        check_one_of(f"Result.{call}(mode=...)", mode, ("max", "min"))
        names, steps, which = (
            self._names(values),
            values.shape[-1],
            f"Result.{call}(at=...)",
        )
        if "step" not in names:
            got = f"{at!r} for {metric!r} of the axes {tuple(names)}"
            check_that(at is None, which, "be None where there is no curve", got)
            return values
        self._check_curve(metric, call)
        if at == "best":
            return _extreme(values, mode, axis=-1)
        step: Any = at  # whatever it is
        whole = isinstance(step, int | np.integer) and not isinstance(step, bool)
        rule = f'be "best" or a step in [{-steps}, {steps})'
        check_that(whole and -steps <= step < steps, which, rule, repr(at))
        return values[..., step]

    def _warn_of_nan(self, metric: str, scores: Array) -> None:
        number = int(np.isnan(scores).sum())
        if number:
            warnings.warn(
                f"{metric!r} is NaN in {number} of {scores.size} runs, which are not "
                f"chosen; `Result.nan_runs({metric!r})` lists them.",
                FloodWarning,
                stacklevel=3,
            )


def _numbers(value: Array) -> Array:
    """Integers as they are, since float64 has not all; other real ones in float64."""
    with np.errstate(invalid="ignore"):  # a signalling NaN warns of the cast
        return value if value.dtype.kind in "iuc" else value.astype(np.float64)


def _extreme(values: Array, mode: str | None, axis: int) -> Array:
    """The best number; NaN where there is none, for fmax and fmin pass over it."""
    return (np.fmax if mode == "max" else np.fmin).reduce(values, axis=axis)


def _mean_and_deviation(runs: Array) -> tuple[Array, Array]:
    """Of [runs, ...] over the runs; one run, or an infinite one, deviates by NaN."""
    # Infinite metrics are results like others: inf - inf is no reason for a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        mean = runs.mean(axis=0)
        if len(runs) < 2:
            return mean, np.full_like(mean, np.nan)
        return mean, runs.std(axis=0, ddof=1)
