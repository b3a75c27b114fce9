"""Flax NNX, by the pattern of its examples: `nnx.Optimizer`."""

import pathlib
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from benchmarks.trainers import own_loop, rows
from benchmarks.trainers.problem import X, Y

TITLE = "Flax `nnx.Optimizer`"
SECTION = "Flax NNX"
REQUIREMENTS = ("flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8")


def params(carry: Any) -> Any:
    state = nnx.state(carry[0], nnx.Param)
    return jax.tree.map(np.asarray, nnx.to_pure_dict(state))


def through_store(carry: Any, other: Any, folder: pathlib.Path) -> Any:
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "nnx", nnx.state(carry))
    with ocp.StandardCheckpointer() as saver:
        nnx.update(other, saver.restore(folder / "nnx", nnx.state(other)))
    return other


def framework(network: Any) -> own_loop.Framework:
    """Flax, for a network that is made from random numbers."""

    def start(tx: Any, seed: int) -> Any:
        model = network(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    return own_loop.Framework(
        start,
        lambda carry, x: carry[0](x)[:, 0],
        nnx.jit,
        through_store,
        params,
        own_loop.in_place,
    )


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(x=X, y=Y)

    # plain training goes on, flooded: the recipe's second block has moved its state
    moved = recipe["optimizer"]
    recipe["train_step"](recipe["model"], moved, X, Y)
    assert int(moved.step[...]) == int(recipe["plain"].step[...]) + 1
    value = optax.tree.get(moved.opt_state, "flood_value")
    formatted = rows.refusal(lambda: f"{value:.3f}")
    assert f"{float(value):.3f}" != formatted

    made = framework(lambda rngs: nnx.Linear(4, 1, rngs=rngs))
    row = own_loop.measure(
        run,
        made,
        lambda: run.recipe(x=X, y=Y),
        line="`optimizer.update(model, grads, value=value)`",
        value="yes: `optimizer.update(model, grads, value=value)`",
    )
    model, optimizer = made.start(recipe["tx"], 0)
    grads = nnx.grad(lambda m: m(X).sum())(model)
    refused = rows.refusal(lambda: optimizer.update(model, grads))
    assert "needs the current loss" in refused, refused
    row.wrong += [
        rows.Wrong("`optimizer.update(model, grads)`", "refused: no loss is given", {}),
        rows.Wrong(
            "`f\"{optax.tree.get(optimizer.opt_state, 'flood_value'):.3f}\"`",
            f"{formatted.partition(':')[0]}: it is an `nnx.Variable`, use `float`",
            {},
        ),
    ]
    return row
