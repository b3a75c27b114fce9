"""Compiles programs for one target: a process of its own, beside the compiler."""

import importlib
import json
import pathlib
import sys
import tempfile
import time
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from benchmarks import programs, record
from benchmarks.compilers import environments, hlo
from benchmarks.compilers.targets import TARGETS
from flood_optax.sweep import placement
from flood_optax.sweep.traced import trace

RUNS = 64


def lowered(cell: dict[str, Any], mesh: Mesh) -> Any:
    """The program of a cell, before the compiler of the target sees it."""
    if cell["model"] == "sweep":
        return lowered_sweep(cell["form"], mesh)
    model = programs.MODELS[cell["model"]]
    dtype = programs.DTYPES[cell["dtype"]]
    params, batch = programs.like(model, dtype, mesh.size)
    module: Any = importlib.import_module(cell.get("forms", "benchmarks.programs"))
    form = module.forms(programs.losses_of(model), optax.adam(1e-3))[cell["form"]]
    given = programs.arguments(form, params, batch, mesh, fsdp=cell["fsdp"])
    step = programs.step_of(form, mesh)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*given)


def lowered_sweep(form: str, mesh: Mesh) -> Any:
    """The program that `sweep.run` calls for 64 runs, on one chip or over all."""
    train = programs.small_training()
    kind = jax.random.key_impl(jax.random.key(0))

    def run(level: jax.Array, words: jax.Array) -> dict[str, jax.Array]:
        return train(level, jax.random.wrap_key_data(words, impl=kind))

    one = jax.ShapeDtypeStruct((), np.float32), jax.ShapeDtypeStruct((2,), np.uint32)
    traced = trace(run, "sweep.run(train)", *one)
    if form == "sweep, shard":
        program = placement.sharded(traced, mesh)
        sharding: Any = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    else:
        program = placement.vmapped(traced)
        sharding = SingleDeviceSharding(cast(Any, mesh.devices).flat[0])
    shapes = (RUNS, 1), (RUNS, *one[1].shape)
    return program.lower(
        *(
            jax.ShapeDtypeStruct(shape, like.dtype, sharding=sharding)
            for shape, like in zip(shapes, one, strict=True)
        )
    )


def compiled(program: Any) -> tuple[Any, str]:
    """The program for its target, and XLA's report of the memory that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        made = program.compile(compiler_options=options)
        (report,) = pathlib.Path(folder).glob("*memory-usage-report.txt")
        return made, report.read_text(encoding="utf-8")


def measured(program: Any, report: str) -> dict[str, Any]:
    """What the compiler says of a program, and what stands in it; None: not known."""
    read = hlo.Program(program.as_text())
    said: dict[str, float] = program.cost_analysis() or {}
    memory = program.memory_analysis()
    estimate = said.get("optimal_seconds", 0.0)
    return {
        "flops": said.get("flops"),
        "bytes_accessed": said.get("bytes accessed"),
        "estimated_seconds": estimate if estimate > 0 else None,
        "kernel_bytes": read.kernel_bytes,
        "kernels": len(read.kernels),
        "conditionals": read.conditionals(),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "memory_bytes": hlo.main_memory(report),
        "collectives": read.collectives(),
        "custom_calls": dict(read.custom_calls()),
        "host_transfers": read.host_transfers(),
    }


def main(target: str, journal: str) -> None:
    """Appends a row for each cell that stands on the standard input."""
    mesh = Mesh(np.array(cast(Any, TARGETS[target].devices())), ("data",))
    for cell in json.load(sys.stdin):
        start = time.process_time()
        try:
            row = measured(*compiled(lowered(cell, mesh)))
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
        seconds = round(time.process_time() - start, 2)
        record.append(pathlib.Path(journal), cell | {"cpu_seconds": seconds} | row)
        said = row.get("error") or f"{seconds} s"
        print(*environments.identity(cell), said, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
