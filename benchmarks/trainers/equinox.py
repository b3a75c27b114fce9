"""Equinox, by the pattern of its examples: filtered gradients, `apply_updates`."""

import pathlib
from typing import Any

import equinox as eqx
import jax

from benchmarks.trainers import own_loop, rows
from benchmarks.trainers.problem import X, Y

TITLE = "Equinox"
SECTION = "Equinox"
REQUIREMENTS = ("equinox==0.13.8", "jax==0.12.0.1", "optax==0.2.8")


def start(tx: Any, seed: int) -> Any:
    model = eqx.nn.Linear(4, "scalar", key=jax.random.key(2 + seed))
    return model, tx.init(eqx.filter(model, eqx.is_inexact_array))


def through_store(carry: Any, other: Any, folder: pathlib.Path) -> Any:
    eqx.tree_serialise_leaves(folder / "half.eqx", carry)
    return eqx.tree_deserialise_leaves(folder / "half.eqx", other)


def predict(carry: Any, x: Any) -> Any:
    return jax.vmap(carry[0])(x)


def measure(run: rows.Run) -> rows.Row:
    framework = own_loop.Framework(start, predict, eqx.filter_jit, through_store)
    return own_loop.measure(
        run,
        framework,
        lambda: run.recipe(x=X, y=Y),
        line="`tx.update(grads, opt_state, params, value=value)`",
    )
