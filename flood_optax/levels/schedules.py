"""Levels that follow the step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.checks import as_integer, check_scalar_level


def warmup(
    level: ArrayLike | Callable[[jax.Array], ArrayLike], start_step: int
) -> Callable[[jax.Array], jax.Array]:
    r"""Returns a schedule that floods from a step on.

    b(t) = -inf, which is off, for t < ``start_step``, and ``level`` from there on: a
    high level from the first step would suppress early learning.

    Args:
      level: a scalar, or a schedule from the step (not shifted) to one.
      start_step: the first step that floods, an int >= 0; windows under ``every_k``.

    Returns:
      A schedule step -> level for `flood_optax.scale_by_flood` and
      `flood_optax.flood`, a float32 scalar.

    Examples:
      >>> schedule = warmup(0.25, start_step=2)
      >>> print([float(schedule(step)) for step in range(4)])
      [-inf, -inf, 0.25, 0.25]
    """
    if not callable(level):
        check_scalar_level(level, "warmup(level=...)")
    if not isinstance(start_step, Tracer):
        as_integer("warmup(start_step=...)", start_step, least=0)

    def level_at(step: ArrayLike) -> jax.Array:
        now = jnp.asarray(level(jnp.asarray(step)) if callable(level) else level)
        now = now.astype(jnp.float32)
        return jnp.where(jnp.asarray(step) < start_step, -jnp.inf, now)

    return level_at
