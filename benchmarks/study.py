"""What every study shares: its options, its runs, and what is done with its findings.

A study is a module, or a package, whose docstring's first line is its question, with

    measure(args)     what it finds, a JSON document; None where nothing is to be kept
    tables(payload)   the tables of that, by their markers in the pages

A finished study has no `measure`: its record and its tables stay, and its code is at
the commit that the record names.

Where it needs them, it has `options(parser)` for options of its own, and
`figures(payload)` for the pages (see `report`).
"""

from collections.abc import Sequence
from types import ModuleType

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
    written = record.write(name, payload, args.out)
    document = record.read(name, args.out)
    print("\n" + "\n\n".join(study.tables(document).values()), f"\n\nWrote {written}")
    if hasattr(study, "figures"):
        for title, figure in study.figures(document).items():
            figure.write(args.out / f"{title}.svg")
            print(f"Drew {args.out / title}.svg")


def show(study: ModuleType) -> None:
    """Prints what a finished study found, and how its code is run once more."""
    name = study.__name__.removeprefix("benchmarks.")
    for title, _, document in report.records(record.RESULTS, of=name):
        print("\n\n".join(study.tables(document).values()))
        print("\nTo run it once more, with the code of its commit:\n")
        commands: dict[str, list[str]] = {}
        for piece in document.get("pieces", [document]):
            made = piece["environment"]
            commands.setdefault(made["commit"][:10], []).append(made["command"])
        for commit, lines in commands.items():
            place = f"../{title}-{commit}"
            print(f"    git worktree add {place} {commit}\n    cd {place}")
            print("".join(f"    {line}\n" for line in lines))
