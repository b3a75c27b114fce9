"""Compiles programs for one target: a process of its own, beside the compiler."""

import importlib
import json
import pathlib
import sys
import time
from typing import Any, cast

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from benchmarks import programs
from benchmarks.compilers import hlo
from benchmarks.compilers.targets import TARGETS

RUNS = 64


def compiled(cell: dict[str, Any], mesh: Mesh) -> Any:
    """The program of a cell."""
    if cell["form"] == "sweep, vmap":
        return compiled_sweep(mesh)
    model = programs.MODELS[cell["model"]]
    dtype = programs.DTYPES[cell["dtype"]]
    params, batch = programs.like(model, dtype, mesh.size)
    module: Any = importlib.import_module(cell.get("forms", "benchmarks.programs"))
    form = module.forms(programs.losses_of(model), optax.adam(1e-3))[cell["form"]]
    given = programs.arguments(form, params, batch, mesh, fsdp=cell["fsdp"])
    step = programs.step_of(form, mesh)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*given).compile()


def compiled_sweep(mesh: Mesh) -> Any:
    """What `sweep.run(strategy="vmap")` maps over 64 runs, on the first chip."""
    first: Any = mesh.devices.flat[0]
    one = jax.sharding.SingleDeviceSharding(first)
    levels = jax.ShapeDtypeStruct((RUNS,), np.float32, sharding=one)
    keys = jax.random.split(jax.random.key(0), RUNS)
    data = jax.ShapeDtypeStruct((RUNS, 2), np.uint32, sharding=one)
    kind = jax.random.key_impl(keys)
    train = programs.small_training()

    def run(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        return train(level, jax.random.wrap_key_data(key, impl=kind))

    return jax.jit(jax.vmap(run)).lower(levels, data).compile()


def measured(program: Any) -> dict[str, Any]:
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
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "collectives": read.collectives(),
        "custom_calls": dict(read.custom_calls()),
        "host_transfers": read.host_transfers(),
    }


def main(target: str, cells: str, rows: str) -> None:
    mesh = Mesh(np.array(cast(Any, TARGETS[target].devices())), ("data",))
    with pathlib.Path(rows).open("a", encoding="utf-8") as stream:
        for cell in json.loads(pathlib.Path(cells).read_text(encoding="utf-8")):
            start = time.process_time()
            try:
                row = measured(compiled(cell, mesh))
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {error}"[:500]}
            seconds = time.process_time() - start
            row = cell | {"cpu_seconds": round(seconds, 2)} | row
            stream.write(json.dumps(row) + "\n")
            stream.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
