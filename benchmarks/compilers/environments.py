"""Installs XLA's compilers beside the jax that runs, and starts programs with them."""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import record
from benchmarks.compilers.targets import TARGETS, VARIABLES

Cell = dict[str, Any]


def default() -> pathlib.Path:
    """Where the compilers are kept: `FLOOD_OPTAX_COMPILERS`, or the user's cache."""
    given = os.environ.get("FLOOD_OPTAX_COMPILERS")
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(given or pathlib.Path(cache) / "flood_optax" / "compilers")


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
    digest = hashlib.sha256()
    for folder in ("flood_optax", "benchmarks/compilers", "benchmarks/programs.py"):
        path = record.REPOSITORY / folder
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(source.read_bytes())
    versions = [record.version(name) for name in ("jax", "jaxlib", "optax", "flax")]
    digest.update(json.dumps([versions, wheels("tpu"), wheels("cuda")]).encode())
    return digest.hexdigest()[:16]


def python_of(compiler: str, envs: pathlib.Path) -> pathlib.Path:
    return envs / compiler / "bin" / "python"


def installed(compiler: str, envs: pathlib.Path) -> bool:
    """Whether the compiler is there, for this jax."""
    mark = envs / compiler / "wheels.json"
    if not mark.exists():
        return False
    return json.loads(mark.read_text(encoding="utf-8")) == list(wheels(compiler))


def install(compiler: str, envs: pathlib.Path) -> None:
    """Makes an environment that holds the compiler alone.

    Raises:
      RuntimeError: with pip's last words, if the wheels cannot be installed.
    """
    if installed(compiler, envs):
        return
    print(f"Installing {', '.join(wheels(compiler))} in {envs / compiler}.", flush=True)
    venv.create(envs / compiler, clear=True, with_pip=True)
    pip = [str(python_of(compiler, envs)), "-m", "pip", "install", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-deps", *wheels(compiler)],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"the compiler for {compiler} cannot be installed: "
            f"{done.stderr.strip().splitlines()[-1]}"
        )
    mark = envs / compiler / "wheels.json"
    mark.write_text(json.dumps(wheels(compiler)), encoding="utf-8")


def compile_cells(
    target: str,
    cells: Sequence[Cell],
    envs: pathlib.Path,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Compiles in a process of its own, which sees the compiler and this jax.

    Hands each row over as it comes. Importing jax beside libtpu looks for a TPU first,
    and a compiler that crashes ends its process: neither may touch this one.

    Raises:
      RuntimeError: with the end of its log, if the process fails.
    """
    compiler = TARGETS[target].compiler
    environment = {**os.environ, **VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(record.REPOSITORY), *(path for path in sys.path if path)]
    )
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        (work / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
        rows, log = work / "rows.jsonl", work / "log.txt"
        command = [str(python_of(compiler, envs)), "-m", "benchmarks.compilers.worker"]
        seen = 0
        with log.open("wb") as stream:
            worker = subprocess.Popen(
                [*command, target, str(work / "cells.json"), str(rows)],
                cwd=record.REPOSITORY,
                env=environment,
                stdout=stream,
                stderr=stream,
            )
            try:
                while True:
                    ended = worker.poll() is not None
                    lines = (
                        rows.read_text("utf-8").splitlines() if rows.exists() else []
                    )
                    for line in lines[seen:]:
                        keep(json.loads(line))
                    seen = len(lines)
                    if ended:
                        break
                    time.sleep(0.5)
            finally:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
        if worker.returncode or seen < len(cells):
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(
                f"The compiler for {target} ended with {worker.returncode} after "
                f"{seen} of {len(cells)} programs.\n{tail}"
            )
