"""Asks what beats flooding: rivals and flooded recipes, each tuned by eight runs."""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import study
from benchmarks.rivals import problems, settings
from benchmarks.rivals.findings import figures, numbers, tables
from benchmarks.rivals.methods import METHODS
from benchmarks.rivals.settings import SIZES, Constants, Problem
from benchmarks.rivals.training import COLUMNS, READOUTS, trainer

__all__ = ["figures", "measure", "numbers", "options", "tables"]

STOPS = ("last", "best")  # at the end of the run, and at its best check


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problems", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, help="at most; 5 or 10 by the problem")
    parser.add_argument(
        "--minutes", type=float, help="begin no method later; keep what is complete"
    )
    study.data_option(parser)
    study.sweep_options(parser, work=pathlib.Path("out", "rivals"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    constants, names, chosen = Constants(), args.problems, args.methods
    if args.smoke:
        constants, names = settings.SMOKE, ["wine"]
        chosen = ["plain", "dropout", "sam", "adaflood", "band"]
    study.one_thread_per_run(args.workers)
    begun = time.monotonic()
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            problem = problems.problem(name, args.data)
        except FileNotFoundError:
            missing[name] = "not installed"
            continue
        size = problem.size
        if args.smoke:
            size = size._replace(steps=10, seeds=2)
            problem = dataclasses.replace(problem, size=size)
        keys = seeds_of(min(args.seeds or size.seeds, size.seeds))
        for key, method in METHODS.items():
            if key not in chosen or not method.fits(problem):
                continue
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                missing.setdefault(name, "out of time")
                break
            journal = None if args.smoke else study.journal(args.work, name, key)
            rows += results(problem, key, constants, keys, journal=journal)
            spent = (time.monotonic() - begun) / 60
            print(f"{spent:6.1f} minutes: {name}, {method.title}", flush=True)
    return {
        "protocol": {
            **dataclasses.asdict(constants),
            "sizes": {name: size._asdict() for name, size in SIZES.items()},
            "runs": 8,
            "labels": "flipped in training and validation, true in the test",
            "missing": missing,
        },
        "methods": {
            key: {
                "title": method.title,
                "cost": method.cost,
                "flooded": method.flooded,
                "knows_rate": method.knows_rate,
            }
            for key, method in METHODS.items()
        },
        "rows": rows,
    }


def seeds_of(number: int) -> jax.Array:
    """The keys of the seeds; the first ones are the same for every number."""
    key = jax.random.key(0)
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(jnp.arange(number))


def results(
    problem: Problem,
    key: str,
    constants: Constants,
    keys: jax.Array,
    *,
    journal: pathlib.Path | None,
) -> list[dict[str, Any]]:
    """A method on a problem: a row for each share of flips."""
    method, flips = METHODS[key], problem.size.flips
    by_flips = [method.recipes(constants, rate, problem.classes) for rate in flips]
    recipes = [recipe for eight in by_flips for recipe in eight]
    found = study.run(
        trainer(problem, method, recipes, constants),
        range(len(recipes)),
        keys,
        journal=journal,
        progress=False,
    )
    reached = np.stack([np.asarray(found.metrics[stop]) for stop in STOPS], 2)
    per_flips = np.split(reached, len(flips))  # [8, seeds, STOPS, READOUTS, COLUMNS]
    return [
        {
            "problem": problem.name,
            "flips": rate,
            "method": key,
            "entries": {
                f"{stop}/{readout}": choice(part[:, :, i, at])
                for i, stop in enumerate(STOPS)
                for readout, at in READ.items()
            },
        }
        for rate, part in zip(flips, per_flips, strict=True)
    ]


READ: dict[str, Sequence[int]] = {  # the third one chooses between the two
    **{name: [at] for at, name in enumerate(READOUTS)},
    "either": range(len(READOUTS)),
}


def choice(reached: np.ndarray) -> dict[str, Any]:
    """Each seed's choice by noisy validation, from [runs, seeds, readouts, COLUMNS]."""
    runs, seeds = reached.shape[:2]
    flat = np.moveaxis(reached, 2, 1).reshape(-1, seeds, len(COLUMNS))
    score = np.where(np.isnan(flat[..., 0]), -np.inf, flat[..., 0])
    best = score.argmax(0)
    picked = flat[best, np.arange(seeds)]
    return {
        "run": (best // (len(flat) // runs)).tolist(),
        "accuracies": np.round(100 * picked[:, 1].astype(float), 3).tolist(),
        "losses": np.round(picked[:, 2].astype(float), 4).tolist(),
        "ece": round(float(picked[:, 3].mean()), 4),
    }
