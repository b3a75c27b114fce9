"""Grain: shuffled micro-batches, and a checkpoint of the iterator with the rest."""

import pathlib
from typing import Any

import grain
import jax
import numpy as np
import optax

from benchmarks.trainers import own_loop, rows
from benchmarks.trainers.problem import LEVEL, X, Y

TITLE = "Grain, in a loop of your own"
SECTION = "Grain"
REQUIREMENTS = ("grain==0.2.18", "jax==0.12.0.1", "optax==0.2.8")
START = np.zeros(4, np.float32)
PARTS = 4  # micro-batches of an epoch, so that a window is an epoch


def epoch(train_step: Any, carry: Any, *whole: Any) -> Any:
    """In its batches, not the whole one; the raw loss of its window is in the state."""
    del whole
    params, state, batches = carry
    for _ in range(PARTS):
        batch = next(batches)
        params, state, _ = train_step(params, state, *batch.values())
    return (params, state, batches), optax.tree.get(state, "flood_value")


def through_store(carry: Any, other: Any, folder: pathlib.Path) -> Any:
    *kept, batches = carry
    stored = own_loop.pickled([*kept, batches.get_state()], other, folder)
    params, state, place = stored
    other[-1].set_state(place)
    return params, state, other[-1]


def measure(run: rows.Run) -> rows.Row:
    data = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]
    recipe = run.recipe(grain=grain, data=data)

    def start(tx: Any, _: int) -> Any:
        return START, tx.init(START), iter(recipe["batches"].to_iter_dataset())

    framework = own_loop.Framework(
        start,
        lambda carry, x: x @ carry[0],
        lambda function: function,  # an iterator is no argument of `jax.jit`
        through_store,
        lambda carry: carry[:2],
        epoch,
    )
    # an epoch in windows, and as one batch
    (window, *_), _ = epoch(recipe["train_step"], start(recipe["tx"], 0))
    grads = jax.grad(lambda w: jax.numpy.mean((X @ w - Y) ** 2))(START)
    adam = optax.adam(0.05)
    due = optax.apply_updates(START, adam.update(grads, adam.init(START), START)[0])
    return rows.Row(
        form="`flood`, windows of an epoch's batches",
        line="`flood(optimizer, b, every_k=4)`",
        logs='`optax.tree.get(state, "flood_value")`, the raw loss of the window',
        level=LEVEL,
        value="you call `update`",
        **own_loop.followed(run, framework, recipe, run.steps(200)),
        accumulates="the window, by `every_k`",
        accumulation=rows.distance(window, due),
    )
