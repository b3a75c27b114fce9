"""The breaks: a line of the library, what it becomes, and the tests that must fail."""

import pathlib
import tomllib
from typing import NamedTuple


class Break(NamedTuple):
    """Text that stands once in a file, what replaces it, and who must see that."""

    file: str
    before: str
    after: str
    tests: str


def applied(mutant: Break, text: str) -> str:
    """The text of the file, broken."""
    if text.count(mutant.before) != 1:
        found = text.count(mutant.before)
        raise ValueError(f"{mutant.file} holds {found} times, not once: {mutant}")
    return text.replace(mutant.before, mutant.after)


_LIST = tomllib.loads(pathlib.Path(__file__).with_suffix(".toml").read_text("utf-8"))
BREAKS = [
    Break(group["file"], before, after, group["tests"])
    for group in _LIST["group"]
    for before, after in group["breaks"]
]
