"""Every form of flooding: the one list that tests run through."""

import jax
import jax.numpy as jnp
import optax

from flood_optax import FloodState, flood, flood_mean, flooded, scale_by_flood, shapes

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
