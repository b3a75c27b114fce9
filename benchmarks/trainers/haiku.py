"""Haiku, by the pattern of its examples: `transform`, and a loop in JAX."""

import pathlib
import pickle
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


def through_store(carry: Any, other: Any, folder: pathlib.Path) -> Any:
    del other  # pickled whole, nothing of it is left
    (folder / "half.pkl").write_bytes(pickle.dumps(jax.device_get(carry)))
    return pickle.loads((folder / "half.pkl").read_bytes())


def measure(run: rows.Run) -> rows.Row:
    framework = own_loop.Framework(start, NET.apply, jax.jit, through_store)
    return own_loop.measure(
        run,
        framework,
        lambda: run.recipe(x=X, y=Y),
        line="`tx.update(grads, opt_state, params, value=value)`",
    )
