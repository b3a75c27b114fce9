"""Runs of one compiled program, on a CPU as many at a time as it has cores."""

import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp


def number_of_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def over_cores(
    program: Any, runs: Sequence[tuple[Any, ...]], keep: Callable[[Any], Any]
) -> Generator[Any]:
    """What is kept of the program of each run, as NumPy arrays, in their order.

    Args:
      program: of arrays, under `jax.jit`.
      runs: its arguments, of the same shapes and dtypes.
      keep: what to take of its result.
    """
    if not runs:
        return
    runs = [jax.tree.map(jnp.asarray, run) for run in runs]
    leaves = jax.tree.leaves(runs)
    devices = {device for leaf in leaves for device in leaf.devices()}
    on_one_cpu = len(devices) == 1 and devices.pop().platform == "cpu"
    traced = program.trace(*runs[0])
    # Effects may have an order. The checks for NaN may be of this thread alone.
    checks = ("jax_debug_nans", "jax_debug_infs")
    apart = traced.jaxpr.effects or any(getattr(jax.config, name) for name in checks)
    if apart or not on_one_cpu:
        yield from jax.device_get([keep(program(*run)) for run in runs])
        return
    # Settings of JAX that hold in this thread alone are part of what it compiles.
    compiled = traced.lower().compile()

    def call(run: tuple[Any, ...]) -> Any:
        return jax.device_get(keep(compiled(*run)))

    # XLA's own threads find little to share in one run of a model that fits a CPU.
    with ThreadPoolExecutor(number_of_cores()) as pool:
        yield from pool.map(call, runs)
