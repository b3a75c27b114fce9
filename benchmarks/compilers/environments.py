"""Installs XLA's compilers beside the jax that runs, and starts programs with them."""

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import environments, record
from benchmarks.compilers.targets import TARGETS, VARIABLES

Cell = dict[str, Any]


def identity(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in ("target", "model", "dtype", "fsdp", "form"))


@functools.cache
def wheels(compiler: str) -> tuple[str, ...]:
    """What to install: the versions that the jax at hand names."""
    jax = importlib.metadata.version("jax")
    if compiler == "cuda":
        # nvcc's package holds ptxas, which turns XLA's output into machine code
        plugin = (f"jax-cuda12-plugin=={jax}", f"jax-cuda12-pjrt=={jax}")
        return (*plugin, "nvidia-cuda-nvcc-cu12>=12.8")
    for line in importlib.metadata.requires("jax") or ():
        if found := re.match(r'(libtpu\S*)\s*;\s*extra == "tpu"', line):
            return (found[1],)
    raise RuntimeError(f"jax {jax} names no libtpu.")


def fingerprint() -> str:
    """What the programs depend on: the sources, and the versions of what compiles."""
    versions = [record.version(name) for name in ("jax", "jaxlib", "optax", "flax")]
    folders = (record.REPOSITORY / "flood_optax", pathlib.Path(__file__).parent)
    sources = [one for folder in folders for one in sorted(folder.rglob("*.py"))]
    programs = record.REPOSITORY / "benchmarks" / "programs.py"
    about = json.dumps([versions, wheels("tpu"), wheels("cuda")])
    return environments.digest(about, [*sources, programs])


def install(compiler: str, *, offline: bool = False) -> None:
    """Fills uv's cache, or asks whether all is in it.

    Raises:
      RuntimeError: with uv's first error, if the wheels cannot be installed.
    """
    done = subprocess.run(
        [*environments.command(wheels(compiler)), "-c", ""],
        check=False,
        capture_output=True,
        text=True,
        env=variables() | ({"UV_OFFLINE": "1"} if offline else {}),
    )
    if done.returncode:
        why = environments.why(done.stderr)
        raise RuntimeError(f"the compiler for {compiler} cannot be installed: {why}")


def variables() -> dict[str, str]:
    """Of a process that sees the compiler and this jax."""
    path = [str(record.REPOSITORY), *(path for path in sys.path if path)]
    return {**os.environ, **VARIABLES, "PYTHONPATH": os.pathsep.join(path)}


def compile_cells(
    target: str, cells: Sequence[Cell], journal: pathlib.Path
) -> list[dict[str, Any]]:
    """Compiles what the journal lacks, in a process of its own, and reads the journal.

    Importing jax beside libtpu looks for a TPU first, and a compiler that crashes ends
    its process: neither may touch this one.

    Raises:
      RuntimeError: with the end of what it said, if the process fails.
    """

    def rows() -> dict[tuple[Any, ...], dict[str, Any]]:
        return {identity(row): row for row in record.lines(journal)}

    kept = rows()
    if missing := [cell for cell in cells if identity(cell) not in kept]:
        python = environments.command(wheels(TARGETS[target].compiler))
        done = subprocess.run(
            [*python, "-m", "benchmarks.compilers.worker", target, str(journal)],
            check=False,
            input=json.dumps(missing),
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=record.REPOSITORY,
            env=variables(),
        )
        if done.returncode:
            raise RuntimeError(
                f"The compiler for {target} ended with {done.returncode}.\n"
                f"{done.stderr[-2000:]}"
            )
    found = rows()
    return [found[identity(cell)] for cell in cells]
