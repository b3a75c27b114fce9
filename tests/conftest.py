"""One compilation cache for all processes of a run, a worker per core, fixtures."""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Iterator

import pytest


def processor() -> str:
    """What code compiled for this machine depends on: the model and its features."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor() + platform.node()
    kinds = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


# Variables rather than jax.config: the processes that tests start inherit them. Code
# compiled for one processor can crash on another, so each has a directory of its own.
_KEY = hashlib.sha256(processor().encode()).hexdigest()[:12]
_VERSION = importlib.metadata.version("jaxlib")
_CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache" / f"{_VERSION}-{_KEY}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# of programs that compile in no time there are so many that together they take minutes
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# LLVM's part of compiling takes longer than the tests run; XLA's own passes, and so the
# programs whose cost is counted, are the same without it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")  # the workers share the cores already


def pytest_xdist_auto_num_workers() -> int:
    """A worker per core this process may use; tests hold hundreds of MB each."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), 8)
    return min(os.cpu_count() or 1, 8)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compiles as users do, for results that two programs must share bit for bit."""
    import jax  # noqa: PLC0415 - after the variables above

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit types."""
    import jax  # noqa: PLC0415 - after the variables above

    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)
