"""Every form of flooding: the one list that tests run through."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flood_optax import (
    FloodState,
    Shape,
    flood,
    flood_mean,
    flooded,
    scale_by_flood,
    shapes,
)

# name -> (inner, level, **options) -> the optimizer
OPTAX = {
    "scale_by_flood": lambda inner, level, **options: scale_by_flood(level, **options),
    "chain": lambda inner, level, **options: optax.chain(
        scale_by_flood(level, **options), inner
    ),
    "flood": lambda inner, level, **options: flood(inner, level, **options),
    "flood_every_k": lambda inner, level, *, every_k=2, **options: flood(
        inner, level, every_k=every_k, **options
    ),
    "flood_skip": lambda inner, level, **options: flood(
        inner, level, should_skip_update_fn=optax.skip_not_finite, **options
    ),
}

# name -> (losses_fn, level, **options) -> the scalar objective of the batch's mean
LOSS = {
    "flooded": lambda losses_fn, level, **options: flooded(
        lambda *args: losses_fn(*args).mean(), level, **options
    ),
    "flood_mean": lambda losses_fn, level, **options: (
        lambda *args: flood_mean(losses_fn(*args), level, **options)
    ),
}

SHAPES = {
    "reflect": shapes.reflect(),
    "soft": shapes.soft(0.7),
    "pause": shapes.pause(),
    "asymmetric": shapes.asymmetric(0.5, 0.125),
}
STEEPER = Shape(  # than |r|, the more so the farther away
    lambda r: jnp.abs(r) + r * r / 2,
    lambda r: jnp.where(r >= 0, 1 + r, r - 1),
)


def optimizers(inner, level, **options):
    """Every optax form with `inner` behind it."""
    return {
        name: make(inner, level, **options)
        for name, make in OPTAX.items()
        if name != "scale_by_flood"
    }


def objectives(losses_fn, level, **options):
    """Every loss form of the mean of the losses."""
    return {name: make(losses_fn, level, **options) for name, make in LOSS.items()}


def walk(level, band, steps=400, parts=None):
    """Losses through a band, often at its ends, now and then NaN or infinite.

    With `parts` they are whole numbers of such parts of 1, as far as they are neither.
    """
    rng = np.random.default_rng(0)
    drift = np.repeat(rng.choice([-1.0, 1.0], steps // 8), 8)
    losses = level + 2.2 * band * np.sin(np.cumsum(0.3 * drift + 0.2)) + 0.02
    losses = np.round(parts * losses) / parts if parts else losses
    kinds = rng.integers(0, 20, steps)
    for kind, loss in enumerate((level + band, level - band, np.nan, np.inf, -np.inf)):
        losses = np.where(kinds == kind, loss, losses)
    return losses


def course(optimizer, **each):
    """The update of a 1 at each step, and the fields of the FloodState after it.

    Args:
        optimizer: Any form.
        each: What `update` is given: value, weight, flush, with a row for every step.
    """
    one = jnp.ones([], jnp.float32)

    def step(state, row):
        update, state = optimizer.update(one, state, one, **row)
        fields = {name: optax.tree.get(state, name) for name in FloodState._fields}
        return state, {"multiplier": update, **fields}

    return jax.lax.scan(step, optimizer.init(one), each)[1]
