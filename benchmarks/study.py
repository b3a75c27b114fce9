"""What every study shares: its options, its runs, and what is done with its findings.

A study is a module, or a package, whose docstring's first line is its question, with

    measure(args)     what it finds, a JSON document; None where nothing is to be kept
    tables(payload)   the tables of that, by their markers in the pages

A finished study has no `measure`: its record and its tables stay, and its code is at
the commit that the record names.

Where it needs them, it has `options(parser)` for options of its own, `figures(payload)`
for the pages (see `report`), and `record_name(payload)` where the record is not called
as the study is.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from benchmarks import record, report


def conduct(study: ModuleType, argv: Sequence[str] | None) -> None:
    """Measures, keeps what was found, and shows it as the pages would."""
    name = study.__name__.removeprefix("benchmarks.")
    parser = record.arguments(name, study.__doc__)
    if hasattr(study, "options"):
        study.options(parser)
    args = parser.parse_args(argv)
    payload = study.measure(args)
    if payload is None:
        return
    if hasattr(study, "record_name"):
        name = study.record_name(payload)
    written = record.write(name, payload, args.out)
    document = record.read(name, args.out)
    print("\n" + "\n\n".join(study.tables(document).values()), f"\n\nWrote {written}")
    if hasattr(study, "figures"):
        for title, figure in study.figures(document).items():
            figure.write(args.out / f"{title}.svg")
            print(f"Drew {args.out / title}.svg")


def show(study: ModuleType) -> None:
    """Prints what a finished study found, and how its code is run once more."""
    for title, module, document in report.records(record.RESULTS):
        if module is study:
            commit, command = (
                document["environment"][k] for k in ("commit", "command")
            )
            print("\n\n".join(study.tables(document).values()))
            print(
                f"\nTo run it once more, with the code of its commit:\n\n"
                f"    git worktree add ../{title} {commit[:10]}\n"
                f"    cd ../{title} && {command}\n"
            )


def work_option(parser: argparse.ArgumentParser, work: pathlib.Path) -> None:
    """Where what is finished is kept."""
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=work,
        help="where what is finished is kept; a second start does what is missing",
    )


def xla_flags(*words: str) -> None:
    """Adds flags, which must come before JAX looks for devices."""
    before = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = " ".join([before, *words]).strip()


def kept(
    path: pathlib.Path, about: Any, make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The row that a journal holds about the same, or a new one, which it keeps."""
    about = json.loads(json.dumps(about))
    for line in record.lines(path):
        if line["about"] == about:
            return line["row"]
    row = make()
    record.append(path, {"about": about, "row": row})
    print(f"{path.stem}: {len(record.lines(path))} rows", flush=True)
    return row
