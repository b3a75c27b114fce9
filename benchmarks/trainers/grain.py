"""Grain: shuffled micro-batches, and a checkpoint of the iterator with the rest."""

import pickle
from typing import Any

import grain
import jax
import numpy as np
import optax

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import scale_by_flood

TITLE = "Grain, in a loop of your own"
SECTION = "Grain"
REQUIREMENTS = ("grain==0.2.18", "jax==0.12.0.1", "optax==0.2.8")
START = np.zeros(4, np.float32)
PARTS = 4  # micro-batches of an epoch, so that a window is an epoch


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(
        grain=grain,
        data=[{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
    )
    evaluate = jax.jit(lambda w: jax.numpy.mean((VALID_X @ w - VALID_Y) ** 2))

    def iterator() -> Any:
        return iter(recipe["batches"].to_iter_dataset())

    def step(carry: Any) -> Any:
        """An epoch, and the raw loss of its window, which the state keeps."""
        params, state, batches = carry
        for _ in range(PARTS):
            batch = next(batches)
            params, state, _ = recipe["train_step"](params, state, *batch.values())
        return (params, state, batches), optax.tree.get(state, "flood_value")

    def trained(carry: Any, steps: int) -> Any:
        return rows.follow(
            step,
            carry,
            steps,
            lambda carry: evaluate(carry[0]),
            lambda carry: problem.mse(VALID_X @ np.asarray(carry[0]), VALID_Y),
        )

    def started() -> Any:
        return START, recipe["tx"].init(START), iterator()

    steps = run.steps(200)
    unbroken, path = trained(started(), steps)
    (*half, batches), _ = trained(started(), steps // 2)
    stored = pickle.dumps((jax.device_get(half), batches.get_state()))
    half, place = pickle.loads(stored)
    batches = iterator()
    batches.set_state(place)
    resumed, _ = trained((*half, batches), steps - steps // 2)

    # an epoch in windows, and as one batch
    (window, *_), _ = trained(started(), 1)
    grads = jax.grad(lambda w: jax.numpy.mean((X @ w - Y) ** 2))(START)
    adam = optax.adam(0.05)
    due = optax.apply_updates(START, adam.update(grads, adam.init(START), START)[0])

    # without windows every batch of 16 is flooded by itself
    each = optax.chain(scale_by_flood(LEVEL), optax.adam(0.05))
    recipe["tx"] = each  # which the step reads
    w, state, batches = START, each.init(START), iterator()
    epochs: list[float] = []
    for _ in range(steps):
        for _ in range(PARTS):
            batch = next(batches)
            w, state, _ = recipe["train_step"](w, state, *batch.values())
        epochs.append(problem.mse(X @ np.asarray(w), Y))
    return rows.Row(
        form="`flood`, windows of an epoch's batches",
        line="`flood(optimizer, b, every_k=4)`",
        logs='`optax.tree.get(state, "flood_value")`, the raw loss of the window',
        level=LEVEL,
        losses=path.losses,
        value="you call `update`",
        evaluation=path.evaluation,
        evaluation_raw=path.evaluation_raw,
        accumulates="the window, by `every_k`",
        accumulation=rows.distance(window, due),
        resume=rows.distance(unbroken[:2], resumed[:2]),
        notes={"each_batch": float(np.mean(epochs[-rows.LAST :]))},
    )
