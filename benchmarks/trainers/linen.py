"""Flax Linen, by the pattern of its examples: a `TrainState` and its evaluation."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import optax
import orbax.checkpoint as ocp
from flax.training import dynamic_scale, train_state

from benchmarks.trainers import own_loop, problem, rows
from benchmarks.trainers.problem import X, Y
from flood_optax import flooded, scale_by_flood
from flood_optax.flax import TrainState

TITLE = "Flax `TrainState`"
SECTION = "Flax Linen"
REQUIREMENTS = ("flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8")
NET: Any = nn.Dense(1)


def start(tx: Any, seed: int, kind: Any = TrainState) -> Any:
    params = NET.init(jax.random.key(1 + seed), X)
    return (kind.create(apply_fn=NET.apply, params=params, tx=tx),)


def through_store(carry: Any, other: Any, folder: pathlib.Path) -> Any:
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "linen", carry[0])
    with ocp.StandardCheckpointer() as saver:
        return (saver.restore(folder / "linen", other[0]),)


def measure(run: rows.Run) -> rows.Row:
    framework = own_loop.Framework(
        start,
        lambda carry, x: NET.apply(carry[0].params, x)[:, 0],
        jax.jit,
        through_store,
        lambda carry: carry[0].params,
    )
    row = own_loop.measure(
        run,
        framework,
        lambda: run.recipe(x=X, y=Y),
        form="optax form by our `TrainState`, or the loss form",
        line="`state.apply_gradients(grads=grads, value=value)`",
        value="no: passed on by `flood_optax.flax.TrainState`",
    )

    # flax's own state: it drops the value, and takes the loss form
    def loss_fn(params: Any) -> Any:
        return jax.numpy.mean((NET.apply(params, X)[:, 0] - Y) ** 2)

    chain = optax.chain(scale_by_flood(problem.LEVEL), optax.adam(0.05))
    (own,) = start(chain, 0, train_state.TrainState)
    grads = jax.grad(loss_fn)(own.params)
    refused = rows.refusal(lambda: own.apply_gradients(grads=grads, value=1.0))
    (own,) = start(optax.adam(0.05), 0, train_state.TrainState)
    objective = jax.jit(
        jax.value_and_grad(flooded(loss_fn, problem.LEVEL, raw_value=True))
    )
    seen: list[float] = []
    for _ in range(run.steps(200)):
        loss, grads = objective(own.params)
        own = own.apply_gradients(grads=grads)
        seen.append(float(loss))
    by_loss = sum(seen[-rows.LAST :]) / rows.LAST
    assert abs(by_loss - problem.LEVEL) < 0.2 * problem.LEVEL, by_loss

    # a dynamic scale: the value that it returns is the unscaled loss
    scaled = dynamic_scale.DynamicScale(scale=1024.0)
    value = scaled.value_and_grad(loss_fn)(own.params)[2]
    assert abs(float(value) - float(loss_fn(own.params))) < 1e-6
    row.wrong.append(
        rows.Wrong(
            "flax's `state.apply_gradients(grads=grads, value=loss)`",
            f"refused: `{refused.partition(':')[0]}`",
            {},
        )
    )
    return row
