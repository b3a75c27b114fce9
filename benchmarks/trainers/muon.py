"""Muon for the matrices and Adam for the rest, in `nnx.Optimizer`."""

from typing import Any

import numpy as np
import optax
from flax import nnx
from optax import contrib

from benchmarks.trainers import nnx as flax_nnx, own_loop, rows
from benchmarks.trainers.problem import X, Y
from flood_optax import scale_by_flood

TITLE = "Muon and Adam in `nnx.Optimizer`"
SECTION = "Muon for a part of the parameters"
REQUIREMENTS = ("flax==0.12.12", "jax==0.12.0.1", "optax==0.2.8")
LEVEL = 0.05


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(4, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(nnx.tanh(self.hidden(x)))


def measure(run: rows.Run) -> rows.Row:
    own, flax = run.recipe(), run.recipe("Flax NNX", x=X, y=Y)
    recipe = own | {"train_step": flax["train_step"]}
    framework = flax_nnx.framework(Network)
    row = own_loop.measure(
        run,
        framework,
        lambda: recipe,
        form="optax form",
        level=LEVEL,
        line="`optax.chain(scale_by_flood(b), optax.partition(parts, kinds))`",
        value="yes: `optimizer.update(model, grads, value=value)`",
    )

    def moved(tx: Any) -> Any:
        model, optimizer = framework.start(tx, 0)
        recipe["train_step"](model, optimizer, X, Y)
        return framework.params([model])

    # below its level, so that one step goes up
    level, parts, kinds = 2.0, recipe["parts"], recipe["kinds"]
    due = moved(optax.chain(scale_by_flood(level), optax.partition(parts, kinds)))
    inside = parts | {"muon": optax.chain(scale_by_flood(level), contrib.muon(0.02))}
    one = moved(optax.partition(inside, kinds))
    start = framework.params([Network(nnx.Rngs(0))])
    row.wrong.append(
        rows.Wrong(
            '`scale_by_flood(b)` in the part `"muon"` alone',
            "floods that part, and the rest goes down: the step is off by {off:.0%} of "
            "its length",
            {"off": rows.off_by(one, due, start)},
        )
    )
    assert np.all(due["out"]["bias"] != one["out"]["bias"])
    return row
