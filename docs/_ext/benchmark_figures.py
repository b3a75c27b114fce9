"""`{benchmark-figures} NAME`: the figures of a benchmark and the code that draws them.

Every benchmark with figures has a function `figures(payload)`, which `python -m
benchmarks report` calls with the recorded results. The code shown is the one that ran.
"""

import ast
import pathlib

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

ROOT = pathlib.Path(__file__).parents[2]


def source_of_figures(benchmark: str) -> tuple[pathlib.Path, str]:
    """The file of the benchmark's function `figures`, and the text of the function."""
    folder = ROOT / "benchmarks"
    for path in [
        folder / f"{benchmark}.py",
        *sorted((folder / benchmark).glob("*.py")),
    ]:
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name == "figures":
                return path, "\n".join(
                    text.splitlines()[node.lineno - 1 : node.end_lineno]
                )
    raise LookupError(f"no benchmark {benchmark!r} with a function `figures`")


class BenchmarkFigures(Directive):
    """The code behind a benchmark's figures, folded."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The command, then the function."""
        (benchmark,) = self.arguments
        try:
            path, code = source_of_figures(benchmark)
        except LookupError as error:
            raise self.error(str(error)) from error
        self.state.document.settings.env.note_dependency(str(path))
        shell = f"$ python -m benchmarks {benchmark}\n$ python -m benchmarks report"
        where = path.relative_to(ROOT).as_posix()
        command = nodes.literal_block(shell, shell, language="console")
        block = nodes.literal_block(code, code, language="python")
        fold = f"<details><summary>Code: <code>{where}</code></summary>"
        return [
            command,
            nodes.raw("", fold, format="html"),
            block,
            nodes.raw("", "</details>", format="html"),
        ]


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("benchmark-figures", BenchmarkFigures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
