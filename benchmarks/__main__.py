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
    """The modules with a `main`, and the first line of their docstrings.

    They are read, not imported, so a missing extra does not hide any.
    """
    found: dict[str, str] = {}
    for path in sorted(HERE.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
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
    module.main(rest)


if __name__ == "__main__":
    main()
