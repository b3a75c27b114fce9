"""Rows of trainers as tables."""

import re
from collections.abc import Mapping, Sequence
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
    """Its name, which leads to its recipe on this page or another, and the version."""
    place = f"{page}#{anchor(row['section'])}"
    return f"[{row['title']}]({place}) {version(row)}".strip()


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
    bold = row["accumulates"] == "each micro-batch"
    return "**each micro-batch**" if bold else row["accumulates"] or NONE


def installed(row: Row) -> str:
    """How it was installed and when it was run."""
    first, *rest = row["requirements"]
    few = [first, *rest] if len(rest) < 6 else [first]
    more = "" if len(rest) < 6 else f" and what `{row['trainer']}.py` names"
    python = row["versions"]["python"]
    return f"`pip install {' '.join(few)}`{more}, Python {python}, {row['date']}"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """What to write, what each trainer does, what its recipe and wrong forms gave."""
    ran = [row for row in rows if "error" not in row]
    lines = [
        [title(row), row["form"], row["line"], row["logs"]]
        if "error" not in row
        else [title(row), f"not run: {row['error']}".replace("|", "/"), "", ""]
        for row in rows
    ]
    does: dict[str, report.Cell] = {
        "trainer": elsewhere,
        "does `value=` reach the optimizer?": "{value}",
        "does it evaluate with the training loss?": evaluates,
        "its accumulation floods": accumulates,
    }
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
        "installed, Python, date": installed,
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
        "trainers": report.markdown(
            ["trainer", "form", "the line to write", "what it logs"], lines
        ),
        "trainers-does": report.table(ran, does),
        "trainers-runs": report.table(ran, gave),
        "trainers-wrong": report.table(
            wrong,
            {"trainer": "{shown}", "what one would write": "{code}", "gives": "{text}"},
        ),
    }
