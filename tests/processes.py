"""Python processes that tests start, and the named checks such a process reports."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).parents[1]
# what a killed process left half written in the cache: JAX compiles instead
HALF_WRITTEN = "ignore:Error reading persistent compilation cache entry:UserWarning"


def start(
    *arguments: object,
    filters: tuple[str, ...] = ("error",),
    devices: int | None = None,
    **variables: str,
) -> subprocess.Popen[str]:
    """Starts Python on the CPU, with `filters` for warnings, on so many devices."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    if devices is not None:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    flags = [f"-W{each}" for each in (*filters, HALF_WRITTEN)]
    return subprocess.Popen(
        [sys.executable, *flags, *map(str, arguments)],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def end(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    """Return code, output and errors of a process; it is killed when time is up."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"\nIt was killed after {timeout} s."
    return process.returncode, out, err


def free_address() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def report(checks: Mapping[str, Callable[[], object]]) -> None:
    """Runs every check and prints a line of JSON for each: null, or the traceback."""
    for name, check in checks.items():
        try:
            check()
            outcome = None
        except Exception:
            outcome = traceback.format_exc(limit=-6)
        print(json.dumps({name: outcome}), flush=True)  # noqa: T201


@functools.cache
def _outcomes(script: pathlib.Path, *arguments: object, **options):
    _, out, err = end(start(script, *arguments, **options))
    outcomes: dict[str, str | None] = {}
    for line in out.splitlines():
        if line.startswith('{"'):  # JAX prints too, under debug_nans
            outcomes |= json.loads(line)
    return outcomes, f"The process did not come to this check:\n{err[-3000:]}"


def assert_held(name: str, script: str, *arguments: object, **options) -> None:
    """Asserts one check of a script, which runs once, for all checks it reports."""
    outcomes, absent = _outcomes(pathlib.Path(script), *arguments, **options)
    outcome = outcomes.get(name, absent)
    assert outcome is None, outcome
