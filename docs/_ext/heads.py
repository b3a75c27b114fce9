"""What search engines read: a title for the front page, a description for each."""

import html
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

FRONT = "Flooding for JAX and Optax"
LONGEST = 160  # letters that are shown


def description(doctree: nodes.document) -> str:
    """The first paragraph with words, as far as whole words fit."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if len(text) > 40:
            if len(text) <= LONGEST:
                return text
            return text[: LONGEST - 1].rsplit(" ", 1)[0].rstrip(",.;:") + "…"
    return ""


def fill(
    app: Sphinx, pagename: str, _: str, context: dict[str, Any], doctree: Any
) -> None:
    """Adds them to what the template is given."""
    if doctree is None:  # the index of names, the search
        return
    if pagename == app.config.root_doc:
        context["title"] = FRONT
    if text := description(doctree):
        content = html.escape(text, quote=True)
        tag = f'<meta name="description" content="{content}">'
        context["metatags"] = context.get("metatags", "") + tag


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the hook."""
    app.connect("html-page-context", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
