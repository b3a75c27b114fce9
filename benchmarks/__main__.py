"""Lists the benchmarks, and runs one: `python -m benchmarks NAME [--smoke] [--out]`."""

import argparse
import ast
import importlib
import pathlib
import sys
from collections.abc import Sequence

from benchmarks import record

HERE = pathlib.Path(__file__).parent
EXTRA_OF = {"torch": "rivals"}  # every other missing module is in the extra `bench`


def discover() -> dict[str, str]:
    """The studies and commands, and the first line of their docstrings.

    A study has `tables`, a command of its own kind `main`. They are read, not imported,
    so a missing extra does not hide any.
    """
    found: dict[str, str] = {}
    packages = {path.parent.name: path for path in HERE.glob("*/__init__.py")}
    modules = {path.stem: path for path in HERE.glob("[!_]*.py")}
    for name, path in sorted((packages | modules).items()):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        if defined & {"main", "measure", "tables"}:
            found[name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    found = discover()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [--smoke] [--out DIR]\n")
        width = max(map(len, found))
        print("\n".join(f"  {name:{width}}  {line}" for name, line in found.items()))
        return
    name, *rest = arguments
    if name not in found:
        known = ", ".join(found)
        raise SystemExit(f"No benchmark named {name!r}; there are: {known}.")
    out = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    out.add_argument("--out", type=pathlib.Path)
    given: pathlib.Path | None = out.parse_known_args(rest)[0].out
    if given is not None:
        record.check_destination(given)  # now, not after an hour
    try:
        study = importlib.import_module("benchmarks.study")
        module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("benchmarks", "flood_optax"):
            raise
        extra = EXTRA_OF.get(missing, "bench")
        raise SystemExit(
            f"`python -m benchmarks {name}` needs {missing}: "
            f"pip install 'flood_optax[{extra}]'."
        ) from error
    if hasattr(module, "main"):
        module.main(rest)
    elif hasattr(module, "measure"):
        study.conduct(module, rest)
    else:
        argparse.ArgumentParser(
            f"python -m benchmarks {name}", description=module.__doc__
        ).parse_args(rest)
        study.show(module)


if __name__ == "__main__":
    main()
