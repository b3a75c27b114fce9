"""`optax.contrib.schedule_free`: gradients at one point, evaluation at another."""

from typing import Any

import jax
import numpy as np
import optax
from optax import contrib

from benchmarks.trainers import own_loop, rows
from benchmarks.trainers.problem import LEVEL
from flood_optax import flood

TITLE = "`contrib.schedule_free`"
SECTION = "Schedule-free"
REQUIREMENTS = ("optax==0.2.8", "jax==0.12.0.1")
START = np.ones(4, np.float32)


def averages(carry: Any) -> Any:
    params, state = carry
    return contrib.schedule_free_eval_params(state, params)


def measure(run: rows.Run) -> rows.Row:
    framework = own_loop.Framework(
        lambda tx, _: (START, tx.init(START)),
        lambda carry, x: x @ averages(carry),
        jax.jit,
        own_loop.pickled,
        lambda carry: carry,
    )
    # fewer steps than 200 do not come to the level
    followed = own_loop.followed(run, framework, run.recipe(), 200)
    around = flood(contrib.schedule_free(optax.sgd(0.05), 0.05), LEVEL).init(START)
    hidden = rows.refusal(lambda: averages((START, around)))
    averages((START, around.flood_inner_state))
    return rows.Row(
        form="optax form",
        line="`contrib.schedule_free(optax.chain(scale_by_flood(b), optax.sgd(r)), r)`",
        logs="what the step returns, the raw loss at the training parameters",
        level=LEVEL,
        value="you call `update`",
        **followed,
        wrong=[
            rows.Wrong(
                "`flood(contrib.schedule_free(...), b)`, then "
                "`contrib.schedule_free_eval_params(state, params)`",
                f"{hidden.partition(':')[0]}: pass `state.flood_inner_state`",
                {},
            )
        ],
    )
