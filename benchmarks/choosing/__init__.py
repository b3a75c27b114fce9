"""Asks which level to take: rules and rivals, all from the same runs."""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import study
from benchmarks.choosing import findings, other_noise, settings, wrong_labels
from benchmarks.choosing.runs import Runner, outcomes
from benchmarks.choosing.settings import SETTINGS, Constants


def options(parser: argparse.ArgumentParser) -> None:
    names = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--minutes", type=float, help="begin no seed later; keep what is complete"
    )
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("out", "choosing"),
        help="where the finished runs are kept; a second start does what is missing",
    )
    parser.add_argument(
        "--wrong-labels",
        action="store_true",
        help="the share of wrong labels that is found without training, alone",
    )
    parser.add_argument(
        "--other-noise",
        action="store_true",
        help="noise that depends on the class or on the input, alone",
    )
    study.data_option(parser)


PARTS: dict[str, Any] = {  # by what their record holds
    "settings": findings,
    "wrong_labels": wrong_labels,
    "noise": other_noise,
}


def part_of(payload: Mapping[str, Any]) -> Any:
    return next(part for name, part in PARTS.items() if name in payload)


def record_name(payload: Mapping[str, Any]) -> str:
    return getattr(part_of(payload), "RECORD", "choosing")


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    return part_of(payload).tables(payload)


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    return findings.figures(payload) if "settings" in payload else {}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.wrong_labels:
        return wrong_labels.measure(args)
    if args.other_noise:
        return other_noise.measure(args)
    constants, seeds, names, work = Constants(), args.seeds, args.settings, args.work
    if args.smoke:
        constants, seeds, names = settings.SMOKE, 2, ["wine-0.2-even-full-adam"]
        work = args.out / "choosing-smoke"
    begun = time.monotonic()
    keys = jax.random.split(jax.random.key(0), seeds)
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for setting in (s for s in SETTINGS if s.name in names):
        try:
            draw = settings.drawing(setting, args.data)
        except FileNotFoundError:
            missing[setting.name] = "not installed"
            continue
        runner = Runner(setting, constants, draw, work)
        found: list[dict[str, Any]] = []
        for seed in range(seeds):
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                break
            found.append(outcomes(runner, seed, keys[seed]))
        spent = (time.monotonic() - begun) / 60
        print(f"{spent:6.1f} minutes: {setting.name}, {len(found)} seeds", flush=True)
        if len(found) < seeds:
            missing[setting.name] = "out of time"
            continue
        rows.append(
            {"setting": setting.name, **dataclasses.asdict(setting)}
            | {
                "rules": {
                    rule: collect([one[rule] for one in found]) for rule in found[0]
                }
            }
        )
    return {
        "protocol": {
            **dataclasses.asdict(constants),
            "sizes": {name: settings.SIZES[name] for name in settings.SIZES},
            "seeds": seeds,
            "labels": "flipped in training and validation, true in the test",
            "missing": missing,
        },
        "settings": rows,
    }


def collect(seeds: list[Any]) -> dict[str, Any]:
    """The outcomes of a rule over the seeds, as columns."""
    reached = np.array([one.reached for one in seeds], np.float64)
    return {
        "accuracies": np.round(100 * reached[:, 0], 4).tolist(),
        "losses": np.round(reached[:, 1], 5).tolist(),
        "ece": round(float(reached[:, 2].mean()), 5),
        "cost": round(float(np.mean([one.cost for one in seeds])), 4),
    }
