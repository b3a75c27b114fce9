"""Asks which level to take: rules and rivals, all from the same runs.

Finished: its records name the commits that hold their code, and the commands. One is of
the settings, one of other noise, one of the share of wrong labels that is found without
training.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks.choosing import findings, other_noise, wrong_labels

PARTS: dict[str, Any] = {  # by what their record holds
    "settings": findings,
    "noise": other_noise,
    "wrong_labels": wrong_labels,
}


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    part = next(part for name, part in PARTS.items() if name in payload)
    return part.tables(payload)


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    return findings.figures(payload) if "settings" in payload else {}
