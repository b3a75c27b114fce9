"""Runs one trainer: a process of its own, in the trainer's environment."""

import argparse
import importlib
import json
import pathlib
import platform
import re
import traceback
from typing import Any

from benchmarks import record
from benchmarks.trainers import rows


def versions(requirements: tuple[str, ...]) -> dict[str, str]:
    """Of Python, what was asked for, and what every trainer stands on."""
    asked = [re.split(r"[\[=<>;@ ]", each, maxsplit=1)[0] for each in requirements]
    names = dict.fromkeys([*asked, "jax", "optax", "flax"])
    found = ((name, record.version(name)) for name in names)
    known = {name: number for name, number in found if number}
    return {**known, "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("result", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    row: dict[str, Any]
    try:
        module: Any = importlib.import_module(f"benchmarks.trainers.{args.name}")
        run = rows.Run(module.SECTION, args.work, args.smoke)
        row = {"versions": versions(module.REQUIREMENTS)}
        row |= module.measure(run).checked()
    except Exception as error:
        traceback.print_exc()
        first = str(error).partition("\n")[0]
        row = {"error": f"{type(error).__name__}: {first}"}
    args.result.write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main()
