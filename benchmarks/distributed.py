"""Trains over several processes: do they end where one process ends?

Starts real processes on this machine, joined by `jax.distributed` over loopback, each
with two devices and its own rows of every batch, and compares the parameters with those
of one process on one device. Also counts the steps at which flooding on process-local
losses would have sent some processes uphill and others downhill.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import flood_optax
from benchmarks import record, report

ROWS, FEATURES, HIDDEN = 64, 8, 16  # rows of one batch, over all processes
LEVEL, LEARNING_RATE, MOMENTUM, SEED = 0.5, 0.05, 0.9, 0
STEPS, SMOKE_STEPS, DEVICES, TIMEOUT = 50, 10, 2, 240

Step = Callable[..., tuple[Any, Any, jax.Array]]


# ---- the training program: nothing in it knows how many processes there are ----


def dataset(seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose noise grows, so that every process has another loss."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, FEATURES))
    noise = rng.normal(size=ROWS) * np.linspace(0.0, 2.0, ROWS)
    y = np.sin(x @ rng.normal(size=FEATURES)) + noise
    return x.astype(np.float32), y.astype(np.float32)


def initial_params(seed: int = SEED) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed + 1)
    return {
        "w": rng.normal(size=(FEATURES, HIDDEN)).astype(np.float32) / FEATURES**0.5,
        "b": np.zeros(HIDDEN, np.float32),
        "v": rng.normal(size=HIDDEN).astype(np.float32) / HIDDEN**0.5,
    }


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["v"] - y) ** 2)


def sgd() -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.sgd(LEARNING_RATE, MOMENTUM))


def optax_form(mesh: Mesh) -> tuple[Step, optax.GradientTransformationExtraArgs]:
    """Under jit the loss of a sharded batch is the global one: nothing to do."""
    del mesh
    optimizer = optax.chain(flood_optax.scale_by_flood(LEVEL), sgd())

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    return step, optimizer


def loss_form(mesh: Mesh) -> tuple[Step, optax.GradientTransformationExtraArgs]:
    """Nothing to do here either."""
    del mesh
    optimizer = sgd()
    objective = flood_optax.flooded(loss_fn, LEVEL, return_info=True)

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        (_, info), grads = jax.value_and_grad(objective, has_aux=True)(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, info.loss

    return step, optimizer


def mapped_form(mesh: Mesh) -> tuple[Step, optax.GradientTransformationExtraArgs]:
    """Under shard_map the loss is local: `axis_name` averages it before the compare."""
    optimizer = flood_optax.flood(sgd(), LEVEL, axis_name="data")

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        local = cast(Any, lax.pcast(params, "data", to="varying"))  # jax >= 0.8
        value, grads = jax.value_and_grad(loss_fn)(local, x, y)
        grads = lax.pmean(grads, "data")
        updates, state = optimizer.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return params, state, lax.pmean(value, "data")

    split = P("data")
    in_specs, out_specs = (P(), P(), split, split), (P(), P(), P())
    mapped = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped, optimizer


FORMS = {"optax form": optax_form, "loss form": loss_form, "shard_map": mapped_form}


def on_this_process(replicated: jax.Array) -> jax.Array:
    return replicated.addressable_data(0)


def train(form: str, steps: int) -> dict[str, np.ndarray]:
    """One run of this process, with all others: parameters, losses, local losses."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    mine = np.array_split(np.arange(ROWS), jax.process_count())[jax.process_index()]
    rows = [a[mine] for a in dataset()]  # a real program would load these only
    batch = [jax.make_array_from_process_local_data(split, a) for a in rows]
    function, optimizer = FORMS[form](mesh)
    params = jax.device_put(initial_params(), replicated)
    state = jax.device_put(optimizer.init(params), replicated)

    step = cast(Step, jax.jit(function, donate_argnums=(0, 1)))
    local_loss = cast(Callable[..., jax.Array], jax.jit(loss_fn))
    losses: list[float] = []
    local_losses: list[float] = []
    for _ in range(steps):
        here = {name: on_this_process(params[name]) for name in initial_params()}
        local_losses.append(float(local_loss(here, *rows)))
        params, state, value = step(params, state, *batch)
        losses.append(float(value))
    ends = {name: np.asarray(params[name]) for name in initial_params()}
    return {**ends, "losses": np.array(losses), "local_losses": np.array(local_losses)}


# ---- what starts it: on a cluster, the cluster does ----


def launch(processes: int, steps: int) -> list[dict[str, dict[str, np.ndarray]]]:
    """Starts the processes and waits; by rank, what `train` gave for each form.

    Raises:
      RuntimeError: if a process fails or takes too long; the others are ended.
    """
    devices = DEVICES if processes > 1 else 1
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        work = pathlib.Path(name)
        command = [sys.executable, "-m", "benchmarks", "distributed"]
        command += ["--processes", str(processes), "--steps", str(steps)]
        command += ["--address", f"127.0.0.1:{port}", "--out", str(work), "--rank"]
        logs = [work / f"{rank}.log" for rank in range(processes)]
        workers: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                with log.open("wb") as stream:
                    worker = subprocess.Popen(
                        [*command, str(rank)],
                        cwd=record.REPOSITORY,
                        env=environment,
                        stdout=stream,
                        stderr=stream,
                    )
                workers.append(worker)
            codes = [worker.wait(TIMEOUT) for worker in workers]
        except subprocess.TimeoutExpired as error:
            tails = "\n".join(log.read_text()[-2000:] for log in logs)
            raise RuntimeError(f"A process took over {TIMEOUT} s.\n{tails}") from error
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
        if any(codes):
            tails = "\n".join(log.read_text()[-2000:] for log in logs)
            raise RuntimeError(f"The processes ended with {codes}.\n{tails}")
        return [
            {form: dict(np.load(work / f"{rank} {form}.npz")) for form in FORMS}
            for rank in range(processes)
        ]


def work_as(
    rank: int, processes: int, steps: int, address: str, out: pathlib.Path
) -> None:
    """One of the processes. On a cluster, `jax.distributed.initialize()` is enough."""
    if processes > 1:
        jax.distributed.initialize(address, processes, rank)
    for form in FORMS:
        arrays: dict[str, Any] = train(form, steps)
        np.savez(out / f"{rank} {form}.npz", **arrays)


def compare(
    ranks: list[dict[str, dict[str, np.ndarray]]], single: dict[str, Any], form: str
) -> dict[str, Any]:
    """One row of the table."""
    names = initial_params()
    ends = [rank[form] for rank in ranks]
    losses = single[form]["losses"]
    uphill = np.stack([end["local_losses"] < LEVEL for end in ends])

    def apart(one: Any, other: Any) -> float:
        return max(float(np.abs(one[name] - other[name]).max()) for name in names)

    return {
        "form": form,
        "parameter_difference": max(apart(end, single[form]) for end in ends),
        "difference_between_processes": max(apart(end, ends[0]) for end in ends),
        "loss_difference": float(np.abs(ends[0]["losses"] - losses).max()),
        "steps_below": int((losses < LEVEL).sum()),
        "smallest_distance_to_level": float(np.abs(losses - LEVEL).min()),
        "steps_local_losses_disagree": int((uphill.any(0) & ~uphill.all(0)).sum()),
    }


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The generated table of docs/distributed.md."""
    steps = payload["protocol"]["steps"]
    made = report.table(
        payload["rows"],
        {
            "form": "{form}",
            "difference to one process": "{parameter_difference:.1e}",
            "between processes": "{difference_between_processes:g}",
            "steps below the level": f"{{steps_below}} of {steps}",
            "steps at which local losses disagree": (
                f"{{steps_local_losses_disagree}} of {steps}"
            ),
        },
    )
    return {"distributed": f"{made}\n\n{report.provenance(payload)}"}


def number_of_processes(text: str) -> int:
    """The type of `--processes`: every device must get equally many rows."""
    most, processes = ROWS // DEVICES, int(text)
    if processes < 1 or most % processes:
        raise argparse.ArgumentTypeError(f"must divide {most}, got {processes}")
    return processes


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes", type=number_of_processes, default=2, help="how many (2)"
    )
    for name, kind in (("--rank", int), ("--steps", int), ("--address", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """Starts the processes, or is one of them, which keeps nothing but its arrays."""
    if args.rank is not None:
        work_as(args.rank, args.processes, args.steps, args.address, args.out)
        return None
    steps = SMOKE_STEPS if args.smoke else STEPS
    (single,) = launch(1, steps)
    ranks = launch(args.processes, steps)
    rows = [compare(ranks, single, form) for form in FORMS]
    print(
        f"{args.processes} processes with {DEVICES} devices each, {steps} steps of SGD "
        f"with momentum, level {LEVEL}:"
    )
    protocol = {
        "processes": args.processes,
        "devices_per_process": DEVICES,
        "steps": steps,
        "rows": ROWS,
        "level": LEVEL,
        "optimizer": f"sgd({LEARNING_RATE}, momentum={MOMENTUM})",
        "seed": SEED,
    }
    return {"protocol": protocol, "rows": rows}
