"""Old addresses: a page of a few lines that leads to the new one, fragment and all."""

import html
import json
import pathlib
import posixpath

from sphinx.application import Sphinx

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Moved: flood_optax</title>
<meta http-equiv="refresh" content="1; url={link}">
<link rel="canonical" href="{link}">
<script>location.replace({page} + (location.hash || {place}))</script>
</head>
<body><main>
<h1>Moved</h1>
<p>This page is now <a href="{link}">{link}</a>.</p>
</main></body>
</html>
"""


def write(app: Sphinx, exception: Exception | None) -> None:
    """Writes a page at each old address; old and new are names without `.html`."""
    if exception is not None or app.builder.format != "html":
        return
    for old, new in app.config.redirects.items():
        page, sign, place = new.partition("#")
        if page not in app.env.all_docs or old in app.env.all_docs:
            raise ValueError(f"docs/conf.py leads from {old!r} to {new!r}.")
        path = posixpath.relpath(f"{page}.html", posixpath.dirname(old) or ".")
        place = sign + place
        target = pathlib.Path(app.outdir, f"{old}.html")
        target.parent.mkdir(parents=True, exist_ok=True)
        text = PAGE.format(
            link=html.escape(path + place),
            page=json.dumps(path),
            place=json.dumps(place),
        )
        target.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the table of old and new addresses."""
    app.add_config_value("redirects", {}, "html", dict)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
