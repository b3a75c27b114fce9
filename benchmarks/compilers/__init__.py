"""Compiles flooded steps for TPUs and GPUs, on a machine that has neither.

XLA's compilers for TPU and for NVIDIA GPUs are installed in environments of their own
and given training steps in every form, for machines that are only described to them.
What comes out is compared with the step without flooding: what it computes, reads,
writes, holds and sends.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from benchmarks import report
from benchmarks.compilers import environments, summary
from benchmarks.compilers.targets import TARGETS

FEW = ("plain", "loss form", "optax form")
SIX = (*FEW, "wrapper", "MultiSteps(4)", "wrapper, every_k=4")
EVERY = (
    *(*SIX, "per example", "per class"),
    *("shard_map, plain", "shard_map, loss form", "shard_map, optax form"),
    *("SAM", "SAM, loss form", "exact penalty"),
)
SWEEPS = ("sweep, vmap", "sweep, shard")
# Target, model, dtype, whether parameters are sharded, forms. Left out is what would
# repeat a finding: the same machine once more, or a form that others contain.
PLAN: tuple[tuple[str, str, str, bool, tuple[str, ...]], ...] = (
    *((target, "mlp", "bfloat16", False, EVERY) for target in ("v5e 2x2", "8 H100")),
    *((target, "mlp", "float32", False, SIX) for target in ("v5e 2x2", "8 H100")),
    *(
        (target, "transformer", "bfloat16", fsdp, forms)
        for target in ("v5e 2x2", "8 H100")
        for fsdp, forms in ((False, SIX), (True, FEW))
    ),
    *((target, "cnn", "bfloat16", False, FEW) for target in ("v5e 2x2", "8 H100")),
    *(
        (target, "mlp", "bfloat16", False, FEW)
        for target in ("v5e 4x4", "v5e 8x8", "v5e 16x16")
    ),
    ("v5e 16x16", "transformer", "bfloat16", True, FEW),
    *((target, "mlp", "bfloat16", False, FEW) for target in ("v5p 2x2x1", "v6e 2x2")),
    ("v6e 2x2", "transformer", "bfloat16", False, FEW),
    *(
        (target, model, "bfloat16", False, FEW)
        for target in ("H100", "A100")
        for model in ("mlp", "transformer")
    ),
    *(
        (target, model, "float32", False, FEW)
        for target in ("8 H100", "v5e 2x2")
        for model in ("cnn", "transformer")
    ),
    *((target, "flash", "bfloat16", False, SIX) for target in ("v5e",)),
    # whether a factor that comes from the loss costs the same where it floods nothing
    *(
        (target, "transformer", dtype, fsdp, ("another factor",))
        for target, dtype, fsdp in (
            ("v5e 2x2", "bfloat16", True),
            ("8 H100", "float32", False),
        )
    ),
    *((target, "sweep", "float32", False, SWEEPS) for target in ("v5e 2x2", "8 H100")),
)
SMOKE = (
    ("v5e 2x2", "mlp", "bfloat16", False, FEW),
    ("H100", "mlp", "bfloat16", False, FEW),
)


def cells(plan: Any) -> Iterator[environments.Cell]:
    for target, model, dtype, fsdp, forms in plan:
        for form in forms:
            yield {
                "target": target,
                "chips": TARGETS[target].chips,
                "model": model,
                "dtype": dtype,
                "fsdp": fsdp,
                "form": form,
            }


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/evidence/accelerators.md."""
    made = summary.tables(payload["rows"])
    source = report.provenance(payload)
    return {name: f"{text}\n\n{source}" for name, text in made.items()}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--install", action="store_true", help="install the compilers, nothing else"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """The rows of all programs; what has been compiled since a change is kept."""
    skipped: dict[str, str] = {}
    for compiler in dict.fromkeys(target.compiler for target in TARGETS.values()):
        try:
            environments.install(compiler)
        except RuntimeError as error:
            skipped[compiler] = str(error)
            print(f"Skipped: {error}")
    if args.install:
        return None
    plan, sources = SMOKE if args.smoke else PLAN, environments.fingerprint()
    by_target: dict[str, list[environments.Cell]] = {}
    for cell in cells(plan):
        if TARGETS[cell["target"]].compiler not in skipped:
            by_target.setdefault(cell["target"], []).append(cell)

    def compile_for(target: str) -> list[dict[str, Any]]:
        journal = args.out / "compilers" / f"{sources} {target}.jsonl"
        return environments.compile_cells(target, by_target[target], journal)

    with futures.ThreadPoolExecutor(args.workers) as pool:  # each waits for a process
        made = [row for rows in pool.map(compile_for, by_target) for row in rows]
    if not made:
        raise SystemExit("Nothing was compiled.")
    found = {environments.identity(row): row for row in made}
    order = map(environments.identity, cells(plan))
    rows = [found[name] for name in order if name in found]
    protocol = {
        "wheels": {name: list(environments.wheels(name)) for name in ("tpu", "cuda")},
        "skipped": skipped,
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows)),
    }
    return {"protocol": protocol, "rows": rows}
