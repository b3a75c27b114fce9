"""The recipes of docs/trainers.md, taken from the page itself."""

import re
from typing import Any

from benchmarks import record

PAGE = record.REPOSITORY / "docs" / "trainers.md"
SHARED = "Recipes"
CODE = re.compile(r"^```py(?:thon)?\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(section: str) -> list[str]:
    """The code under a heading, to the next heading of its rank, with its place."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(
        rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    if not found:
        raise LookupError(f"docs/trainers.md has no section {section!r}.")
    return [
        "\n" * text.count("\n", 0, found.start(1) + code.start(1)) + code[1]
        for code in CODE.finditer(found[1])
    ]


def execute(section: str, given: dict[str, Any]) -> dict[str, Any]:
    """Executes the code under a heading, after what all recipes share."""
    namespace: dict[str, Any] = {"__name__": "recipe"}
    for block in blocks(SHARED):
        exec(compile(block, str(PAGE), "exec"), namespace)
    namespace |= given
    for block in blocks(section):
        exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace
