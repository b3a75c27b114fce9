"""Trains with flooding in the trainers that people use, each where it is installed.

A trainer is a module of this folder, `NAME.py`, and runs in an environment of its own,
made by `uv run --with`. To add one, write

* `TITLE`, how the table names it; `SECTION`, the heading of docs/trainers.md under
  which its recipe stands; `REQUIREMENTS`, what is installed, pinned, the trainer's
  package first; if needed `VARIABLES` of the process, and `ABSENT`, why it cannot be
  run at all. These are literals: they are read, not imported, because the module
  imports the trainer;
* `measure(run)`, which trains by the trainer's own loop and returns a `rows.Row`, by
  `own_loop.measure` if that loop is the user's. The recipe is not repeated but taken
  from the page: `run.recipe(name=object, ...)` executes the code under "Recipes", then
  that under the heading, given those names, and returns what it has defined.
  `run.steps(200)` is fewer in a smoke run, `run.work` an empty folder;
* its place in `environments.ORDER`.

Then `python -m benchmarks trainers NAME --smoke`. A trainer that fails, or cannot be
installed, keeps a row that says why.
"""

import argparse
from typing import Any

from benchmarks import record, report
from benchmarks.trainers import environments, summary


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/trainers.md."""
    made = summary.tables(payload["rows"])
    source = report.provenance(payload)
    return {name: f"{text}\n\n{source}" for name, text in made.items()}


def options(parser: argparse.ArgumentParser) -> None:
    known = ", ".join(environments.ORDER)
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs what is named, or all, but for what has run since anything changed."""
    known = environments.trainers()
    if unknown := set(args.names) - known.keys():
        raise SystemExit(f"No trainer {sorted(unknown)}; there are: {', '.join(known)}")
    journal = args.out / "trainers.jsonl"
    done = {row["trainer"]: row for row in record.lines(journal)}
    for name in args.names or known:
        sources = environments.fingerprint(known[name], smoke=args.smoke)
        kept = done.get(name, {})
        if kept.get("sources") != sources or "error" in kept:
            print(f"{name} ...", flush=True)
            row = environments.run(known[name], smoke=args.smoke)
            done[name] = row = {"trainer": name, "sources": sources, **row}
            record.append(journal, row)
            print(f"{name}: {row.get('error') or summary.sentence(row)}", flush=True)
    rows = [done[name] for name in known if name in done]
    return {"rows": [{k: v for k, v in row.items() if k != "sources"} for row in rows]}
