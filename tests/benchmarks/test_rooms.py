"""The benchmarks import one way: studies from shared rooms, and never each other."""

import ast
import graphlib
import pathlib

from benchmarks import __main__ as command, record

HERE = record.REPOSITORY / "benchmarks"
COMMANDS = {"report"}  # with a `main`, and no study


def modules():
    """Every module of the benchmarks by its dotted name."""
    found = {}
    for path in HERE.rglob("*.py"):
        parts = path.relative_to(HERE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: pathlib.Path, known):
    """The modules of the benchmarks that a file names in its imports, at any depth."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            # of a package either a module of it, or a name that it holds itself
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            named |= {name if name in known else node.module for name in inner}
    return {name for name in named & known.keys() if name != "benchmarks"}


def study_of(module):
    return module.split(".")[1] if "." in module else ""


def test_imports_of_the_benchmarks_hold_no_circle():
    known = modules()
    graph = {name: imports(path, known) for name, path in known.items()}
    assert graph["benchmarks.rivals"] >= {
        "benchmarks.report",
        "benchmarks.rivals.compared",
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == known.keys()


def test_no_benchmark_imports_another():
    known = modules()
    studies = command.discover().keys() - COMMANDS
    assert {"family", "fashion", "images", "synthetic", "penalty"} <= studies
    for name, path in known.items():
        others = {study_of(one) for one in imports(path, known)} & studies
        assert others <= {study_of(name)}, f"{name} imports {others}"


def test_files_of_the_benchmarks_are_short():
    for path in HERE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path.name
