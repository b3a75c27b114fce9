"""Two optimizers: a discriminator that is flooded, and a generator that is not."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from benchmarks.trainers import rows

TITLE = "Two losses, two `nnx.Optimizer`s (GAN)"
SECTION = "Two losses, two optimizers"
REQUIREMENTS = ("flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8")
LEVEL = 1.0
REAL = np.random.default_rng(0).normal(2.0, 0.5, (64, 1)).astype(np.float32)


class Judge(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(1, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(nnx.tanh(self.hidden(x)))[:, 0]


def cross_entropy(logits: Any, target: float) -> Any:
    labels = jax.numpy.full(logits.shape, target)
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def judge_loss(judge: Any, fake: Any) -> Any:
    return cross_entropy(judge(REAL), 1.0) + cross_entropy(judge(fake), 0.0)


def generator_loss(generator: Any, judge: Any, noise: Any) -> Any:
    return cross_entropy(judge(generator(noise)), 1.0)


def trained(run: rows.Run, steps: int, judge_by: Any = None, loss: Any = judge_loss):
    """The judge's raw losses, by the recipe or with another optimizer or loss."""
    judge, generator = Judge(nnx.Rngs(0)), nnx.Linear(1, 1, rngs=nnx.Rngs(1))
    recipe = run.recipe(
        nnx=nnx,
        judge=judge,
        generator=generator,
        judge_loss=loss,
        generator_loss=generator_loss,
    )
    by, generator_by = recipe["judge_by"], recipe["generator_by"]
    by = by if judge_by is None else nnx.Optimizer(judge, judge_by, wrt=nnx.Param)
    losses: list[float] = []
    for number in range(steps):
        noise = jax.random.normal(jax.random.key(number), (len(REAL), 1))
        losses.append(float(judge_loss(judge, generator(noise))))
        recipe["train_step"](judge, generator, by, generator_by, noise)
    return losses


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(200)
    adam = optax.adam(1e-2, b1=0.5)
    assert trained(run, steps, adam)[-1] < 0.8 * LEVEL

    def both(judge: Any, fake: Any) -> Any:
        """The two losses added, as one value."""
        return judge_loss(judge, fake) + cross_entropy(judge(fake), 1.0)

    summed = trained(run, steps, loss=both)
    return rows.Row(
        form="a chain for each optimizer",
        line="`judge_by.update(judge, grads, value=value)`",
        logs="what the step returns, the judge's raw loss",
        level=LEVEL,
        losses=trained(run, steps),
        value="yes: `judge_by.update(judge, grads, value=value)`",
        wrong=[
            rows.Wrong(
                "the two losses added, as one `value`",
                "the sum meets the level: the judge's raw loss is {last:.2f}",
                {"last": float(np.mean(summed[-rows.LAST :]))},
            )
        ],
    )
