"""Regenerates the tables and figures of README.md and docs/ from the results."""

import argparse
import importlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import record

MARKER = re.compile(
    r"<!-- table:(?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- /table:(?P=name) -->", re.S
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(payload: Mapping[str, Any]) -> str:
    """The line under a table: where its numbers come from."""
    env = payload["environment"]
    commit = str(env["commit"])[:10] + (" with changes" if env["dirty"] else "")
    return (
        f"`{env['command']}`, commit {commit}, jax {env['jax']}, optax {env['optax']}, "
        f"{env['cpu_count']} x {env['cpu']}."
    )


def records(results: pathlib.Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each record with its benchmark; `NAME-WHAT.json` is another record of NAME."""
    for path in sorted(results.glob("*.json")):
        name = path.stem.partition("-")[0]
        module = importlib.import_module(f"benchmarks.{name}")
        yield module, record.read(path.stem, results)


def tables(results: pathlib.Path) -> dict[str, str]:
    """Every table the results give: each benchmark's `tables(payload)`, by marker."""
    found: dict[str, str] = {}
    for module, payload in records(results):
        made = module.tables(payload)
        if again := found.keys() & made.keys():
            raise ValueError(f"Two benchmarks make the table {sorted(again)}.")
        found |= made
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
    for module, payload in records(results):
        if hasattr(module, "figures"):
            for name, fig in module.figures(payload).items():
                target = repository / "docs" / "figures" / f"{name}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                fig.savefig(target, dpi=150, metadata={"Software": None})
                drawn.append(target)
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks report", description=__doc__)
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
