"""GPJax: `fit`, and `fit_lbfgs`, on the hyperparameters of a regression."""

from typing import Any

import gpjax as gpx
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.trainers import rows
from benchmarks.trainers.problem import LEVEL, X, Y
from flood_optax import flooded, scale_by_flood

TITLE = "GPJax `fit`"
SECTION = "GPJax"
REQUIREMENTS = ("gpjax==1.0.0", "jax==0.10.2", "optax==0.2.8")
VARIABLES = {"JAX_ENABLE_X64": "1"}

DATA = gpx.Dataset(
    X=jnp.asarray(X[:, :2], jnp.float64), y=jnp.asarray(Y[:, None], jnp.float64)
)


def nll(posterior: Any, data: Any) -> Any:
    return -gpx.objectives.conjugate_mll(posterior, data) / data.n


def posterior() -> Any:
    prior = gpx.gps.Prior(
        mean_function=gpx.mean_functions.Constant(), kernel=gpx.kernels.RBF()
    )
    return prior * gpx.likelihoods.Gaussian()


def fitted(objective: Any, steps: int, optimizer: Any = None) -> Any:
    return gpx.fit(
        model=posterior(),
        objective=objective,
        train_data=DATA,
        optim=optimizer or optax.adam(0.02),
        num_iters=steps,
        verbose=False,
    )


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(400)
    recipe = run.recipe(
        gpx=gpx,
        posterior=posterior(),
        data=DATA,
        settings={"optim": optax.adam(0.02), "num_iters": steps, "verbose": False},
    )
    history = np.asarray(recipe["history"])

    chain = optax.chain(scale_by_flood(LEVEL), optax.adam(0.02))
    _, logged = fitted(flooded(nll, LEVEL), steps)
    assert logged.min() >= LEVEL > history.min()

    def searched(objective: Any) -> float:
        model, _ = gpx.fit_lbfgs(
            model=posterior(), objective=objective, train_data=DATA, max_iters=60
        )
        return float(nll(model, DATA))

    return rows.Row(
        form="loss form, raw value",
        line="`objective=flooded(nll, b, raw_value=True)`",
        logs="the raw objective",
        level=LEVEL,
        losses=rows.floats(history),
        value="no",
        evaluates_flooded=None,
        wrong=[
            rows.no_loss("`optim=` with a flood in it", lambda: fitted(nll, 1, chain)),
            rows.Wrong(
                "`objective=flooded(nll, b)` in `fit`",
                "floods; its history is the flooded loss, {least:.3f} at the least",
                {"least": float(logged.min())},
            ),
            rows.Wrong(
                "the recipe's objective in `fit_lbfgs`",
                "**{raw:.3f}**, for {right:.3f} with `flooded(nll, b)`",
                {
                    "raw": searched(flooded(nll, LEVEL, raw_value=True)),
                    "right": searched(flooded(nll, LEVEL)),
                },
            ),
        ],
    )
