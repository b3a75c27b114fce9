"""Two rules for the level that are ours and lost: kept to make their records again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


def accordance_level(losses: Any, accordances: Any, *, threshold: float) -> jax.Array:
    """The loss [epochs] where the accordance first is below the threshold, or -inf."""
    below = jnp.asarray(accordances) < threshold
    return jnp.where(below.any(), jnp.asarray(losses)[jnp.argmax(below)], -jnp.inf)


class PlateauState(NamedTuple):
    """The level, the best metric, and the window since; a lower metric is better.

    Attributes:
      level: in force.
      best: the best metric so far, negated, as the following ones.
      waited: updates in the window.
      window_best: the best among those.
      before: that of the window before at this level, inf after a new best, -inf after
        a move.
    """

    level: jax.Array
    best: jax.Array
    waited: jax.Array
    window_best: jax.Array
    before: jax.Array


def on_plateau(
    *, step: Any, patience: int
) -> tuple[
    Callable[[], PlateauState],
    Callable[[PlateauState, Any], tuple[jax.Array, PlateauState]],
]:
    """A level that moves, from 0 on, when ``patience`` metrics have brought no best.

    Up by a step, if the window's best is worse than that of the window before, or as
    good as the best of all; down otherwise. The window after a move moves nothing but
    in the second case: it is the first to compare with.
    """

    def init() -> PlateauState:
        numbers = (0, -jnp.inf, -jnp.inf, jnp.inf)
        level, best, window, before = (jnp.float32(number) for number in numbers)
        return PlateauState(level, best, jnp.int32(0), window, before)

    def update(state: PlateauState, metric: Any) -> tuple[jax.Array, PlateauState]:
        score = -jnp.asarray(metric, jnp.float32)
        improved = score > state.best
        best = jnp.where(improved, score, state.best)
        window = jnp.where(score > state.window_best, score, state.window_best)
        before = jnp.where(improved, jnp.inf, state.before)
        waited = jnp.where(improved, 0, state.waited + 1)
        ends = waited >= patience
        moves = ends & ((before > -jnp.inf) | (window == best))
        lowers = (before <= window) & (window < best)
        moved = jnp.maximum(state.level + jnp.where(lowers, -step, step), 0)
        level = jnp.where(moves, moved, state.level).astype(jnp.float32)
        return level, PlateauState(
            level=level,
            best=best,
            waited=jnp.where(ends, 0, waited),
            window_best=jnp.where(ends | improved, -jnp.inf, window),
            before=jnp.where(moves, -jnp.inf, jnp.where(ends, window, before)),
        )

    return init, update
