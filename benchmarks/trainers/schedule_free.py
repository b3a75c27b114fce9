"""`optax.contrib.schedule_free`: gradients at one point, evaluation at another."""

import pickle
from typing import Any

import jax
import numpy as np
import optax
from optax import contrib

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import flood

TITLE = "`contrib.schedule_free`"
SECTION = "Schedule-free"
REQUIREMENTS = ("optax==0.2.8", "jax==0.12.0.1")
START = np.ones(4, np.float32)


def measure(run: rows.Run) -> rows.Row:
    recipe, steps = run.recipe(), 200  # fewer do not come to the level
    loss_fn, tx = recipe["loss_fn"], recipe["tx"]

    def step(carry: Any) -> Any:
        *carry, loss = recipe["train_step"](*carry, X, Y)
        return carry, loss

    def averages(carry: Any) -> Any:
        params, state = carry
        return contrib.schedule_free_eval_params(state, params)

    def trained(carry: Any, steps: int) -> Any:
        return rows.follow(
            step,
            carry,
            steps,
            lambda carry: loss_fn(averages(carry), VALID_X, VALID_Y),
            lambda carry: problem.mse(VALID_X @ np.asarray(averages(carry)), VALID_Y),
        )

    start = START, tx.init(START)
    unbroken, path = trained(start, steps)
    half, _ = trained(start, steps // 2)
    stored = pickle.dumps(jax.device_get(half))
    resumed, _ = trained(pickle.loads(stored), steps - steps // 2)
    around = flood(contrib.schedule_free(optax.sgd(0.05), 0.05), LEVEL).init(START)
    hidden = rows.refusal(lambda: averages((START, around)))
    averages((START, around.flood_inner_state))
    return rows.Row(
        form="optax form",
        line="`contrib.schedule_free(optax.chain(scale_by_flood(b), optax.sgd(r)), r)`",
        logs="what the step returns, the raw loss at the training parameters",
        level=LEVEL,
        losses=path.losses,
        value="you call `update`",
        evaluation=path.evaluation,
        evaluation_raw=path.evaluation_raw,
        resume=rows.distance(unbroken, resumed),
        notes={"averages": problem.mse(X @ np.asarray(averages(unbroken)), Y)},
        wrong=[
            rows.Wrong(
                "`flood(contrib.schedule_free(...), b)`, then "
                "`contrib.schedule_free_eval_params(state, params)`",
                f"{hidden.partition(':')[0]}: pass `state.flood_inner_state`",
                {},
            )
        ],
    )
