"""Equinox, by the pattern of its examples: filtered gradients, `apply_updates`."""

from typing import Any

import equinox as eqx
import jax
import optax

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import flood, scale_by_flood

TITLE = "equinox"
SECTION = "Equinox"
REQUIREMENTS = ("equinox==0.13.8", "jax==0.10.2", "optax==0.2.8")


def linear(seed: int = 2) -> Any:
    return eqx.nn.Linear(4, "scalar", key=jax.random.key(seed))


def started(optimizer: Any, seed: int = 2) -> Any:
    model = linear(seed)
    return model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def evaluate(model: Any) -> Any:
    return jax.numpy.mean((jax.vmap(model)(VALID_X) - VALID_Y) ** 2)


def outside(model: Any, x: Any = VALID_X, y: Any = VALID_Y) -> float:
    return problem.mse(jax.vmap(model)(x), y)


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(x=X, y=Y)
    tx, steps = recipe["optimizer"], run.steps(200)

    def step(carry: Any) -> Any:
        *carry, loss = recipe["train_step"](*carry, X, Y)
        return carry, loss

    def trained(carry: Any, steps: int) -> Any:
        return rows.follow(
            step, carry, steps, lambda c: evaluate(c[0]), lambda c: outside(c[0])
        )

    unbroken, path = trained(started(tx), steps)
    carry, _ = trained(started(tx), steps // 2)
    eqx.tree_serialise_leaves(run.work / "half.eqx", carry)
    again = eqx.tree_deserialise_leaves(run.work / "half.eqx", started(tx, seed=7))
    resumed, _ = trained(again, steps - steps // 2)

    # a window of micro-batches, at a level just below the loss of the whole batch
    start = linear()
    level = outside(start, X, Y) * 0.999
    sgd = optax.chain(scale_by_flood(level), optax.sgd(0.01))

    def window(optimizer: Any, parts: Any) -> Any:
        own = run.recipe(x=X, y=Y)
        own["optimizer"] = optimizer  # which the step of the recipe reads
        carry = started(optimizer)
        for x, y in parts:
            *carry, _ = own["train_step"](*carry, x, y)
        return carry[0]

    parts = problem.parts(jax.vmap(start)(X))
    whole = window(sgd, [(X, Y)])
    by_flood = window(flood(optax.sgd(0.01), level, every_k=4), parts)
    by_steps = window(optax.MultiSteps(sgd, 4).gradient_transformation(), parts)
    return rows.Row(
        form="either form",
        level=LEVEL,
        losses=path.losses,
        value="you call `update`",
        evaluation=path.evaluation,
        evaluation_raw=path.evaluation_raw,
        accumulation=rows.distance(whole, by_flood),
        resume=rows.distance(unbroken[0], resumed[0]),
        wrong=[
            rows.Wrong(
                "`optax.MultiSteps(optimizer, 4)` with the flood in `optimizer`",
                "the last micro-batch's loss decides: the step is off the whole "
                "batch's by {off:.0%} of its length",
                {"off": rows.off_by(by_steps, whole, start)},
            )
        ],
    )
