"""Asks what unlearns to the level of unseen data: held losses, and the rivals."""

import argparse
import dataclasses
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import study
from benchmarks.unlearning import problems, settings
from benchmarks.unlearning.findings import figures, tables
from benchmarks.unlearning.measures import COLUMNS, DEEP, gap
from benchmarks.unlearning.methods import METHODS, recipes
from benchmarks.unlearning.settings import SETTINGS, Constants
from benchmarks.unlearning.training import (
    MODELS,
    Prepared,
    preparer,
    step_flops,
    unlearner,
)

__all__ = ["figures", "measure", "options", "tables"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS)
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, help="at most; 10, or 6 of text")
    parser.add_argument(
        "--minutes", type=float, help="begin no method later; keep what is complete"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    study.work_option(parser, pathlib.Path("out", "unlearning"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    constants, sizes, chosen = Constants(), SETTINGS, args.methods
    names, work = args.settings, args.work
    if args.smoke:
        constants, sizes, work = settings.SMOKE, settings.SMALL, None
        names, chosen = list(sizes), ["retain", "npo", "reflect_ranked", "clamp_each"]
    study.one_thread_per_run(args.workers)
    begun = time.monotonic()
    found: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for name in names:
        setting = sizes[name]
        number = min(args.seeds or setting.seeds, setting.seeds)
        keys = seeds_of(number)
        problem = problems.problem(name, setting, constants)
        kept = study.journal(work, name, f"{number}seeds", "models")
        before = study.run(
            preparer(problem, constants), [0.0], keys, journal=kept, progress=False
        ).metrics
        start = {one: np.asarray(metric)[0] for one, metric in before.items()}
        prepared = Prepared(*(start[field] for field in Prepared._fields))
        rows = models(start)
        golds = start["readings"][:, 1:].mean(1)
        flops: dict[str, float] = {}
        for key in chosen:
            method = METHODS[key]
            if name == "text" and not method.text:
                continue
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                missing.setdefault(name, "out of time")
                break
            given = recipes(method, constants)
            reached = study.run(
                unlearner(
                    problem, method, given, constants, prepared=prepared, keys=keys
                ),
                range(number),
                jax.random.key(0)[None],
                journal=study.journal(work, name, f"{number}seeds", key),
                progress=False,
            ).metrics
            flops[key] = step_flops(problem, method, constants)
            by_seed = {one: np.asarray(m)[:, 0] for one, m in reached.items()}
            for i, recipe in enumerate(given):
                of_recipe = {one: metric[:, i] for one, metric in by_seed.items()}
                rows.append(
                    {"method": key, **recipe._asdict()}
                    | run_row(of_recipe, golds, constants)
                )
            spent = (time.monotonic() - begun) / 60
            print(f"{spent:6.1f} minutes: {name}, {method.title}", flush=True)
        found.append(
            {
                "setting": name,
                **setting._asdict(),
                "seeds": number,
                "tau": numbers_of(start["tau"]),
                "flops": flops,
                "rows": rows,
            }
        )
    return {
        "protocol": {
            **dataclasses.asdict(constants),
            "passage": problems.LENGTH,
            "labels": "flipped alike in every set",
            "missing": missing,
        },
        "titles": {key: method.title for key, method in METHODS.items()},
        "settings": found,
    }


def seeds_of(number: int) -> jax.Array:
    """The keys of the seeds; the first ones are the same for every number."""
    key = jax.random.key(0)
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(jnp.arange(number))


def numbers_of(values: np.ndarray) -> list[float | None]:
    """As JSON holds them; None for what is no number."""
    return [
        round(float(one), 4) if np.isfinite(one) else None for one in np.ravel(values)
    ]


def reading(seen: np.ndarray, deep: np.ndarray, golds: np.ndarray) -> dict[str, Any]:
    """Every measure by seed, from [seeds, COLUMNS] and [seeds, DEEP]."""
    columns = dict(zip(COLUMNS, seen.T, strict=True))
    columns |= dict(zip(DEEP, deep.T, strict=True))
    made = {name: numbers_of(values) for name, values in columns.items()}
    return {"gap": numbers_of(gap(seen, golds))} | made


def models(start: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The model before unlearning beside the golds, and each gold beside the other."""
    seen, deep = start["readings"], start["deep"]
    beside = [seen[:, 1:].mean(1), seen[:, 2], seen[:, 1]]
    return [
        {"method": name, "at": {"end": reading(seen[:, i], deep[:, i], beside[i])}}
        for i, name in enumerate(MODELS)
    ]


def run_row(
    reached: Mapping[str, np.ndarray], golds: np.ndarray, constants: Constants
) -> dict[str, Any]:
    """What a recipe reaches at the horizons, and stopped by two rules.

    `stopped` is when its forget loss first reaches tau, `oracle` the check of the least
    gap, which nobody can know.
    """
    course, deep = reached["course"], reached["deep"]
    at: dict[str, Any] = {}
    for i, horizon in enumerate(constants.horizons):
        here = course[:, constants.checks.index(horizon)]
        at[str(horizon)] = reading(here, deep[:, i], golds)
    stopped = reading(reached["stopped"], deep[:, -1], golds)
    at["stopped"] = stopped | {"step": numbers_of(reached["stop"])}
    gaps = gap(course, golds[:, None])
    steps = np.array(constants.checks)[gaps.argmin(1)]
    at["oracle"] = {"gap": numbers_of(gaps.min(1)), "step": numbers_of(steps)}
    losses = course[:, :, COLUMNS.index("forget_loss")]
    return {"at": at, "course": numbers_of(losses.mean(0))}
