"""Rows of trainers as tables."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import report

Row = Mapping[str, Any]
NONE = "-"


def sentence(row: Row) -> str:
    """One line on a row."""
    return (
        f"raw loss {row['last']:.4g} at level {row['level']:g}, "
        f"{row['below']:.0%} of the last steps below, in {row['seconds']} s"
    )


def anchor(heading: str) -> str:
    """The address of a heading on its page."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def version(row: Row) -> str:
    """Of the trainer's own package; without a run the one that was asked for."""
    name, _, wanted = row["requirements"][0].partition("==")
    found: dict[str, str] = row.get("versions") or {}
    return found.get(str(name).partition("[")[0]) or str(wanted)


def title(row: Row, page: str = "") -> str:
    """A link to its section, of the page shown or of another."""
    return f"[{row['title']}]({page}#{anchor(row['section'])}) {version(row)}"


def elsewhere(row: Row) -> str:
    """The same from a page of docs/evidence."""
    return title(row, "../trainers.md")


def small(difference: float | None) -> str:
    if difference is None:
        return NONE
    return f"{difference:.1g}" if difference else "0"


def evaluates(row: Row) -> str:
    return {None: "you write it", True: "**yes**", False: "no"}[
        row["evaluates_flooded"]
    ]


def accumulates(row: Row) -> str:
    if row["accumulates"] is None:
        return NONE
    if row["accumulates"] == "each micro-batch":
        return "**each micro-batch**"
    return row["accumulates"]


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """What each trainer does, what its recipe gave, and what wrong forms give."""
    ran = [row for row in rows if "error" not in row]
    does: dict[str, report.Cell] = {
        "trainer": title,
        "does `value=` reach the optimizer?": "{value}",
        "does it evaluate with the training loss?": evaluates,
        "its accumulation floods": accumulates,
        "use": "{form}",
    }
    lines = [
        [cell(row) if callable(cell) else cell.format(**row) for cell in does.values()]
        if "error" not in row
        else [title(row), f"not run: {row['error']}".replace("|", "/"), "", "", ""]
        for row in rows
    ]
    gave: dict[str, report.Cell] = {
        "trainer": elsewhere,
        "level": "{level:g}",
        "raw loss": "{last:.4g}",
        "below": "{below:.0%}",
        "least evaluation loss": lambda row: (
            NONE
            if row["evaluation_least"] is None
            else f"{row['evaluation_least']:.3g}"
        ),
        "off the raw one": lambda row: small(row["evaluation_off"]),
        "accumulated": lambda row: small(row["accumulation"]),
        "resumed": lambda row: small(row["resume"]),
    }
    wrong = [
        {
            **fault,
            "shown": elsewhere(row),
            "text": fault["effect"].format(**fault["numbers"]),
        }
        for row in ran
        for fault in row["wrong"]
    ]
    return {
        "trainers": report.markdown(list(does), lines),
        "trainers-runs": report.table(ran, gave),
        "trainers-wrong": report.table(
            wrong,
            {"trainer": "{shown}", "what one would write": "{code}", "gives": "{text}"},
        ),
    }


def _numbers(row: Row) -> Iterator[tuple[str, float | None]]:
    for name in ("level", "last", "below", "evaluation_least", "evaluation_off"):
        yield name, row[name]
    for name in ("accumulation", "resume"):
        yield name, row[name]
    yield from row["notes"].items()
    for number, fault in enumerate(row["wrong"], 1):
        for name, value in fault["numbers"].items():
            yield f"wrong{number}/{name}", value


def numbers(rows: Sequence[Row]) -> dict[str, float]:
    """Every number by TRAINER/NAME."""
    return {
        f"{row['trainer']}/{name}": value
        for row in rows
        if "error" not in row
        for name, value in _numbers(row)
        if value is not None
    }
