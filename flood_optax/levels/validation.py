"""Levels from a validation metric: while training, and from a run that has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flood_optax.bend import wide
from flood_optax.checks import integer, number, one_of, real_array, scalar


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
      metric: real numbers [steps], the validation metric at the same ones.
      mode: "max" if a higher metric is better (accuracy), "min" for a validation loss.
      window: an int from 1 to the number of steps; several average out the noise of a
        small validation set.

    Returns:
      The level, a scalar of the dtype of ``losses``.

    Examples:
      >>> losses = [1.5, 0.75, 0.5, 0.25]
      >>> accuracy = [0.4, 0.7, 0.9, 0.3]
      >>> print(at_best(losses, accuracy, mode="max"))
      0.5
      >>> print(at_best(losses, accuracy, mode="max", window=3))
      0.75
    """
    one_of("at_best(mode=...)", mode, ("max", "min"))
    loss = real_array(jnp.asarray(losses), "at_best(losses)")
    score = jnp.asarray(metric)
    if loss.shape != score.shape or loss.ndim != 1 or loss.size == 0:
        raise ValueError(
            "`at_best(losses, metric)` must be of one shape [steps], got "
            f"{loss.shape} and {score.shape}."
        )
    window = integer("at_best(window=...)", window, least=1)
    windows = loss.size - window + 1
    if windows < 1:
        raise ValueError(
            f"`at_best(window=...)` must be at most the {loss.size} steps, got "
            f"{window}."
        )
    score = wide(score) if mode == "max" else -wide(score)
    # Added in one order everywhere, so that equal windows have equal means.
    means = sum(score[i : i + windows] for i in range(window)) / window
    middle = loss[(window - 1) // 2 :][:windows]
    counts = jnp.isfinite(middle) & ~jnp.isnan(means)
    # A step whose metric is the worst there is still goes before one without.
    best = counts & (means == jnp.where(counts, means, -jnp.inf).max())
    return jnp.where(best.any(), middle[jnp.argmax(best)], -jnp.inf)


class PlateauState(NamedTuple):
    """What `on_plateau` remembers; scalars, float32 but for ``waited``, an int32.

    Attributes:
      level: the level in force.
      best: the best metric so far; for mode="min" metrics are negated.
      waited: updates in the window so far.
      window_best: the best metric among those updates.
      before: what it is compared with: the best of the window before at this level, inf
        after a new best, -inf after a move.
    """

    level: jax.Array
    best: jax.Array
    waited: jax.Array
    window_best: jax.Array
    before: jax.Array


def on_plateau(
    initial: float,
    *,
    step: float,
    patience: int,
    mode: Literal["max", "min"],
    minimum: float = 0.0,
    maximum: float = float("inf"),
) -> tuple[
    Callable[[], PlateauState],
    Callable[[PlateauState, ArrayLike], tuple[jax.Array, PlateauState]],
]:
    r"""Returns a level that moves when a validation metric stops improving.

    A window ends after ``patience`` updates in a row without a new best metric. The
    level then moves by ``step``, within [``minimum``, ``maximum``],

    * up, if the metric decays at the level in force (the model overfits): its best in
      the window is worse than in the one before, or than the best just left behind;
    * down, if it has ceased to decay, but is still worse than its best: the level costs
      more than it saves;
    * up, if it is as good as its best: the level has cost nothing yet.

    The window after a move is the first to compare with, and moves the level only in
    the last case: what counts is the trend at a level, not the effect of the step. So
    the level hovers at the lowest that keeps the metric from decaying. The rule is
    ours. A metric equal to the best is no new best, a NaN metric never is one.

    Args:
      initial: the level to start from, in [minimum, maximum].
      step: > 0, by how much it moves.
      patience: an int >= 1; in updates, usually epochs.
      mode: "max" if a higher metric is better (accuracy), "min" for a validation loss.
      minimum: the lowest level, finite.
      maximum: the highest, +inf for none.

    Returns:
      (init, update): ``init()`` gives a PlateauState and ``update(state, metric)`` the
      level to use from now on, a float32 scalar, and the next state; both can be jitted
      and scanned. Take the metric from plain evaluation, which is never flooded.

    Examples:
      >>> init, update = on_plateau(0.0, step=0.25, patience=1, mode="max")
      >>> state, levels = init(), []
      >>> for accuracy in (0.7, 0.8, 0.7, 0.6, 0.5, 0.6, 0.7):
      ...     level, state = update(state, accuracy)
      ...     levels.append(float(level))
      >>> print(levels)
      [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.25]
    """
    number("on_plateau(minimum=...)", minimum, "finite", np.isfinite)
    number("on_plateau(maximum=...)", maximum, "a level", lambda m: m > -np.inf)
    between = f"finite and in [{minimum}, {maximum}]"
    number(
        "on_plateau(initial=...)",
        initial,
        between,
        lambda b: bool(np.isfinite(b)) and minimum <= b <= maximum,
    )
    number("on_plateau(step=...)", step, "positive", lambda s: 0 < s < np.inf)
    integer("on_plateau(patience=...)", patience, least=1)
    one_of("on_plateau(mode=...)", mode, ("max", "min"))

    def init() -> PlateauState:
        # An array for each field: a train step that donates the state frees them all.
        level, best, window_best, before = (
            jnp.full([], number, jnp.float32)
            for number in (initial, -jnp.inf, -jnp.inf, jnp.inf)
        )
        waited = jnp.zeros([], jnp.int32)
        return PlateauState(level, best, waited, window_best, before)

    def update(
        state: PlateauState, metric: ArrayLike
    ) -> tuple[jax.Array, PlateauState]:
        scalar("on_plateau().update(metric)", metric)
        score = jnp.asarray(metric, jnp.float32) * (1 if mode == "max" else -1)
        improved = score > state.best
        best = jnp.where(improved, score, state.best)
        window = jnp.where(score > state.window_best, score, state.window_best)
        before = jnp.where(improved, jnp.inf, state.before)
        waited = jnp.where(improved, 0, state.waited + 1)
        ends = waited >= patience
        moves = ends & ((before > -jnp.inf) | (window == best))
        lowers = (before <= window) & (window < best)
        moved = jnp.clip(state.level + jnp.where(lowers, -step, step), minimum, maximum)
        level = jnp.where(moves, moved, state.level).astype(jnp.float32)
        return level, PlateauState(
            level=level,
            best=best,
            waited=jnp.where(ends, 0, waited),
            window_best=jnp.where(ends | improved, -jnp.inf, window),
            before=jnp.where(moves, -jnp.inf, jnp.where(ends, window, before)),
        )

    return init, update
