"""Compiles flooded steps for TPUs and GPUs, on a machine that has neither.

XLA's compilers for TPU and for NVIDIA GPUs are installed in environments of their own
and given training steps in every form, for machines that are only described to them.
What comes out is compared with the step without flooding: what it computes, reads,
writes, holds and sends.
"""

import json
import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from benchmarks import record, report
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


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("target", "model", "dtype", "fsdp", "form"))


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/evidence/accelerators.md."""
    made = summary.tables(payload["rows"])
    source = report.provenance(payload)
    return {name: f"{text}\n\n{source}" for name, text in made.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = record.arguments("compilers", __doc__)
    parser.add_argument(
        "--envs",
        type=pathlib.Path,
        default=environments.default(),
        help="where the compilers are installed (FLOOD_OPTAX_COMPILERS, or the cache)",
    )
    parser.add_argument(
        "--install", action="store_true", help="install the compilers, nothing else"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    record.check_destination(args.out)
    reasons: dict[str, str] = {}
    for compiler in dict.fromkeys(target.compiler for target in TARGETS.values()):
        try:
            environments.install(compiler, args.envs)
        except RuntimeError as error:
            reasons[compiler] = str(error)
            print(f"Skipped: {error}")
    if args.install:
        return

    args.out.mkdir(parents=True, exist_ok=True)
    journal = args.out / "compilers.jsonl"
    sources = environments.fingerprint()
    done = [
        row
        for line in (
            journal.read_text("utf-8").splitlines() if journal.exists() else ()
        )
        if (row := json.loads(line)).pop("sources", None) == sources
    ]
    known = {identity(row) for row in done}
    wanted = list(cells(SMOKE if args.smoke else PLAN))
    writing = threading.Lock()

    def keep(row: dict[str, Any]) -> None:
        with writing, journal.open("a", encoding="utf-8") as stream:
            done.append(row)
            stream.write(json.dumps({"sources": sources, **row}) + "\n")
            said = row.get("error") or f"{row['cpu_seconds']} s"
            print(" ".join(map(str, identity(row))), said, flush=True)

    def compile_for(target: str) -> None:
        missing = [
            cell
            for cell in wanted
            if cell["target"] == target and identity(cell) not in known
        ]
        if missing:
            environments.compile_cells(target, missing, args.envs, keep)

    targets = dict.fromkeys(cell["target"] for cell in wanted)
    chosen = [name for name in targets if TARGETS[name].compiler not in reasons]
    with futures.ThreadPoolExecutor(args.workers) as pool:  # each waits for a process
        list(pool.map(compile_for, chosen))
    if not done:
        raise SystemExit("Nothing was compiled.")
    order = {identity(cell): number for number, cell in enumerate(wanted)}
    rows = sorted(
        (row for row in done if identity(row) in order),
        key=lambda row: order[identity(row)],
    )
    protocol = {
        "wheels": {name: list(environments.wheels(name)) for name in ("tpu", "cuda")},
        "skipped": reasons,
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows)),
    }
    payload = {"protocol": protocol, "rows": rows}
    written = record.write("compilers", payload, args.out)
    print("\n\n".join(tables(record.read("compilers", args.out)).values()))
    print(f"\nWrote {written}")
