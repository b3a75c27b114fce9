"""Tunix: `PeftTrainer.train`, with evaluation, accumulation and checkpoints."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.sft import hooks, peft_trainer

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import VALID_X, VALID_Y, X, Y
from flood_optax import flood, flooded, scale_by_flood

TITLE = "Tunix `PeftTrainer`"
SECTION = "Tunix"
REQUIREMENTS = ("google-tunix==0.1.7", "flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8")
LEVEL = 0.5


def linear() -> Any:
    return nnx.Linear(4, 1, rngs=nnx.Rngs(0))


def loss_fn(model: Any, x: Any, y: Any) -> Any:
    return jnp.mean((model(x)[:, 0] - y) ** 2)


def params(trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    model = trainer.model
    return np.asarray(model.kernel[...]), np.asarray(model.bias[...])


def outside(kernel: Any, bias: Any, x: Any, y: Any) -> float:
    return problem.mse((x @ kernel + bias)[:, 0], y)


def config(steps: int, **changed: Any) -> Any:
    return peft_trainer.TrainingConfig(eval_every_n_steps=5, max_steps=steps, **changed)


class Outside(hooks.TrainingHooks):
    """Keeps the raw evaluation losses, computed outside of the trainer."""

    def __init__(self) -> None:
        self.raw: list[float] = []

    def on_train_start(self, train_ctx: Any) -> None: ...
    def on_train_end(self, train_ctx: Any) -> None: ...
    def on_train_step_start(self, train_ctx: Any) -> None: ...
    def on_train_step_end(self, train_ctx: Any, train_step: Any, train_loss: Any): ...
    def on_eval_step_start(self, train_ctx: Any) -> None: ...
    def on_eval_step_end(self, train_ctx: Any, eval_loss: Any) -> None:
        del eval_loss
        self.raw.append(outside(*params(train_ctx), VALID_X, VALID_Y))


BATCH = {"x": X, "y": Y}


def trained(trainer: Any, batches: Any = None) -> tuple[Any, list[float]]:
    """Runs the trainer's loop; the trainer, and the raw losses of evaluation."""
    watch = Outside()
    trainer.with_training_hooks(watch)
    trainer.train(
        itertools.repeat(BATCH) if batches is None else batches,
        [{"x": VALID_X, "y": VALID_Y}],
    )
    return trainer, watch.raw


def history(trainer: Any, mode: str) -> list[float]:
    return trainer.metrics_logger.get_metric_history("", "loss", mode).tolist()


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(200)

    def recipe(steps: int, **changed: Any) -> dict[str, Any]:
        return run.recipe(
            peft_trainer=peft_trainer,
            nnx=nnx,
            model=linear(),
            optimizer=optax.adam(0.05),
            config=config(steps, **changed),
            loss_fn=loss_fn,
        )

    whole, raw = trained(recipe(steps)["trainer"])

    def plain(kind: Any, optimizer: Any, steps: int, **changed: Any) -> Any:
        return kind(linear(), optimizer, config(steps, **changed))

    chain = optax.chain(scale_by_flood(LEVEL), optax.adam(0.05))
    chained = plain(peft_trainer.PeftTrainer, chain, 2).with_loss_fn(loss_fn)
    naive = plain(peft_trainer.PeftTrainer, optax.adam(0.05), steps)
    naive, naive_raw = trained(naive.with_loss_fn(flooded(loss_fn, LEVEL)))
    bent = history(naive, "eval")

    # a window of micro-batches, at a level just below the loss of the whole batch
    start = plain(peft_trainer.PeftTrainer, optax.sgd(0.01), 1)
    origin = params(start)
    level = outside(*origin, X, Y) * 0.999
    parts = [
        {"x": x, "y": y} for x, y in problem.parts((X @ origin[0] + origin[1])[:, 0])
    ]
    sgd = optax.sgd(0.01)
    objective = flooded(loss_fn, level, raw_value=True)
    due, _ = trained(start.with_loss_fn(objective), [BATCH])
    own = recipe(1)["Accumulating"]
    window = flood(sgd, level, every_k=4)
    by_flood, _ = trained(plain(own, window, 4).with_loss_fn(loss_fn), parts)
    each = plain(peft_trainer.PeftTrainer, sgd, 1, gradient_accumulation_steps=4)
    by_steps, _ = trained(each.with_loss_fn(objective), parts)

    # resumed from a checkpoint
    folder = {"checkpoint_root_directory": str(run.work / "tunix")}
    trained(recipe(steps // 2, **folder)["trainer"])
    resumed, _ = trained(recipe(steps, **folder)["trainer"])
    return rows.Row(
        form="loss form, raw value",
        line="`with_loss_fn(flooded(loss_fn, b, raw_value=True))`",
        logs="the raw loss, in training and evaluation",
        level=LEVEL,
        losses=history(whole, "train"),
        value="no",
        evaluation=history(whole, "eval"),
        evaluation_raw=raw,
        evaluates_flooded=bool(min(bent) >= LEVEL > min(naive_raw)),
        accumulates="each micro-batch",
        accumulation=rows.distance(params(due), params(by_flood)),
        resume=rows.distance(params(whole), params(resumed)),
        wrong=[
            rows.no_loss(
                "`optax.chain(scale_by_flood(b), ...)`", lambda: trained(chained)
            ),
            rows.Wrong(
                "`with_loss_fn(flooded(loss_fn, b))`",
                "evaluation is {bent:.3f} at its least, the raw one {raw:.3f}",
                {"bent": min(bent), "raw": min(naive_raw)},
            ),
            rows.Wrong(
                "`gradient_accumulation_steps=4`",
                "each micro-batch is flooded: the step is off the whole batch's by "
                "{off:.0%} of its length",
                {"off": rows.off_by(params(by_steps), params(due), origin)},
            ),
        ],
    )
