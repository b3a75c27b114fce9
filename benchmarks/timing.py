"""Times rivals side by side, and counts what their compiled programs cost."""

import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import numpy as np

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


def compare(
    rivals: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    calls: int = 1,
    warm_up: int = 3,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Times all rivals in every round, in random order; the first is the reference.

    Each is warmed up, then called `calls` times a round and waited for. Ratios are
    paired: a rival's time over the reference's of the same round, so what slows the
    whole machine cancels.

    Returns:
      For each rival its fastest and median seconds a call, and the median, first and
      third quartile of its paired ratio.
    """
    for call in rivals.values():
        for _ in range(warm_up):
            jax.block_until_ready(call())
    rng = np.random.default_rng(seed)
    names = list(rivals)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for i in rng.permutation(len(names)):
            call = rivals[names[i]]
            start = time.perf_counter()
            jax.block_until_ready([call() for _ in range(calls)])
            seconds[names[i]].append((time.perf_counter() - start) / calls)
    reference = np.array(seconds[names[0]])
    timings: dict[str, dict[str, Any]] = {}
    for name in names:
        ratios = np.array(seconds[name]) / reference
        timings[name] = {
            "seconds_min": min(seconds[name]),
            "seconds_median": statistics.median(seconds[name]),
            "time_ratio_median": float(np.median(ratios)),
            "time_ratio_iqr": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        }
    return timings


def compiled_cost(
    step: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()
) -> dict[str, Any]:
    """What XLA says of one compiled call: deterministic, unlike a clock.

    Training loops donate parameters and state; without it the outputs lend their memory
    to intermediate results and temporary memory says little.

    Returns:
      FLOPs, bytes of temporary memory, number of kernels (instructions of the entry
      computation that do work) and the seconds that compilation took.
    """
    lowered = jax.jit(step, donate_argnums=donate).lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    analysis: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    return {
        "flops": float(analysis["flops"]),
        "temp_bytes": int(memory.temp_size_in_bytes),
        "kernels": kernels(compiled.as_text() or ""),
        "compile_seconds": seconds,
    }


def kernels(hlo: str) -> int:
    """Instructions of the entry computation, but for those that only name data."""
    entry = hlo.partition("\nENTRY ")[2].partition("\n}")[0]
    operations = re.findall(r"^\s+(?:ROOT )?%?\S+ = .*? ([a-z][\w-]*)\(", entry, re.M)
    return sum(operation not in FREE for operation in operations)


def traces(step: Callable[..., Any], *calls: tuple[Any, ...]) -> int:
    """How often jit traces `step` over the calls."""
    count = 0

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return step(*args)

    compiled = cast(Callable[..., Any], jax.jit(counted))
    for args in calls:
        jax.block_until_ready(compiled(*args))
    return count
