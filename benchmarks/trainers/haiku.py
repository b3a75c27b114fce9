"""Haiku, by the pattern of its examples: `transform`, and a loop in JAX."""

import pickle
from typing import Any

import haiku as hk
import jax
import optax

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import flood, scale_by_flood

TITLE = "haiku"
SECTION = "Haiku"
REQUIREMENTS = ("dm-haiku==0.0.17", "jax==0.10.2", "optax==0.2.8")

NET = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1)(x)[:, 0]))
PARAMS = NET.init(jax.random.key(3), X)


def started(optimizer: Any) -> Any:
    return PARAMS, optimizer.init(PARAMS)


@jax.jit
def evaluate(params: Any) -> Any:
    return jax.numpy.mean((NET.apply(params, VALID_X) - VALID_Y) ** 2)


def outside(params: Any, x: Any = VALID_X, y: Any = VALID_Y) -> float:
    return problem.mse(NET.apply(params, x), y)


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
    (run.work / "half.pkl").write_bytes(pickle.dumps(jax.device_get(carry)))
    again = pickle.loads((run.work / "half.pkl").read_bytes())
    resumed, _ = trained(again, steps - steps // 2)

    # a window of micro-batches, at a level just below the loss of the whole batch
    start = PARAMS
    level = outside(start, X, Y) * 0.999
    sgd = optax.chain(scale_by_flood(level), optax.sgd(0.01))

    def window(optimizer: Any, parts: Any) -> Any:
        own = run.recipe(x=X, y=Y)
        own["optimizer"] = optimizer  # which the step of the recipe reads
        carry = started(optimizer)
        for x, y in parts:
            *carry, _ = own["train_step"](*carry, x, y)
        return carry[0]

    parts = problem.parts(NET.apply(start, X))
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
