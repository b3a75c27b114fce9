"""Repeats the paper's synthetic table: 36 accuracies with and without flooding."""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import study
from benchmarks.points import GENERATORS
from benchmarks.synthetic.findings import (
    TITLES,
    by_level,
    figures,
    numbers,
    summarise,
    tables,
)
from benchmarks.synthetic.training import SMOKE, Protocol, trainer
from flood_optax import sweep

__all__ = ["figures", "measure", "numbers", "options", "run_cell", "tables"]

NOISES = (0.01, 0.05, 0.10)


def options(parser: argparse.ArgumentParser) -> None:
    names = [f"{problem}:{noise:g}" for problem in GENERATORS for noise in NOISES]
    parser.add_argument("--cells", nargs="+", choices=names, default=names)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--grid", type=float, default=0.02, help="step of the levels")
    study.sweep_options(parser, work=pathlib.Path("out", "synthetic"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    protocol, trials, cells = Protocol(), args.trials, args.cells
    levels = [round(i * args.grid, 6) for i in range(round(0.5 / args.grid) + 1)]
    work = args.work
    if args.smoke:
        protocol, trials, cells, levels = SMOKE, 2, ["sinusoid:0.1"], [0.0, 0.3]
        work = args.out / "synthetic-smoke"
    study.one_thread_per_run(args.workers)
    keys = jax.random.split(jax.random.key(0), trials)

    entries: list[dict[str, Any]] = []
    grids: list[dict[str, Any]] = []
    for cell in cells:
        problem, _, rate = cell.partition(":")
        noise = float(rate)
        print(f"{TITLES[problem]}, {noise:.0%} flips", flush=True)
        result = run_cell(problem, noise, protocol, levels=levels, keys=keys, work=work)
        entries += summarise(problem, noise, result)
        grids.append(by_level(problem, noise, result))
    noisiest = [e for e in entries if e["noise"] == 0.1]
    chosen = [e for e in noisiest if e["flooded"] and not e["early_stopping"]]
    return {
        "protocol": dataclasses.asdict(protocol)
        | {
            "batch": "all training points",
            "optimizer": "adam",
            "levels": levels,
            "trials": trials,
            "selection": "noisy validation accuracy, the lowest of the best levels",
            "early_stopping": "first epoch of highest noisy validation accuracy",
            "accuracy": "noisy test labels, percent",
            "spread": "sample standard deviation over trials",
        },
        "cells": entries,
        "by_level": grids,
        "curves": follow(chosen, protocol, keys[:2]),
    }


def run_cell(
    problem: str,
    noise: float,
    protocol: Protocol,
    *,
    levels: Sequence[float],
    keys: jax.Array,
    work: pathlib.Path,
) -> sweep.Result:
    """All levels and trials of a cell; runs that `work` holds are not run again."""
    train = trainer(problem, noise, protocol)
    kept = study.journal(work, problem, f"{noise:g}")
    return study.run(train, levels, keys, journal=kept)


def follow(
    entries: Sequence[Mapping[str, Any]], protocol: Protocol, keys: jax.Array
) -> list[dict[str, Any]]:
    """Test loss over the epochs at no flooding and at the mean level of the picks."""
    small = dataclasses.replace(protocol, test_points=min(1_000, protocol.test_points))
    curves: list[dict[str, Any]] = []
    for entry in entries:
        problem, noise = str(entry["data"]), float(entry["noise"])
        title = f"{TITLES[problem]}, {noise:.0%} flips"
        print(f"{title}: test loss over the epochs", flush=True)
        levels = sorted({0.0, round(float(entry["level_mean"]), 2)})
        train = trainer(problem, noise, small, follow_test=True)
        result = study.run(train, levels, keys)
        for level, losses in zip(levels, result.metrics["test_loss"], strict=True):
            curve: dict[str, Any] = {"data": problem, "noise": noise, "level": level}
            curve |= {"trials": len(keys)}
            curve["test_loss"] = np.round(losses.mean(0), 4).tolist()
            curves.append(curve)
    return curves
