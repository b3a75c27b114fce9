"""Cells of tables keep a number and its interval, or a range, on one line."""

import re

from docutils import nodes
from sphinx.application import Sphinx

TOGETHER = re.compile(r"(?<=\d) (±|to) (?=[\d.])")


def join(_: Sphinx, doctree: nodes.document) -> None:
    """Makes the spaces in them such that no line ends there."""
    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            if not isinstance(text.parent, nodes.literal):
                joined = TOGETHER.sub("\N{NO-BREAK SPACE}\\1\N{NO-BREAK SPACE}", text)
                text.parent.replace(text, nodes.Text(joined))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the hook."""
    app.connect("doctree-read", join)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
