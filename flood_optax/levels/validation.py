"""Levels from the validation metric of a run that has ended."""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.checks import (
    FloodWarning,
    as_integer,
    as_real_array,
    check_one_of,
    check_that,
    converted,
    is_real,
)
from flood_optax.levels.meshes import replicated
from flood_optax.precision import wide


def at_best(
    losses: ArrayLike,
    metric: ArrayLike,
    *,
    mode: Literal["max", "min"],
    window: int = 1,
) -> jax.Array:
    r"""Returns the training loss at the best validation step of a plain run.

    b = ``losses[t]`` with t the step at which ``metric``, or its mean over a window
    around the step, is best: what early stopping would have kept, as a level to train
    on at. Windows lie wholly in the run; t is in their middle, before it if they are
    even. Of equally good steps the first counts. A step does not count if its loss is
    not finite or its window has a NaN; -inf, which is off, if no step counts. Give it
    to `flood_optax.sweep.forked` as ``levels`` to stop and flood in a run and a part.

    Args:
      losses: real floats [steps], raw training losses, steps or epochs.
      metric: real numbers [steps], the validation metric at the same ones; integers of
        any width are compared exactly, floats in float32 at least.
      mode: "max" if a higher metric is better (accuracy), "min" for a validation loss.
      window: an int from 1 to the number of steps; several average out the noise of a
        small validation set.

    Returns:
      The level, a scalar of the dtype of ``losses``.

    Raises:
      ValueError: for shapes and windows that do not fit, and an unknown mode.
      TypeError: for losses that are no real floats, or a metric of no real numbers.

    Warns:
      FloodWarning: if the best window is the first of several: the level is then about
        the loss of the untrained model, and the mode perhaps the wrong one.

    Examples:
      >>> losses = [2.0, 1.5, 0.75, 0.5, 0.25]
      >>> accuracy = [0.2, 0.4, 0.7, 0.9, 0.3]
      >>> print(at_best(losses, accuracy, mode="max"))
      0.5
      >>> print(at_best(losses, accuracy, mode="max", window=3))
      0.75
    """
    check_one_of("at_best(mode=...)", mode, ("max", "min"))
    given = converted(jnp.asarray, "at_best(losses)", "be real floats", losses)
    loss = replicated(as_real_array(given, "at_best(losses)"))
    # NumPy keeps the 64 bits of integers that JAX would wrap.
    in_jax = any(isinstance(x, jax.Array) for x in jax.tree.leaves(metric))
    score = replicated(jnp.asarray(metric)) if in_jax else np.asarray(metric)
    real, got = is_real(score.dtype) or score.dtype == np.bool_, f"dtype {score.dtype}"
    check_that(real, "at_best(metric)", "be real numbers", got, error=TypeError)
    call, got = "at_best(losses, metric)", f"{loss.shape} and {score.shape}"
    fits = loss.shape == score.shape and loss.ndim == 1 and loss.size
    check_that(fits, call, "be of one shape [steps]", got)
    window = as_integer("at_best(window=...)", window, least=1)
    windows = loss.size - window + 1
    rule = f"be at most the {loss.size} steps"
    check_that(windows > 0, "at_best(window=...)", rule, window)
    sign = 1 if mode == "max" else -1
    middle = loss[(window - 1) // 2 :][:windows]
    best, counts = _best(score, sign, window, jnp.isfinite(middle))
    if not isinstance(best, Tracer) and best == 0 and counts and windows > 1:
        warnings.warn(
            f"`at_best(losses, metric, mode={mode!r})` is best in the first window: "
            "the level is about the loss before training. Is the mode right?",
            FloodWarning,
            stacklevel=2,
        )
    return jnp.where(counts, middle[best], -jnp.inf)


def _best(
    score: Any, sign: int, window: int, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first best window of those that count, and whether there is one."""
    if jnp.issubdtype(score.dtype, np.floating):
        # Added in one order everywhere, so that equal windows have equal means.
        means = sign * _moving_sum(wide(score), window) / window
        counts &= ~jnp.isnan(means)
        sums, worst = [means], -np.inf
    else:
        sums, worst = _exact_sums(score, sign, window), np.iinfo(np.int32).min
    # A step whose metric is the worst there is still goes before one without.
    for digit in sums:
        counts &= digit == jnp.where(counts, digit, worst).max()
    return jnp.argmax(counts), counts.any()


def _exact_sums(score: Any, sign: int, window: int) -> list[jax.Array]:
    """The sums of integers over each window, in digits, highest first."""
    bits = min(16, 31 - window.bit_length())  # so that the sum of digits fits 32
    digits = [score >> shift for shift in range(0, 8 * score.dtype.itemsize, bits)]
    low = (1 << bits) - 1  # the bits of a digit
    digits[:-1] = [digit & low for digit in digits[:-1]]  # the highest keeps the sign
    sums = []
    for digit in digits:
        # wraps around, and back where two are subtracted
        total = jnp.cumsum(jnp.asarray(digit.astype(np.int32)), dtype=jnp.int32)
        before = jnp.concatenate([jnp.zeros_like(total[:1]), total[:-window]])
        sums.append(sign * (total[window - 1 :] - before))
    for i in range(len(sums) - 1):
        sums[i + 1] += sums[i] >> bits  # what it holds too much, or owes
        sums[i] &= low
    return sums[::-1]


def _moving_sum(x: jax.Array, window: int) -> jax.Array:
    windows = x.size - window + 1
    return functools.reduce(operator.add, (x[i : i + windows] for i in range(window)))
