"""Asks what beats flooding: each method tries 20 configurations of a space, or none."""

import argparse
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record, study
from benchmarks.rivals import settings
from benchmarks.rivals.before import known
from benchmarks.rivals.findings import figures, tables
from benchmarks.rivals.methods import METHODS, SCHEDULES, Method
from benchmarks.rivals.problems import problem
from benchmarks.rivals.settings import SIZES, Constants, Problem
from benchmarks.rivals.training import COLUMNS, READOUTS, stacked, stops_of, trainer

__all__ = ["figures", "measure", "options", "record_name", "tables"]

Row = Mapping[str, Any]
TRAINED = {key: method for key, method in METHODS.items() if not method.of}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("piece", choices=SIZES, nargs="?", default="wine")
    parser.add_argument("--methods", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--seeds", type=int, help="as many as the piece asks for")
    parser.add_argument(
        "--minutes", type=float, help="begin nothing later; the record has what is done"
    )
    parser.add_argument("--data", type=pathlib.Path, help="of Fashion-MNIST's files")
    study.work_option(parser, pathlib.Path("out", "rivals"))


def record_name(payload: Mapping[str, Any]) -> str:
    """A record for each piece."""
    return f"rivals/{payload['piece']}"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One piece: a data set and a network. Rows that are kept anywhere are not redone.

    The seeds come outermost, so that a piece which is stopped is whole for fewer seeds.
    """
    study.xla_flags("--xla_cpu_multi_thread_eigen=false")  # a piece for each core
    constants, size = Constants(), SIZES[args.piece]
    chosen = args.methods
    if args.smoke:
        constants, size = settings.SMOKE, settings.small(size)
        chosen = [m for m in chosen if m in ("plain", "sam", "elr", "adaflood", "band")]
    at = problem(args.piece, args.data, size)
    journal = None if args.smoke else args.work / f"{args.piece}.jsonl"
    kept = kept_rows(journal, args.out / "rivals" / f"{args.piece}.json")
    rows = list(
        runs(
            at,
            constants,
            chosen,
            args.seeds or size.seeds,
            kept=kept,
            journal=journal,
            until=args.minutes and time.monotonic() + 60 * args.minutes,
        )
    )
    return {
        "piece": args.piece,
        "data": at.data,
        "pool": at.pool,
        "methods_tried": list(chosen),
        "protocol": {
            **dataclasses.asdict(constants),
            **size._asdict(),
            "labels": "flipped in training and validation, true in the test",
        },
        "rows": rows,
    }


def kept_rows(
    journal: pathlib.Path | None, recorded: pathlib.Path
) -> dict[tuple[Any, ...], Row]:
    """The rows of a journal and of a record, by what they are of."""
    found = record.lines(journal)
    if recorded.is_file():
        found += record.read(recorded.stem, recorded.parent)["rows"]
    return {name_of(row): row for row in found}


def name_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[field] for field in ("method", "flips", "seed", "digest"))


def runs(
    at: Problem,
    constants: Constants,
    chosen: Sequence[str],
    seeds: int,
    *,
    kept: Mapping[tuple[Any, ...], Row],
    journal: pathlib.Path | None,
    until: float | None,
) -> Iterable[Row]:
    """A row for each seed, share of flips and method, kept or new."""
    commit, _ = record.tree(record.REPOSITORY)
    draw = jax.jit(at.draw)
    programs = {
        kind: trainer(at, kind, constants)
        for kind in {TRAINED[name].kind for name in chosen}
    }
    begun = time.monotonic()
    for seed in range(seeds):
        key = jax.random.fold_in(jax.random.key(0), seed)
        for flips in at.size.flips:
            facts: Any = None
            for name in chosen:
                method = TRAINED[name]
                if not method.fits(flips, is_text=at.is_text):
                    continue
                recipes = method.recipes(flips, at.classes)
                row = {"method": name, "flips": flips, "seed": seed}
                row["digest"] = digest(at, constants, method.kind, recipes)
                if name_of(row) in kept:
                    yield kept[name_of(row)]
                    continue
                if until and time.monotonic() > until:
                    continue
                if facts is None:
                    keys = jax.random.split(key, 5)
                    x, y = draw(keys[0], flips).train
                    facts = known(at, constants, x, y, keys[4])
                reached = programs[method.kind](
                    stacked(list(recipes.values())), key, jnp.float32(flips), facts
                )
                row |= {"commit": commit and commit[:10]}
                row |= entries(method, list(recipes), np.asarray(reached, np.float64))
                if name == "estimated":
                    row["estimate"] = round(float(facts.rate), 4)
                record.append(journal, row)
                yield row
            spent = (time.monotonic() - begun) / 60
            print(f"{spent:6.1f} minutes: {at.name}, {flips:.0%}, {seed}", flush=True)


def digest(at: Problem, constants: Constants, kind: str, recipes: Any) -> str:
    """Of all that a row is made from but the code: a row of others is not reused."""
    size = at.size._replace(lanes=0, seeds=0)
    text = repr((at.name, size, constants, kind, recipes))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def entries(
    method: Method, names: Sequence[str], reached: np.ndarray
) -> dict[str, Any]:
    """A row's findings, from [recipes, stops, READOUTS, COLUMNS].

    Of each configuration drawn, at each stop, the validation score and the test
    accuracy in per cent, of the readout that validates better; of each default what
    either readout reaches without validation, accuracy and loss. The score is the
    accuracy less a thousandth of the loss; -1 where the run diverged.
    """
    found: dict[str, Any] = {"validation": {}, "accuracy": {}, "defaults": {}}
    drawn = reached[[i for i, name in enumerate(names) if name not in SCHEDULES]]
    for place, stop in enumerate(stops_of(method.kind)):
        columns = dict(zip(COLUMNS, np.moveaxis(drawn[:, place], -1, 0), strict=True))
        loss = columns["validation_loss"]
        score = 100 * columns["validation"] - 0.001 * np.minimum(loss, 20)
        score = np.where(np.isfinite(loss), score, -1.0)
        if not method.averages:
            score, columns = score[:, :1], {k: v[:, :1] for k, v in columns.items()}
        best = (np.arange(len(score)), score.argmax(1))
        found["validation"][stop] = words(score[best], "%.5f")
        found["accuracy"][stop] = words(100 * columns["accuracy"][best], "%.2f")
        if stop != "best":
            for number, name in enumerate(names):
                for readout, one in zip(READOUTS, reached[number, place], strict=True):
                    if name in SCHEDULES:
                        found["defaults"][f"{name}/{stop}/{readout}"] = words(
                            [100 * one[2], one[3]], "%.4f"
                        )
    return found


def words(values: Any, spec: str) -> str:
    """Numbers in one line of the record."""
    return " ".join(spec % value for value in values)
