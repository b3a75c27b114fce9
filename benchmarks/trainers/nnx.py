"""Flax NNX, by the pattern of its examples: `nnx.Optimizer`, metrics, evaluation."""

import pathlib
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import flood, scale_by_flood

TITLE = "flax `nnx.Optimizer`"
SECTION = "Flax NNX"
REQUIREMENTS = ("flax==0.12.8", "jax==0.10.2", "optax==0.2.8")


def linear(seed: int = 0) -> Any:
    return nnx.Linear(4, 1, rngs=nnx.Rngs(seed))


def params(model: nnx.Module) -> Any:
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@nnx.jit
def eval_step(model: Any, metrics: nnx.MultiMetric) -> None:
    metrics.update(loss=jax.numpy.mean((model(VALID_X)[:, 0] - VALID_Y) ** 2))


def optimizer_of(model: Any, tx: Any) -> Any:
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def resumed(train_step: Any, tx: Any, folder: pathlib.Path) -> float:
    """How far a run that went through Orbax ends from one that did not."""

    def trained(model: Any, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            train_step(model, optimizer, X, Y)

    unbroken, first, second = linear(), linear(), linear(seed=5)
    trained(unbroken, optimizer_of(unbroken, tx), 80)
    optimizer, restored = optimizer_of(first, tx), optimizer_of(second, tx)
    trained(first, optimizer, 40)
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "nnx", nnx.state((first, optimizer)))
    with ocp.StandardCheckpointer() as saver:
        state = saver.restore(folder / "nnx", nnx.state((second, restored)))
    nnx.update((second, restored), state)
    trained(second, restored, 40)
    return rows.distance(params(unbroken), params(second))


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(x=X, y=Y)
    train_step, tx = recipe["train_step"], recipe["tx"]

    model = linear()
    optimizer = optimizer_of(model, tx)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"))
    losses: list[float] = []
    evaluation: list[float] = []
    raw: list[float] = []
    for _ in range(run.steps(200)):
        metrics.update(loss=train_step(model, optimizer, X, Y))
        losses.append(float(metrics.compute()["loss"]))
        metrics.reset()
        eval_step(model, metrics)
        evaluation.append(float(metrics.compute()["loss"]))
        metrics.reset()
        raw.append(problem.mse(model(VALID_X)[:, 0], VALID_Y))

    # a window of micro-batches, at a level just below the loss of the whole batch
    start = linear()
    level = problem.mse(start(X)[:, 0], Y) * 0.999
    sgd = optax.chain(scale_by_flood(level), optax.sgd(0.01))

    def window(tx: Any) -> Any:
        model = linear()
        optimizer = optimizer_of(model, tx)
        for x, y in problem.parts(start(X)[:, 0]):
            train_step(model, optimizer, x, y)
        return params(model)

    whole = linear()
    train_step(whole, optimizer_of(whole, sgd), X, Y)
    by_flood = window(flood(optax.sgd(0.01), level, every_k=4))
    by_steps = window(optax.MultiSteps(sgd, 4).gradient_transformation())

    # plain training goes on, flooded: the recipe's second block has moved its state
    moved = recipe["optimizer"]
    train_step(recipe["model"], moved, X, Y)
    assert int(moved.step[...]) == int(recipe["plain"].step[...]) + 1

    chain = optimizer_of(linear(), tx)
    value = optax.tree.get(chain.opt_state, "flood_value")
    refused = rows.refusal(
        lambda: chain.update(linear(), nnx.grad(lambda m: m(X).sum())(linear()))
    )
    assert "needs the current loss" in refused, refused
    formatted = rows.refusal(lambda: f"{value:.3f}")
    assert f"{float(value):.3f}" == "0.000"
    return rows.Row(
        form="either form",
        level=LEVEL,
        losses=losses,
        value="yes: `optimizer.update(model, grads, value=loss)`",
        evaluation=evaluation,
        evaluation_raw=raw,
        accumulation=rows.distance(params(whole), by_flood),
        resume=resumed(train_step, tx, run.work),
        wrong=[
            rows.Wrong(
                "`optax.MultiSteps(tx, 4)` with the flood in `tx`",
                "the last micro-batch's loss decides: the step is off the whole "
                "batch's by {off:.0%} of its length",
                {"off": rows.off_by(by_steps, params(whole), params(start))},
            ),
            rows.Wrong(
                "`optimizer.update(model, grads)`", "refused: no loss is given", {}
            ),
            rows.Wrong(
                "`f\"{optax.tree.get(optimizer.opt_state, 'flood_value'):.3f}\"`",
                f"{formatted.partition(':')[0]}: it is an `nnx.Variable`, use `float`",
                {},
            ),
        ],
    )
