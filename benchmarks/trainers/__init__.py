"""Trains with flooding in the trainers that people use, each where it is installed.

A trainer is a module of this folder, `NAME.py`, and runs in an environment of its own,
made by `uv run --with`. To add one, write

* `TITLE`, how the table names it; `SECTION`, the heading of docs/trainers.md under
  which its recipe stands; `REQUIREMENTS`, what is installed, pinned, the trainer's
  package first; if needed `PYTHON` ("3.12"), `VARIABLES` of the process, and `ABSENT`,
  why it cannot be run at all. These are literals: they are read, not imported, because
  the module imports the trainer;
* `measure(run)`, which trains by the trainer's own loop and returns a `rows.Row`, by
  `own_loop.measure` if that loop is the user's. The recipe is not repeated but taken
  from the page: `run.recipe(name=object, ...)` executes the code under "Recipes", then
  that under the heading, given those names, and returns what it has defined.
  `run.steps(200)` is fewer in a smoke run, `run.work` an empty folder;
* its place in `environments.ORDER`.

Then `python -m benchmarks trainers NAME --smoke`. A trainer that fails, or cannot be
installed, keeps a row that says why.
"""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks import record, report
from benchmarks.trainers import environments, summary


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The tables of docs/trainers.md."""
    made = summary.tables(payload["rows"])
    source = report.provenance(payload)
    return {name: f"{text}\n\n{source}" for name, text in made.items()}


def main(argv: Sequence[str] | None = None) -> None:
    known = environments.trainers()
    parser = record.arguments("trainers", (__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    args = parser.parse_args(argv)
    if unknown := set(args.names) - known.keys():
        parser.error(f"no trainer {sorted(unknown)}; there are: {', '.join(known)}")
    record.check_destination(args.out)
    wanted = {name: known[name] for name in args.names or known}
    args.out.mkdir(parents=True, exist_ok=True)
    journal = args.out / "trainers.jsonl"
    done: dict[str, dict[str, Any]] = {}
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            done[row["trainer"]] = row
    for name, trainer in wanted.items():
        sources = environments.fingerprint(trainer, smoke=args.smoke)
        kept = done.get(name, {})
        if kept.get("sources") == sources and "error" not in kept:
            continue
        print(f"{name} ...", flush=True)
        row = environments.run(trainer, smoke=args.smoke)
        done[name] = row = {"trainer": name, "sources": sources, **row}
        with journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{name}: {row.get('error') or summary.sentence(row)}", flush=True)
    rows = [
        {key: value for key, value in done[name].items() if key != "sources"}
        for name in known
        if name in done
    ]
    written = record.write("trainers", {"rows": rows}, args.out)
    print("\n\n".join(tables(record.read("trainers", args.out)).values()))
    print(f"\nWrote {written}")
