"""Rows of compiled programs, each beside its reference, as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optax

from benchmarks import programs, report

Row = Mapping[str, Any]
RATIOS = (
    "flops",
    "bytes_accessed",
    "estimated_seconds",
    "kernel_bytes",
    "memory_bytes",
)
FLOODED = ("loss form", "optax form")


def references() -> dict[str, str | None]:
    """By form, the form it is compared with."""
    made = programs.forms(lambda params, batch: batch.y, optax.adam(1e-3))
    return {name: form.reference for name, form in made.items()}


def compared(rows: Iterable[Row], of: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Each row with its ratios to the reference, and what it has that that has not.

    Of collectives it says how many more, and how many more bytes they carry; of host
    transfers and custom calls which kinds stand in this program and not in that.
    """

    def setting(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("target", "model", "dtype", "fsdp"))

    rows = [row for row in rows if "error" not in row]
    found = {(*setting(row), row["form"]): row for row in rows}
    result: list[dict[str, Any]] = []
    for row in rows:
        base = found.get((*setting(row), of.get(row["form"])))
        if base is None:
            continue
        ratios = {
            f"{name}_ratio": row[name] / base[name]
            if row[name] and base[name]
            else None
            for name in RATIOS
        }
        more = len(row["collectives"]) - len(base["collectives"])
        sent = sum(size for _, size in row["collectives"])
        result.append(
            {
                **row,
                **ratios,
                "more_kernels": row["kernels"] - base["kernels"],
                "more_collectives": more,
                "more_collective_bytes": sent
                - sum(size for _, size in base["collectives"]),
                "new_custom_calls": sorted(
                    row["custom_calls"].keys() - base["custom_calls"].keys()
                ),
                "new_host_transfers": sorted(
                    set(row["host_transfers"]) - set(base["host_transfers"])
                ),
            }
        )
    return result


def span(rows: Sequence[Row], name: str, digits: int = 4) -> str:
    """From the least to the greatest, one number where they are the same."""
    seen = [row[name] for row in rows if row[name] is not None]
    if not seen:
        return "-"
    ends = [f"{end:.{digits}f}" for end in (min(seen), max(seen))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def moved(row: Row) -> float | None:
    """The compiler's count of bytes accessed; on GPUs the sum over its kernels."""
    return row["bytes_accessed_ratio"] or row["kernel_bytes_ratio"]


def columns(rows: Sequence[Row]) -> list[str]:
    """The cells that the three tables have in common."""
    with_bytes = [{**row, "moved": moved(row)} for row in rows]
    return [
        span(rows, "flops_ratio"),
        span(with_bytes, "moved"),
        span(rows, "estimated_seconds_ratio"),
        span(rows, "memory_bytes_ratio"),
        span(rows, "more_collectives", 0),
        span(rows, "more_collective_bytes", 0),
    ]


HEADER = (
    *("FLOPs", "bytes moved", "estimated time", "memory"),
    *("more collectives", "more bytes in them"),
)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """By form, by machine, and from 4 to 256 chips."""
    of = references()
    beside = compared(rows, of)

    def having(**wanted: Any) -> list[dict[str, Any]]:
        return [
            row
            for row in beside
            if all(
                row[name] in value if isinstance(value, tuple) else row[name] == value
                for name, value in wanted.items()
            )
        ]

    by_form = [
        [
            *(form, str(of[form]), str(len(chosen)), *columns(chosen)),
            span(chosen, "more_kernels", 0),
            str(sum(len(row["new_host_transfers"]) for row in chosen)),
            str(sum(len(row["new_custom_calls"]) for row in chosen)),
        ]
        for form in of
        if (chosen := having(form=form))
    ]
    made = {
        "compilers": report.markdown(
            [
                *("form", "against", "programs", *HEADER, "more kernels"),
                *("host transfers added", "custom calls added"),
            ],
            by_form,
        )
    }
    machines = [
        [
            target,
            f"{sum('error' not in row for row in mine)} of {len(mine)}",
            form,
            *columns(having(target=target, form=form)),
        ]
        for target in dict.fromkeys(row["target"] for row in rows)
        for mine in [[row for row in rows if row["target"] == target]]
        for form in FLOODED
        if having(target=target, form=form)
    ]
    made["compilers-machines"] = report.markdown(
        ["machine", "compiled", "form", *HEADER], machines
    )
    growth = [
        [str(chips), form, *columns(chosen)]
        for chips in sorted({row["chips"] for row in beside})
        for form in FLOODED
        if (
            chosen := [
                row
                for row in having(chips=chips, form=form, model="mlp", dtype="bfloat16")
                if row["target"].startswith("v5e")
            ]
        )
    ]
    made["compilers-growth"] = report.markdown(["chips", "form", *HEADER], growth)
    return made
