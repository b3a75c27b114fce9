"""Optimistix: `minimise` by `OptaxMinimiser`, and by a solver of its own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx

from benchmarks.trainers import rows
from flood_optax import flood, flooded, scale_by_flood

TITLE = "Optimistix `OptaxMinimiser`"
SECTION = "Optimistix"
REQUIREMENTS = ("optimistix==0.1.0", "equinox==0.13.8", "jax==0.12.0.1", "optax==0.2.8")
LEVEL = 0.5
START = jnp.array([1.0, -0.5])


def fn(w: Any, args: Any) -> Any:
    del args
    return jnp.sum(jnp.exp(w) - w - 1.0)


def raw(w: Any) -> float:
    """The function, in NumPy."""
    w = np.asarray(w, np.float64)
    return float(np.sum(np.exp(w) - w - 1.0))


def measure(run: rows.Run) -> rows.Row:
    recipe = run.recipe(optx=optx, fn=fn, start=START)
    start = START
    seen: list[tuple[int, float]] = []

    def watch(num_steps: Any, loss_this_step: Any, **_: Any) -> None:
        jax.debug.callback(
            lambda step, loss: seen.append((int(step), float(loss))),
            num_steps[1],
            loss_this_step[1],
        )

    def minimised(optimizer: Any, fn: Any = fn) -> Any:
        solver = optx.OptaxMinimiser(optimizer, rtol=1e-6, atol=1e-6)
        return optx.minimise(fn, solver, start, max_steps=steps, throw=False)

    steps = run.steps(100)
    own = recipe["solver"]
    watched = optx.OptaxMinimiser(
        flood(optax.sgd(0.1), LEVEL), own.rtol, own.atol, verbose=watch
    )
    solution = optx.minimise(fn, watched, start, max_steps=steps, throw=False)
    jax.effects_barrier()
    losses = [loss for _, loss in sorted(seen)]
    assert len(losses) == steps
    whole = optx.minimise(fn, own, start, max_steps=steps, throw=False)
    assert rows.distance(solution.value, whole.value) < 1e-6

    refused = rows.refusal(
        lambda: minimised(optax.chain(scale_by_flood(LEVEL), optax.sgd(0.1)))
    )
    assert "value_fn" in refused, refused

    # one of its own solvers, which searches along lines, from below 2 b - min = 1
    below = jnp.array([0.9, -0.5])
    assert LEVEL < raw(below) < 2 * LEVEL
    bfgs = optx.BFGS(rtol=1e-6, atol=1e-6)

    def by_bfgs(**kind: Any) -> float:
        objective = flooded(fn, LEVEL, **kind)
        return raw(
            optx.minimise(objective, bfgs, below, max_steps=64, throw=False).value
        )

    best = optx.BestSoFarMinimiser(own)
    kept = optx.minimise(fn, best, start, max_steps=steps, throw=False)
    assert eqx.is_array(kept.value)
    return rows.Row(
        form="optax form, by `flood`",
        line="`optx.OptaxMinimiser(flood(optimizer, b), rtol, atol)`",
        logs="the raw value, to `verbose`",
        level=LEVEL,
        losses=losses,
        value="yes, with `grad` and `value_fn`",
        wrong=[
            rows.Wrong(
                "`optax.chain(scale_by_flood(b), optimizer)`",
                "refused: `value_fn` would be searched unflooded",
                {},
            ),
            rows.Wrong(
                "`optx.BFGS` with `flooded(fn, b, raw_value=True)`",
                "the search sees another function than its gradient: raw value "
                "{last:.3f}; with `flooded(fn, b)` {right:.3f}",
                {"last": by_bfgs(raw_value=True), "right": by_bfgs()},
            ),
            rows.Wrong(
                "`optx.BestSoFarMinimiser` around it",
                "returns the point with the least raw value, {least:.3f}",
                {"least": raw(kept.value)},
            ),
        ],
    )
