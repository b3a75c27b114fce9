"""How Sphinx builds the pages: `python -m sphinx -W docs OUT`."""

import importlib
import pathlib
import sys
import urllib.error
import urllib.request
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

import flood_optax

sys.path[:0] = [str(pathlib.Path(__file__).parent / "_ext")]

project = "flood_optax"
author = "The flood_optax authors"
copyright = author  # noqa: A001
version = release = flood_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "cells",
    "heads",
    "mathml",
    "redirects",
]
exclude_patterns = ["_build", "_ext"]
templates_path = ["_templates"]
default_role = "py:obj"  # `jax.grad` in a docstring is a link where it can be one
nitpicky = False
suppress_warnings = ["toc.not_included"]  # pages that links lead to, not the side bar

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

autosummary_generate = True
autosummary_imported_members = True
autodoc_typehints = "none"  # the shapes and dtypes stand in the text
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_admonition_for_examples = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def reachable(url: str) -> bool:
    """Whether the inventory is there: without a network the links are left out."""
    try:
        with urllib.request.urlopen(f"{url}objects.inv", timeout=10):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


intersphinx_mapping = {
    name: (url, None)
    for name, url in {
        "python": "https://docs.python.org/3/",
        "jax": "https://docs.jax.dev/en/latest/",
        "optax": "https://optax.readthedocs.io/en/latest/",
        "flax": "https://flax.readthedocs.io/en/latest/",
    }.items()
    if reachable(url)
}

redirects = {  # the addresses of pages that have moved
    "changelog": "project#changelog",
    "cite": "project#how-to-cite",
    "contributing": "project#contributing",
    "gallery": "evidence/index",
    "optax-contrib": "project",
    "optax-examples": "trainers#optimizers-and-patterns",
    "own-loop": "choosing-b#use-one-plain-run",
    "results": "evidence/index",
    "logging": "traps#what-to-read-in-flood_below",
    "sharp-edges": "traps",
    "sharpness": "theory#sharpness",
    "rivals": "evidence/rivals",
    "strokes": "averaging",
    "training-loss-goes-to-zero": "quickstart#training-loss-goes-to-zero-from-pytorch",
    "versioning": "install#versions-and-what-they-promise",
}

html_theme = "sphinx_book_theme"
html_title = "flood_optax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_domain_indices = False
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "repository_url": "https://github.com/flood-optax/flood_optax",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_navbar_depth": 1,
    "max_navbar_depth": 1,  # the entries of the side bar; the rest is behind them
    "navbar_persistent": [],
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}


OURS = ["", ".levels", ".penalty", ".sharpness", ".sweep"]


def own_reference(app: Sphinx, env: Any, node: pending_xref, child: nodes.Node) -> None:
    """Warns of a name of ours that leads nowhere; others' may be out of reach."""
    modules = [importlib.import_module(f"flood_optax{name}") for name in OURS]
    first = node["reftarget"].removeprefix("flood_optax.").partition(".")[0]
    if any(first in module.__all__ for module in modules):
        message = "a reference to %s leads nowhere"
        getLogger(__name__).warning(message, node["reftarget"], location=node)


def setup(app: Sphinx) -> None:
    """Registers the hook."""
    app.connect("missing-reference", own_reference)
