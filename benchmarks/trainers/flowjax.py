"""FlowJAX: `fit_to_data`, which trains a density and chooses its best epoch."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data, train_utils
from flowjax.train.losses import MaximumLikelihoodLoss

from benchmarks.trainers import rows
from flood_optax import flooded, scale_by_flood

TITLE = "FlowJAX `fit_to_data`"
SECTION = "FlowJAX"
REQUIREMENTS = ("flowjax==19.1.2", "jax==0.12.0.1", "optax==0.2.8")

LEVEL = 2.0
KEY = jax.random.key(3)
_noise = np.random.default_rng(1).normal(size=(240, 2))
DATA = jnp.asarray(
    np.stack([_noise[:, 0], 0.3 * _noise[:, 1] + _noise[:, 0] ** 2], 1), jnp.float32
)
RAW = MaximumLikelihoodLoss()


def flow() -> Any:
    return masked_autoregressive_flow(
        jax.random.key(0),
        base_dist=Normal(jnp.zeros(2)),
        flow_layers=2,
        nn_width=16,
        nn_depth=1,
    )


def settings(epochs: int, **changed: Any) -> dict[str, Any]:
    return {
        "optimizer": optax.adam(0.01),
        "batch_size": 120,  # of 180 and 60: one batch each, so that a step is an epoch
        "val_prop": 0.25,
        "max_epochs": epochs,
        "max_patience": epochs,
        "show_progress": False,
        **changed,
    }


def validation_loss(dist: Any) -> float:
    """What `fit_to_data` should report as its validation loss, computed outside."""
    _, split = jax.random.split(KEY)
    _, (held_out,) = train_utils.train_val_split(split, (DATA,), val_prop=0.25)
    params, static = eqx.partition(
        dist,
        eqx.is_inexact_array,
        is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable),
    )
    return float(RAW(params, static, held_out))


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(250)

    def trained(**changed: Any) -> dict[str, Any]:
        return run.recipe(
            MaximumLikelihoodLoss=MaximumLikelihoodLoss,
            fit_to_data=fit_to_data,
            key=KEY,
            flow=flow(),
            x=DATA,
            settings=settings(**{"epochs": steps, **changed}),
        )

    recipe = trained()
    losses = recipe["losses"]
    best = validation_loss(recipe["flow"])
    ends = [trained(epochs=epochs, return_best=False) for epochs in (steps // 2, steps)]
    own = [min(losses["val"]), *(end["losses"]["val"][-1] for end in ends)]
    raw = [best, *(validation_loss(end["flow"]) for end in ends)]

    chain = optax.chain(scale_by_flood(LEVEL), optax.adam(0.01))
    chosen, watched = fit_to_data(
        KEY, flow(), DATA, loss_fn=flooded(RAW, LEVEL), **settings(steps)
    )
    floor = min(watched["val"])
    chosen_loss = validation_loss(chosen)
    assert floor >= LEVEL > best
    return rows.Row(
        form="loss form, raw value",
        line="`flooded(MaximumLikelihoodLoss(), b, raw_value=True)`",
        logs="the raw loss, in training and validation",
        level=LEVEL,
        losses=losses["train"],
        value="no",
        evaluation=own,
        evaluation_raw=raw,
        evaluates_flooded=True,
        wrong=[
            rows.no_loss(
                "`optimizer=` with a flood in it",
                lambda: fit_to_data(KEY, flow(), DATA, **settings(1, optimizer=chain)),
            ),
            rows.Wrong(
                "`loss_fn=flooded(MaximumLikelihoodLoss(), b)`",
                "validation has a floor at {floor:.3f}: the best epoch by it has "
                "{chosen:.3f}, the best one {best:.3f}",
                {"floor": floor, "chosen": chosen_loss, "best": best},
            ),
        ],
    )
