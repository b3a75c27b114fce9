"""A loop of the user's own, as the examples of a framework of models write it."""

import pathlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from benchmarks.trainers import problem, rows
from benchmarks.trainers.problem import VALID_X, VALID_Y, X, Y
from flood_optax import flood, scale_by_flood

Carry = Sequence[Any]  # the model, and what else a step changes


def returned(train_step: Any, carry: Carry, x: Any, y: Any) -> tuple[Carry, Any]:
    """A step that returns what it has changed."""
    *carry, loss = train_step(*carry, x, y)
    return carry, loss


def in_place(train_step: Any, carry: Carry, x: Any, y: Any) -> tuple[Carry, Any]:
    """A step that changes what it is given."""
    return carry, train_step(*carry, x, y)


class Framework(NamedTuple):
    """What such a framework is asked for.

    Attributes:
      start: (optimizer, seed) -> what the step takes before its batch, the model first.
      predict: (carry, inputs) -> outputs.
      jit: the framework's `jax.jit`.
      through_store: (carry, carry of another seed, folder) -> the carry, as its store
        gives it back.
      params: carry -> a tree of its parameters.
      step: how the recipe's `train_step` is called.
    """

    start: Callable[[Any, int], Carry]
    predict: Callable[[Any, Any], Any]
    jit: Callable[..., Any]
    through_store: Callable[[Carry, Carry, pathlib.Path], Carry]
    params: Callable[[Carry], Any] = lambda carry: carry[0]
    step: Callable[..., tuple[Carry, Any]] = returned


def measure(
    run: rows.Run,
    framework: Framework,
    recipe: Callable[[], dict[str, Any]],
    **said: Any,
) -> rows.Row:
    """Trains by the recipe's `train_step`, with its `tx`.

    Args:
      run: the run.
      framework: the framework.
      recipe: () -> what the page's code defines.
      **said: further fields of the row.
    """
    fields: dict[str, Any] = {
        "form": "optax form, or the loss form",
        "level": problem.LEVEL,
        "value": "you call `update`",
        "logs": "what the step returns, the raw loss",
        **followed(run, framework, recipe(), run.steps(200)),
        **windows(framework, recipe),
        **said,
    }
    return rows.Row(**fields)


def followed(
    run: rows.Run, framework: Framework, own: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Losses and evaluations of a run, and how far off it is where it was resumed."""
    tx = own["tx"]

    @framework.jit
    def evaluate(carry: Carry) -> Any:
        return jax.numpy.mean((framework.predict(carry, VALID_X) - VALID_Y) ** 2)

    def trained(carry: Carry, steps: int) -> tuple[Carry, rows.Path]:
        return rows.follow(
            lambda carry: framework.step(own["train_step"], carry, X, Y),
            carry,
            steps,
            evaluate,
            lambda carry: problem.mse(framework.predict(carry, VALID_X), VALID_Y),
        )

    unbroken, path = trained(framework.start(tx, 0), steps)
    half, _ = trained(framework.start(tx, 0), steps // 2)
    again = framework.through_store(half, framework.start(tx, 1), run.work)
    resumed, _ = trained(again, steps - steps // 2)
    ends = map(framework.params, (unbroken, resumed))
    return {**path._asdict(), "resume": rows.distance(*ends)}


def pickled(carry: Carry, other: Carry, folder: pathlib.Path) -> Carry:
    """The carry as pickle gives it back: nothing of the other one is needed."""
    del other
    (folder / "half.pkl").write_bytes(pickle.dumps(jax.device_get(carry)))
    return pickle.loads((folder / "half.pkl").read_bytes())


def windows(framework: Framework, recipe: Callable[[], Any]) -> dict[str, Any]:
    """A window of micro-batches, at a level just below the loss of the whole batch."""
    start = framework.start(optax.identity(), 0)
    outputs = framework.predict(start, X)
    level = problem.mse(outputs, Y) * 0.999
    sgd = optax.chain(scale_by_flood(level), optax.sgd(0.01))
    parts = problem.parts(outputs)

    def window(tx: Any, batches: Any) -> Any:
        own = recipe()
        own["tx"] = tx  # which the recipe's step may read
        carry = framework.start(tx, 0)
        for x, y in batches:
            carry, _ = framework.step(own["train_step"], carry, x, y)
        return framework.params(carry)

    whole = window(sgd, [(X, Y)])
    by_flood = window(flood(optax.sgd(0.01), level, every_k=4), parts)
    by_steps = window(optax.MultiSteps(sgd, 4).gradient_transformation(), parts)
    off = rows.off_by(by_steps, whole, framework.params(start))
    return {
        "accumulates": "the window, by `every_k`",
        "accumulation": rows.distance(whole, by_flood),
        "wrong": [
            rows.Wrong(
                "`optax.MultiSteps(tx, 4)` with the flood in `tx`",
                "the last micro-batch's loss decides: the step is off the whole "
                "batch's by {off:.0%} of its length",
                {"off": off},
            )
        ],
    }
