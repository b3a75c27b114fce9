"""Steps as in Hugging Face's Flax examples: a sum and a count, added over devices."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import scale_by_flood
from flood_optax.flax import TrainState

TITLE = "A sum and a count, as in Hugging Face's Flax examples"
SECTION = "A loss that is a sum"
REQUIREMENTS = ("flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8")
VARIABLES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
NET: Any = nn.Dense(1)
MASK = np.arange(64) < 50  # 32 examples on one device, 18 on the other


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(net=NET)
    parts, whole = PartitionSpec("data"), PartitionSpec()
    params = NET.init(jax.random.key(1), X)

    def created(rate: float, level: float = LEVEL) -> Any:
        tx = optax.chain(scale_by_flood(level), optax.sgd(rate))
        return TrainState.create(apply_fn=NET.apply, params=params, tx=tx)

    def over(devices: int, function: Any) -> Any:
        """A step that each device takes with its own examples."""
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
        mapped = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(whole, parts, parts, parts),
            out_specs=whole,
            check_vma=False,  # as under pmap: gradients are each device's own
        )
        return jax.jit(mapped)

    def trained(step: Any, state: Any) -> rows.Path:
        def stepped(state: Any) -> Any:
            return step(state, X, Y, MASK)

        def predict(state: Any) -> Any:
            return NET.apply(state.params, VALID_X)[:, 0]

        return rows.follow(
            stepped,
            state,
            run.steps(200),
            lambda state: jax.numpy.mean((predict(state) - VALID_Y) ** 2),
            lambda state: problem.mse(predict(state), VALID_Y),
        )[1]

    step = over(2, recipe["train_step"])
    path = trained(step, created(0.1))
    np.testing.assert_allclose(
        path.losses[0],
        problem.mse(NET.apply(params, X)[MASK, 0], Y[MASK]),
        rtol=1e-5,
    )

    # one step on two devices and on one, at a level just below the loss
    level = path.losses[0] * 0.999
    one, two = (
        over(devices, recipe["train_step"])(created(0.01, level), X, Y, MASK)[0].params
        for devices in (1, 2)
    )
    assert rows.distance(one, two) < 1e-6

    def bare_sum(state: Any, x: Any, y: Any, mask: Any) -> Any:
        """The sum, not the quotient, as `value`."""
        function = recipe["sum_and_count"]
        (total, count), grads = jax.value_and_grad(function, has_aux=True)(
            state.params, x, y, mask
        )
        total, count, grads = jax.lax.psum((total, count, grads), "data")
        grads = jax.tree.map(lambda g: g / count, grads)
        return state.apply_gradients(grads=grads, value=total), total / count

    summed = trained(over(2, bare_sum), created(0.1))
    return rows.Row(
        form="optax form, on the quotient",
        line="`state.apply_gradients(grads=grads, value=total / count)`",
        logs="the quotient, the raw loss",
        level=LEVEL,
        losses=path.losses,
        value="you call `update`",
        evaluation=path.evaluation,
        evaluation_raw=path.evaluation_raw,
        wrong=[
            rows.Wrong(
                "`value=total`",
                "the sum of 50 losses meets the level: raw loss {last:.4f}",
                {"last": float(np.mean(summed.losses[-rows.LAST :]))},
            )
        ],
    )
