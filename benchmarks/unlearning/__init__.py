"""Asks what unlearns to the level of unseen data: held losses, and the rivals."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
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
from flood_optax import sweep

__all__ = ["figures", "measure", "options", "tables"]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    study.work_option(parser, pathlib.Path("out", "unlearning"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    constants, sizes, chosen, work = Constants(), SETTINGS, list(METHODS), args.work
    if args.smoke:
        constants, sizes, work = settings.SMOKE, settings.SMALL, None
        chosen = ["retain", "npo", "reflect_ranked", "clamp_each"]
    study.xla_flags(  # two runs side by side beat one run on two threads
        f"--xla_force_host_platform_device_count={args.workers}",
        "--xla_cpu_multi_thread_eigen=false",
    )
    return {
        "protocol": {
            **dataclasses.asdict(constants),
            "passage": problems.LENGTH,
            "labels": "flipped alike in every set",
            "missing": {},
        },
        "titles": {key: method.title for key, method in METHODS.items()},
        "settings": [
            measured(name, setting, constants, chosen, work)
            for name, setting in sizes.items()
        ],
    }


def measured(
    name: str,
    setting: settings.Setting,
    constants: Constants,
    chosen: Sequence[str],
    work: pathlib.Path | None,
) -> dict[str, Any]:
    """What the models, then the methods, reach in a setting."""
    keys = seeds_of(setting.seeds)
    problem = problems.problem(name, setting, constants)

    def run(what: str, train: Any, grid: Iterable[float], keys: jax.Array) -> Any:
        """The metrics; finished runs are kept in a file of this name."""
        path = None
        if work is not None:
            work.mkdir(parents=True, exist_ok=True)
            path = work / f"{name}-{setting.seeds}seeds-{what}.jsonl"
        options: Any = {"strategy": "shard", "chunk_size": 1, "progress": False}
        result = sweep.run(train, tuple(grid), keys, path=path, **options)
        return {k: np.asarray(metric) for k, metric in result.metrics.items()}

    before = run("models", preparer(problem, constants), [0.0], keys)
    start = {one: metric[0] for one, metric in before.items()}
    prepared = Prepared(*(start[field] for field in Prepared._fields))
    rows = models(start)
    golds = start["readings"][:, 1:].mean(1)
    flops: dict[str, float] = {}
    for key in chosen:
        method = METHODS[key]
        if name == "text" and not method.text:
            continue
        given = recipes(method, constants)
        train = unlearner(
            problem, method, given, constants, prepared=prepared, keys=keys
        )
        reached = run(key, train, range(setting.seeds), jax.random.key(0)[None])
        flops[key] = step_flops(problem, method, constants)
        for i, recipe in enumerate(given):
            of_recipe = {one: metric[:, 0, i] for one, metric in reached.items()}
            row = run_row(of_recipe, golds, constants)
            rows.append({"method": key, **recipe._asdict()} | row)
        print(f"{name}, {method.title}", flush=True)
    return {
        "setting": name,
        **setting._asdict(),
        "seeds": setting.seeds,
        "tau": numbers_of(start["tau"]),
        "flops": flops,
        "rows": rows,
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
