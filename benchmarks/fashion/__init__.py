"""Repeats iFlood and SoftAD on Fashion-MNIST beside the runs of SoftAD's authors."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import pixels, study
from benchmarks.fashion.findings import (
    PUBLISHED,
    TITLES,
    by_level,
    curve,
    numbers,
    summarise,
    tables,
)
from benchmarks.fashion.training import SMOKE, Protocol, trainer
from flood_optax import sweep

__all__ = ["measure", "numbers", "options", "tables"]

LEVELS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75)


def options(parser: argparse.ArgumentParser) -> None:
    epochs = study.multiple_of(Protocol.looks)
    parser.add_argument("--seeds", type=int, default=3, help="of the picked levels")
    parser.add_argument("--epochs", type=epochs, default=Protocol.epochs)
    parser.add_argument(
        "--long-epochs", type=epochs, default=100, help="one seed, at their levels"
    )
    study.data_option(parser)
    study.sweep_options(parser)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    protocol = dataclasses.replace(Protocol(), epochs=args.epochs)
    name, seeds, grid = "fashion-mnist", args.seeds, LEVELS
    long = dataclasses.replace(protocol, epochs=args.long_epochs)
    if args.smoke:
        protocol = long = SMOKE
        name, seeds, grid = "digits", 2, LEVELS[::5]
    images = pixels.load(name, args.data, pixels.WHOLE)
    study.one_thread_per_run(args.workers)
    keys = jax.random.split(jax.random.key(0), seeds)

    def run(
        method: str, levels: Sequence[float], keys: jax.Array, at: Protocol
    ) -> sweep.Result:
        print(f"{TITLES[method]}, {at.epochs} epochs", flush=True)
        kept = study.journal(args.work, "fashion", method, at.epochs, len(keys))
        train = trainer(images, method, at)
        return study.run(train, levels, keys, journal=kept, progress=not args.smoke)

    rows: list[dict[str, Any]] = []
    every_level: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    pace = long.epochs // long.looks
    for method, theirs in PUBLISHED.items():
        levels = (-np.inf,) if method == "plain" else grid
        result = run(method, levels, keys, protocol)
        picked = result.best("validation_accuracy", "max", at=-1)
        rows.append(summarise(method, protocol.epochs, "picked", result, picked))
        if method != "plain":
            every_level += by_level(method, result)
        result = run(method, (theirs.level,), keys[:1], long)
        at_theirs = result.levels
        rows.append(summarise(method, long.epochs, "their level", result, at_theirs))
        looks = range(pace, long.epochs + 1, pace)
        curves.append(curve(method, looks, result))
    return {
        "protocol": {
            **dataclasses.asdict(protocol),
            "data": name,
            "sizes": [*pixels.WHOLE[name], len(images.test_x)],
            "optimizer": "sgd",
            "levels": list(grid),
            "selection": "validation accuracy at the end, the lowest of the best",
            "seeds": seeds,
            "long_epochs": long.epochs,
            "shortened": "theirs: 500 epochs and 3 trials",
        },
        "rows": rows,
        "by_level": every_level,
        "curves": curves,
    }
