"""Times and checks flooded steps on the GPU or TPU at hand: what no compiler can say.

Step times beside the plain step on models that fill the device, with buffers given away
as in training; the most memory held; whether the forms agree with the line that people
write, and accumulation with the large batch; a sweep beside the loops.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import programs, record, report, timing
from benchmarks.programs import WINDOW, Batch, Form, Model
from flood_optax import sweep

ONE_LINER, AGAIN = "jnp.abs one-liner", "plain, again"
STEPS, WINDOWS = f"MultiSteps({WINDOW})", f"wrapper, every_k={WINDOW}"
TIMED = ("plain", AGAIN, "loss form", "optax form", "wrapper", "per example")
HELD = ("plain", "loss form", "optax form", STEPS, WINDOWS)
FLOODED = ("loss form", "optax form", "wrapper")
BY_FLOAT, BY_ARGUMENT = "loop, level a Python float", "loop, level a jit argument"
MARK = "held:"


class Size(NamedTuple):
    """How much is measured; a round lasts some seconds for each rival."""

    models: Mapping[str, Model]
    settings: Sequence[tuple[str, str]]  # model, dtype
    rounds: int
    round_seconds: float
    held: Sequence[str]
    levels: int
    seeds: int
    steps: int


FULL = Size(
    models={
        "mlp": Model(programs.MLP((8192, 8192, 8192)), (784,), 4096),
        "transformer": Model(programs.Transformer(8192, 1024, 8, 8), (512,), 16),
    },
    settings=(("mlp", "bfloat16"), ("transformer", "bfloat16"), ("mlp", "float32")),
    rounds=40,
    round_seconds=0.05,
    held=HELD,
    levels=16,
    seeds=4,
    steps=300,
)
SMOKE = Size(
    models={"mlp": Model(programs.MLP((32,)), (16,), 32)},
    settings=(("mlp", "bfloat16"), ("mlp", "float32")),
    rounds=2,
    round_seconds=0.0,
    held=HELD[:1],
    levels=2,
    seeds=2,
    steps=10,
)


class Loop:
    """A training loop, a step a call; parameters and state give their buffers away."""

    def __init__(self, form: Form, params: Any, batch: Batch) -> None:
        self.params = jax.tree.map(jnp.copy, params)
        self.state = cast(Any, jax.jit(form.optimizer.init))(self.params)
        self.batch = batch
        self.step: Any = jax.jit(programs.step_of(form), donate_argnums=(0, 1))

    def __call__(self) -> jax.Array:
        """The loss before the step."""
        self.params, self.state, value = self.step(self.params, self.state, self.batch)
        return value


def forms(model: Model, inner: Any, level: float) -> dict[str, Form]:
    """Every form, the plain step once more, and what people write without a library."""
    losses = programs.losses_of(model)

    def one_liner(params: Any, batch: Batch) -> jax.Array:
        return jnp.abs(losses(params, batch).mean() - level) + level

    made = programs.forms(losses, inner, level)
    plain = optax.with_extra_args_support(inner)
    written = Form(jax.value_and_grad(one_liner), plain)
    return made | {AGAIN: made["plain"], ONE_LINER: written}


def compared_times(
    model: Model, dtype: str, *, rounds: int, round_seconds: float
) -> dict[str, dict[str, Any]]:
    """Paired step times by form: beside the plain step, windows beside MultiSteps."""
    params, batch = programs.drawn(model, programs.DTYPES[dtype])
    made = forms(model, optax.adam(1e-4), programs.LEVEL)
    found: dict[str, dict[str, Any]] = {}
    for names, unit in ((TIMED, 1), ((STEPS, WINDOWS), WINDOW)):
        loops = {name: Loop(made[name], params, batch) for name in names}
        taken = {name: taken_over(loop) for name, loop in loops.items()}
        start = time.perf_counter()
        jax.block_until_ready(loops[names[0]]())
        seconds = time.perf_counter() - start
        calls = unit * max(1, round(round_seconds / seconds / unit))
        times = timing.compare(dict(loops), rounds=rounds, calls=calls, warm_up=WINDOW)
        found |= {name: times[name] | taken[name] for name in names}
    return found


def taken_over(loop: Loop) -> dict[str, int]:
    """How many arrays of parameters and state a step took over, and of how many.

    Scalars are left out: the level and the loss of the step before are not read, and
    what a program does not read it does not take.
    """
    given = [x for x in jax.tree.leaves((loop.params, loop.state)) if x.ndim]
    jax.block_until_ready(loop())
    return {"donated": sum(x.is_deleted() for x in given), "arrays": len(given)}


def first_loss(model: Model, params: Any, batch: Batch) -> float:
    return float(jax.jit(programs.losses_of(model))(params, batch).mean())


def distance(one: Any, other: Any, start: Any) -> float:
    """The greatest difference of two ends, in units of the way from the start."""

    def far(a: Any, b: Any) -> float:
        gaps = jax.tree.map(
            lambda x, y: jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max(),
            *(a, b),
        )
        return float(max(jax.tree.leaves(gaps)))

    return far(one, other) / far(other, start)


def agreement(model: Model, dtype: str, *, steps: int = 20) -> list[dict[str, Any]]:
    """How far apart rivals end, after steps that went both ways.

    The forms beside the one-liner; accumulation beside a flooded step of all rows.
    """
    params, batch = programs.drawn(model, programs.DTYPES[dtype])
    level = 0.98 * first_loss(model, params, batch)
    made = forms(model, optax.sgd(0.05), level)

    def end(name: str) -> tuple[Any, int]:
        loop = Loop(made[name], params, batch)
        values = [float(loop()) for _ in range(steps)]
        return loop.params, sum(value < level for value in values)

    def windows() -> Any:
        loop = Loop(made[WINDOWS], params, batch)
        rows = len(batch.y) // WINDOW
        for _ in range(steps):
            for number in range(WINDOW):
                part = slice(number * rows, (number + 1) * rows)
                loop.batch = Batch(*(x[part] for x in batch))
                loop()
        return loop.params

    ends = {name: end(name) for name in (ONE_LINER, *FLOODED)}
    found: list[dict[str, Any]] = []
    for name in FLOODED:
        gap = distance(ends[name][0], ends[ONE_LINER][0], params)
        # the flooded value that the loss form gives is never below the level
        below = None if name == "loss form" else ends[name][1]
        found.append({"form": name, "difference": gap, "below": below})
    gap = distance(windows(), ends["wrapper"][0], params)
    return [*found, {"form": WINDOWS, "difference": gap, "below": None}]


def held(asked: Mapping[str, Any]) -> int | None:
    """The most bytes that this process has held on the device, after some steps."""
    model = (SMOKE if asked["smoke"] else FULL).models[asked["model"]]
    params, batch = programs.drawn(model, programs.DTYPES[asked["dtype"]])
    form = forms(model, optax.adam(1e-4), programs.LEVEL)[asked["form"]]
    loop = Loop(form, params, batch)
    del params
    for _ in range(2 * WINDOW):
        jax.block_until_ready(loop())
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else int(stats["peak_bytes_in_use"])


def held_by(form: str, model: str, dtype: str, *, smoke: bool) -> int | None:
    """Asks a process of its own, since the most that one held is never reset."""
    request = {"form": form, "model": model, "dtype": dtype, "smoke": smoke}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", json.dumps(request)],
        cwd=record.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{form!r} of {model!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.rpartition(MARK)[2])


def compared_sweeps(levels: int, seeds: int, steps: int) -> list[dict[str, Any]]:
    """A small model at every level and seed: loops, and `sweep.run`; with compilation.

    Also how far the losses of the first steps, where rounding has not grown yet, are
    from those of the first loop.
    """
    train: Any = programs.small_training(steps)
    grid = np.linspace(0.0, 2.0, levels).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), seeds)

    def by_float() -> np.ndarray:
        rows: list[list[np.ndarray]] = []
        for level in grid.tolist():
            fit: Any = jax.jit(functools.partial(train, level))
            rows.append([np.asarray(fit(key)["loss"]) for key in keys])
        return np.array(rows)

    def by_argument() -> np.ndarray:
        fit: Any = jax.jit(train)
        return np.array(
            [[np.asarray(fit(level, key)["loss"]) for key in keys] for level in grid]
        )

    def swept(strategy: Any) -> Callable[[], np.ndarray]:
        def run() -> np.ndarray:
            return sweep.run(train, grid, keys, strategy=strategy).metrics["loss"]

        return run

    rivals = {
        BY_FLOAT: by_float,
        BY_ARGUMENT: by_argument,
        "sweep.run, map": swept("map"),
        "sweep.run, vmap": swept("vmap"),
    }
    seconds: dict[str, float] = {}
    losses: dict[str, np.ndarray] = {}
    for name, run in rivals.items():
        start = time.perf_counter()
        losses[name] = run()
        seconds[name] = time.perf_counter() - start
    return [
        {
            "rival": name,
            "seconds": seconds[name],
            "times_faster": seconds[BY_FLOAT] / seconds[name],
            "times_faster_than_argument": seconds[BY_ARGUMENT] / seconds[name],
            "difference": float(np.abs(losses[name] - losses[BY_FLOAT])[..., :5].max()),
        }
        for name in rivals
    ]


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    # The processes that are asked for their memory share the device with this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "cpu" and not args.smoke:
        print("Skipped: no GPU or TPU here. `--smoke` measures a little on the CPU.")
        return None
    start, size = time.perf_counter(), SMOKE if args.smoke else FULL
    payload: dict[str, Any] = {"steps": [], "memory": [], "agreement": []}

    def keep(part: str, row: dict[str, Any]) -> None:
        payload[part].append(row)
        print(f"{time.perf_counter() - start:5.0f} s, {part}: {row}", flush=True)

    for model, dtype in size.settings:
        setting, shape = {"model": model, "dtype": dtype}, size.models[model]
        times = compared_times(
            shape, dtype, rounds=size.rounds, round_seconds=size.round_seconds
        )
        for form, seen in times.items():
            against = STEPS if form in (STEPS, WINDOWS) else "plain"
            keep("steps", {**setting, "form": form, "against": against, **seen})
        for row in agreement(shape, dtype):
            keep("agreement", setting | row)
    model, dtype = size.settings[-1] if args.smoke else size.settings[1]
    for form in size.held:
        peak = held_by(form, model, dtype, smoke=args.smoke)
        keep("memory", {"model": model, "dtype": dtype, "form": form, "bytes": peak})
    payload["sweeps"] = compared_sweeps(size.levels, size.seeds, size.steps)
    protocol = {
        "rounds": size.rounds,
        "sweep": [size.levels, size.seeds, size.steps],
        "seconds": round(time.perf_counter() - start),
    }
    return {"protocol": protocol, **payload}


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """Step times, memory, agreement and the sweep: what each row says."""
    source = report.provenance(payload)
    device = payload["environment"]["device"]

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return " to ".join(map(cell, value))
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    return {
        f"accelerator-{part}": "\n\n".join(
            (
                report.markdown(
                    [*rows[0]], [[*map(cell, row.values())] for row in rows]
                ),
                f"{source} Device: {device}.",
            )
        )
        for part, rows in payload.items()
        if part in ("steps", "memory", "agreement", "sweeps")
    }


if __name__ == "__main__":
    print(MARK, json.dumps(held(json.loads(sys.argv[1]))))
