"""Asks which level to take: rules and rivals, all from the same runs.

Finished: its record names the commit that holds its code, and the command. Two smaller
studies of labels still run, each with a record of its own.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import study
from benchmarks.choosing import findings, other_noise, wrong_labels


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wrong-labels",
        action="store_true",
        help="the share of wrong labels that is found without training",
    )
    parser.add_argument(
        "--other-noise",
        action="store_true",
        help="noise that depends on the class or on the input",
    )
    study.work_option(parser, pathlib.Path("out", "choosing"))


PARTS: dict[str, Any] = {  # by what their record holds
    "settings": findings,
    "wrong_labels": wrong_labels,
    "noise": other_noise,
}


def part_of(payload: Mapping[str, Any]) -> Any:
    return next(part for name, part in PARTS.items() if name in payload)


def record_name(payload: Mapping[str, Any]) -> str:
    return part_of(payload).RECORD


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    return part_of(payload).tables(payload)


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    return findings.figures(payload) if "settings" in payload else {}


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """One of the two that run; without a word which, what all of them found."""
    if args.wrong_labels:
        return wrong_labels.measure(args)
    if args.other_noise:
        return other_noise.measure(args)
    study.show(sys.modules[__name__])
    return None
