"""Haiku, by the pattern of its examples: `transform`, and a loop in JAX."""

from typing import Any

import haiku as hk
import jax

from benchmarks.trainers import own_loop, rows
from benchmarks.trainers.problem import X, Y

TITLE = "Haiku"
SECTION = "Haiku"
REQUIREMENTS = ("dm-haiku==0.0.17", "jax==0.12.0.1", "optax==0.2.8")

NET = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)[:, 0]))


def start(tx: Any, seed: int) -> Any:
    params = NET.init(jax.random.key(3 + seed), X)
    return params, tx.init(params)


def measure(run: rows.Run) -> rows.Row:
    framework = own_loop.Framework(
        start, lambda carry, x: NET.apply(carry[0], x), jax.jit, own_loop.pickled
    )
    return own_loop.measure(
        run,
        framework,
        lambda: run.recipe(x=X, y=Y),
        line="`tx.update(grads, opt_state, params, value=value)`",
    )
