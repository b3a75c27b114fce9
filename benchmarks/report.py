"""Regenerates the tables and figures of README.md and docs/ from the results.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`, each on a line
of its own. `python -m benchmarks report` writes it, `report --check` finds it changed
or left open.
"""

import argparse
import importlib
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import record

MARKER = re.compile(
    r"<!-- table:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /table:(?P=name) -->", re.S
)
TITLES = {  # of data, where they are not called as in the records
    "mnist-5k": "MNIST-5k",
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "breast_cancer": "breast cancer",
    "two_gaussians": "two Gaussians",
    "mnist-5k-cnn": "MNIST-5k, convolved",
    "mnist-5k-cnn-shifted": "MNIST-5k, convolved and shifted",
    "fashion-mnist-cnn": "Fashion-MNIST, convolved",
    "fashion-mnist-cnn-shifted": "Fashion-MNIST, convolved and shifted",
}
Cell = str | Callable[[Mapping[str, Any]], str]
Columns = Mapping[str, Cell] | Sequence[tuple[str, Cell]]


def title(data: str) -> str:
    """What a data set is called."""
    return TITLES.get(data, data)


def table(rows: Iterable[Mapping[str, Any]], columns: Columns) -> str:
    """A Markdown table.

    Args:
      rows: each a mapping from the names that the columns use.
      columns: header and cell of each column, as a mapping or, where two headers are
        the same, as pairs. A cell is a format string, filled from the row, or a
        function of the row.
    """
    pairs = list(columns.items() if isinstance(columns, Mapping) else columns)
    return markdown(
        [header for header, _ in pairs],
        [
            [cell(row) if callable(cell) else cell.format(**row) for _, cell in pairs]
            for row in rows
        ],
    )


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are text already."""
    every = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def provenance(payload: Mapping[str, Any]) -> str:
    """The line under a table: where its numbers come from."""
    env = payload["environment"]
    commit = str(env["commit"])[:10] + (" with changes" if env["dirty"] else "")
    return (
        f"`{env['command']}`, commit {commit}, jax {env['jax']}, optax {env['optax']}, "
        f"{env['cpu_count']} x {env['cpu']}."
    )


def records(
    results: pathlib.Path, of: str = "*"
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each record, its name and benchmark; `NAME-WHAT` is another record of NAME.

    A folder NAME holds the pieces of one record of NAME, and they come as `pieces`.
    With `of` only those of one benchmark are read.
    """
    for path in sorted({*results.glob(f"{of}.json"), *results.glob(f"{of}-*.json")}):
        module = importlib.import_module(f"benchmarks.{path.stem.partition('-')[0]}")
        yield path.stem, module, record.read(path.stem, results)
    for folder in sorted({path.parent for path in results.glob(f"{of}/*.json")}):
        module = importlib.import_module(f"benchmarks.{folder.name}")
        names = sorted(path.stem for path in folder.glob("*.json"))
        pieces = [record.read(name, folder) for name in names]
        yield folder.name, module, {"pieces": pieces}


def tables(results: pathlib.Path) -> dict[str, str]:
    """Every table the results give: each benchmark's `tables(payload)`, by marker.

    And the one for whom flooding is, which is made from all of them.
    """
    found: dict[str, str] = {}
    payloads: dict[str, dict[str, Any]] = {}
    for name, module, payload in records(results):
        payloads[name] = payload
        made = module.tables(payload)
        if again := found.keys() & made.keys():
            raise ValueError(f"Two benchmarks make the table {sorted(again)}.")
        found |= made
    for_whom = importlib.import_module("benchmarks.for_whom")  # it imports this one
    if for_whom.NEEDED in payloads:
        found[for_whom.TABLE] = for_whom.table(payloads)
    return found


def render(text: str, made: Mapping[str, str]) -> str:
    """The page with the tables that exist written between their markers."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        body = f"\n{made[name].strip()}\n\n" if name in made else match["body"]
        return f"<!-- table:{name} -->\n{body}<!-- /table:{name} -->"

    return MARKER.sub(fill, text)


def pages(repository: pathlib.Path) -> list[pathlib.Path]:
    """The pages that may hold tables."""
    return [repository / "README.md", *sorted((repository / "docs").rglob("*.md"))]


def check(
    repository: pathlib.Path | None = None, results: pathlib.Path | None = None
) -> list[str]:
    """What differs between pages and results; an empty list if nothing does.

    A marker without a result, an opening marker without its end and a table no page
    shows are differences as well.
    """
    repository = repository or record.REPOSITORY
    results = results or repository / "benchmarks" / "results"
    made = tables(results)
    shown: set[str] = set()
    wrong: list[str] = []
    for page in pages(repository):
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(repository)
        complete = {match["name"]: match for match in MARKER.finditer(text)}
        for opened in re.findall(r"<!-- table:([\w-]+) -->", text):
            shown.add(opened)
            if opened not in complete:
                wrong.append(f"{name}: table {opened} has no end marker")
            elif opened not in made:
                wrong.append(f"{name}: table {opened} has no result")
        wrong += [
            f"{name}: table {marker} differs from its result"
            for marker, match in complete.items()
            if marker in made and render(match[0], made) != match[0]
        ]
    wrong += [f"no page shows the table {name}" for name in sorted(made.keys() - shown)]
    return wrong


def figures(repository: pathlib.Path, results: pathlib.Path) -> list[pathlib.Path]:
    """Draws each benchmark's `figures(payload)`, if it has any, into docs/figures."""
    drawn: list[pathlib.Path] = []
    for _, module, payload in records(results):
        if hasattr(module, "figures"):
            for name, fig in module.figures(payload).items():
                target = repository / "docs" / "figures" / f"{name}.svg"
                fig.write(target)
                drawn.append(target)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    repository = record.REPOSITORY
    results = repository / "benchmarks" / "results"
    if not args.check:
        made = tables(results)
        for page in pages(repository):
            before = page.read_text(encoding="utf-8")
            after = render(before, made)
            if after != before:
                page.write_text(after, encoding="utf-8")
                print(f"Wrote {page.relative_to(repository)}")
        for path in figures(repository, results):
            print(f"Drew {path.relative_to(repository)}")
    if wrong := check(repository, results):
        raise SystemExit("\n".join(wrong))
    print("The pages agree with the results.")
