"""Kauldron: `Trainer.train`, with an evaluator and checkpoints."""

from typing import Any

import flax
import flax.linen as nn
import numpy as np
import optax
from kauldron import kd as _kd, kontext

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import LEVEL, VALID_X, VALID_Y, X, Y
from flood_optax import flood_loss, scale_by_flood

kd: Any = _kd
TITLE = "Kauldron"
SECTION = "Kauldron"
REQUIREMENTS = ("kauldron==1.4.4", "flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8")


class Linear(nn.Module):
    x: kontext.Key = kontext.REQUIRED

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(1)(x)


def outside(params: Any, x: Any, y: Any) -> float:
    dense = params["Dense_0"]
    kernel, bias = np.asarray(dense["kernel"]), np.asarray(dense["bias"])
    return problem.mse((x @ kernel + bias)[:, 0], y)


class Watched(kd.evals.Evaluator):
    """The evaluator, whose results are kept beside the raw losses."""

    def evaluate(self, state: Any, step: int) -> Any:
        aux = super().evaluate(state, step)
        value = float(aux.compute(flatten=False).loss_values["mse"])
        self.base_cfg.aux["evaluation"].append(value)
        self.base_cfg.aux["raw"].append(outside(state.params, VALID_X, VALID_Y))
        return aux


class Writer(kd.train.metric_writer.NoopWriter):
    def write_step_metrics(self, *, step: int, aux: Any, **_: Any) -> None:
        del step
        if self.collection == "train":
            SEEN.append(float(aux.compute(flatten=False).loss_values["mse"]))


SEEN: list[float] = []  # what the trainer logs as its training loss


def data(x: Any, y: Any, epochs: int | None) -> Any:
    """Whole batches, for so many epochs or without end."""
    return kd.data.InMemoryPipeline(
        loader=lambda: {"x": x, "y": y[:, None]}, batch_size=len(x), num_epochs=epochs
    )


def trainer(loss: Any, optimizer: Any, steps: int, workdir: Any, **changed: Any) -> Any:
    arguments: dict[str, Any] = {
        "train_ds": data(X, Y, None),
        "model": Linear(x="batch.x"),
        "train_losses": {"mse": loss(preds="preds", targets="batch.y")},
        "optimizer": optimizer,
        "num_train_steps": steps,
        "log_metrics_every": 1,
        "workdir": workdir,
        "writer": Writer(),
        "profiler": None,
        "aux": {"evaluation": [], "raw": []},
        "evals": {
            "valid": Watched(run=kd.evals.EveryNSteps(5), ds=data(VALID_X, VALID_Y, 1))
        },
    }
    return kd.train.Trainer(**arguments | changed)


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(kd=kd, flax=flax)
    loss = recipe["FloodedL2"]
    steps = run.steps(200)
    adam = optax.adam(0.05)
    made = trainer(loss, adam, steps, run.work / "whole")
    whole, _ = made.train()
    losses = SEEN.copy()
    evaluation, raw = made.aux["evaluation"], made.aux["raw"]

    def trained(loss: Any, optimizer: Any = adam) -> Any:
        made = trainer(loss, optimizer, steps, run.work / loss.__name__)
        made.train()
        return made

    @flax.struct.dataclass
    class FloodedMean(kd.losses.Loss.State):
        def compute(self) -> Any:
            return flood_loss(super().compute(), LEVEL)

    class Naive(kd.losses.L2):
        State = FloodedMean

    naive = trained(Naive)

    # resumed from a checkpoint
    def saved(steps: int) -> Any:
        return trainer(
            loss,
            adam,
            steps,
            run.work / "saved",
            checkpointer=kd.ckpts.Checkpointer(save_interval_steps=steps // 2),
        ).train()[0]

    saved(steps // 2)
    resumed = saved(steps)
    return rows.Row(
        form="loss form, raw value",
        line="`flooded(super().compute, b, raw_value=True)()`, in a state's `compute`",
        logs="the raw loss, in training and evaluation",
        level=LEVEL,
        losses=losses,
        value="no",
        evaluation=evaluation,
        evaluation_raw=raw,
        evaluates_flooded=bool(min(naive.aux["evaluation"]) >= LEVEL > min(raw)),
        resume=rows.distance(whole.params, resumed.params),
        wrong=[
            rows.no_loss(
                "`optax.chain(scale_by_flood(b), ...)`",
                lambda: trained(kd.losses.L2, optax.chain(scale_by_flood(LEVEL), adam)),
            ),
            rows.Wrong(
                "the state with `flood_loss(super().compute(), b)`",
                "the evaluator reports {bent:.3f} at its least, the raw one {raw:.3f}",
                {
                    "bent": min(naive.aux["evaluation"]),
                    "raw": min(naive.aux["raw"]),
                },
            ),
        ],
    )
