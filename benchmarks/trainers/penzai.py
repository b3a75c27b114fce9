"""Penzai: the toolshed's `StatefulTrainer`, on a small network."""

import functools
from typing import Any

import jax
import optax
from penzai import pz
from penzai.models import simple_mlp
from penzai.toolshed import basic_training

from benchmarks.trainers import rows
from benchmarks.trainers.problem import LEVEL, X, Y
from flood_optax import flooded, scale_by_flood

TITLE = "Penzai `StatefulTrainer`"
SECTION = "Penzai"
REQUIREMENTS = ("penzai==0.2.5", "jax==0.12.0.1", "optax==0.2.8")

DATA = {"x": pz.nx.wrap(X, "batch", "features"), "y": Y}


def given() -> dict[str, Any]:
    """What the recipe asks for, made anew: a trainer changes its model in place."""
    return {
        "basic_training": basic_training,
        "optax": optax,
        "rng": jax.random.key(1),
        "model": simple_mlp.MLP.from_config(jax.random.key(0), [4, 16, 1]),
    }


def trained(trainer: Any, steps: int) -> list[float]:
    return [float(trainer.step(**DATA)) for _ in range(steps)]


def step(**changed: Any) -> Any:
    """Of a trainer that differs from the recipe's."""
    made = given()
    arguments = {"optimizer_def": optax.adam(0.02), **changed}
    build = basic_training.StatefulTrainer.build
    return build(made["rng"], made["model"], **arguments).step(**DATA)


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(**given())
    losses = trained(recipe["trainer"], run.steps(400))

    chain = optax.chain(scale_by_flood(LEVEL), optax.adam(0.02))
    loss_fn = recipe["loss_fn"]
    changed = functools.partial(step, optimizer_def=chain, loss_fn=loss_fn)
    no_loss = rows.no_loss("`optimizer_def=` with a flood in it", changed)
    both = flooded(loss_fn, LEVEL, has_aux=True)
    triple = rows.refusal(lambda: step(loss_fn=both))
    assert "tuple" in triple, triple
    return rows.Row(
        form="`flood_loss`",
        line="`return flood_loss(loss, b), state, loss`, in `loss_fn`",
        logs="what `step` returns, the raw loss",
        level=LEVEL,
        losses=losses,
        value="no",
        evaluates_flooded=None,
        wrong=[
            no_loss,
            rows.Wrong(
                "`loss_fn=flooded(loss_fn, b, has_aux=True)`",
                "refused: the loss function returns three things",
                {},
            ),
        ],
    )
