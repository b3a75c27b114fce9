"""Flax Linen, by the pattern of its examples: a `TrainState` and its evaluation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax.training import dynamic_scale, train_state

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import flood, flooded, scale_by_flood
from flood_optax.flax import TrainState

TITLE = "flax `TrainState`"
SECTION = "Flax Linen"
REQUIREMENTS = ("flax==0.12.8", "jax==0.10.2", "optax==0.2.8")
NET: Any = nn.Dense(1)
PARAMS = NET.init(jax.random.key(1), X)


def created(kind: Any, tx: Any) -> Any:
    return kind.create(apply_fn=NET.apply, params=PARAMS, tx=tx)


def loss_fn(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((NET.apply(params, x)[:, 0] - y) ** 2)


@jax.jit
def eval_step(state: Any) -> Any:
    return {"loss": loss_fn(state.params, VALID_X, VALID_Y)}


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(x=X, y=Y)
    train_step, tx = recipe["train_step"], recipe["tx"]
    state = created(TrainState, tx)
    losses: list[float] = []
    evaluation: list[float] = []
    raw: list[float] = []
    for _ in range(run.steps(200)):
        state, loss = train_step(state, X, Y)
        losses.append(float(loss))
        evaluation.append(float(eval_step(state)["loss"]))
        raw.append(problem.mse(NET.apply(state.params, VALID_X)[:, 0], VALID_Y))

    level = problem.mse(NET.apply(PARAMS, X)[:, 0], Y) * 0.999
    sgd = optax.chain(scale_by_flood(level), optax.sgd(0.01))

    def window(tx: Any) -> Any:
        state = created(TrainState, tx)
        for x, y in problem.parts(NET.apply(PARAMS, X)[:, 0]):
            state, _ = train_step(state, x, y)
        return state.params

    whole = train_step(created(TrainState, sgd), X, Y)[0].params
    by_flood = window(flood(optax.sgd(0.01), level, every_k=4))
    by_steps = window(optax.MultiSteps(sgd, 4))

    def trained(state: Any, steps: int) -> Any:
        for _ in range(steps):
            state, _ = train_step(state, X, Y)
        return state

    unbroken = trained(created(TrainState, tx), 80)
    with ocp.StandardCheckpointer() as saver:
        saver.save(run.work / "linen", trained(created(TrainState, tx), 40))
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(run.work / "linen", created(TrainState, tx))
    resumed = trained(restored, 40)

    # flax's own state: it drops the value, and takes the loss form
    grads = jax.grad(loss_fn)(PARAMS, X, Y)
    own = created(train_state.TrainState, tx)
    refused = rows.refusal(lambda: own.apply_gradients(grads=grads, value=1.0))
    own = created(train_state.TrainState, optax.adam(0.05))
    objective = flooded(loss_fn, LEVEL, raw_value=True)
    seen: list[float] = []
    for _ in range(run.steps(200)):
        loss, grads = jax.value_and_grad(objective)(own.params, X, Y)
        own = own.apply_gradients(grads=grads)
        seen.append(float(loss))
    assert abs(sum(seen[-rows.LAST :]) / rows.LAST - LEVEL) < 0.2 * LEVEL

    # a dynamic scale: the value that it returns is the unscaled loss
    scaled = dynamic_scale.DynamicScale(scale=1024.0)
    value = scaled.value_and_grad(loss_fn)(PARAMS, X, Y)[2]
    return rows.Row(
        form="`flood_optax.flax.TrainState`, or the loss form",
        level=LEVEL,
        losses=losses,
        value="no: passed on by `flood_optax.flax.TrainState`",
        evaluation=evaluation,
        evaluation_raw=raw,
        accumulation=rows.distance(whole, by_flood),
        resume=rows.distance(unbroken.params, resumed.params),
        wrong=[
            rows.Wrong(
                "flax's `state.apply_gradients(grads=grads, value=loss)`",
                f"refused: `{refused.partition(':')[0]}`",
                {},
            ),
            rows.Wrong(
                "`optax.MultiSteps(tx, 4)` with the flood in `tx`",
                "the last micro-batch's loss decides: the step is off the whole "
                "batch's by {off:.0%} of its length",
                {"off": rows.off_by(by_steps, whole, PARAMS)},
            ),
        ],
        notes={"scaled_off": abs(float(value) - float(loss_fn(PARAMS, X, Y)))},
    )
