"""Compares the methods of the family, SAM and weight decay on the same noisy images.

Finished: its record names the commit that holds its code, and the command.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import panels

METHODS = {  # the title of each, and the number that is picked by validation
    "plain": ("plain training", "-"),
    "weight_decay": ("weight decay", "decay"),
    "sam": ("SAM", "radius"),
    "flooding": ("flooding", "level"),
    "pause": ("pause (no ascent)", "level"),
    "iflood": ("iFlood", "level"),
    "softad": ("SoftAD", "level"),
    "class_wise": ("class-wise", "largest level"),
    "coce": ("COCE (tail mean)", "level"),
    "relax_loss": ("RelaxLoss", "level"),
    "adaflood": ("AdaFlood", "gamma"),
    "adaflood_last_layer": ("AdaFlood, last layer re-fitted", "gamma"),
    "wavebound": ("WaveBound, whole batch", "epsilon"),
    "accordance": ("level from accordance (Flooding-X)", "threshold"),
    "plateau": ("level on plateau", "step"),
}


def record_name(payload: Mapping[str, Any]) -> str:
    """One record for each set of images."""
    name = payload["protocol"]["data"]
    return "family" if name == "mnist-5k" else f"family-{name}"


def accuracy(row: Mapping[str, Any]) -> statistics.Interval:
    """The mean test accuracy over the seeds."""
    return statistics.interval(row["accuracies"])


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Every method at the last epoch, and with early stopping."""
    found = {
        (row["noise"], row["method"], row["early_stopping"]): row
        for row in payload["rows"]
    }

    def line(noise: float, name: str) -> dict[str, Any]:
        last, best = (found[noise, name, stopped] for stopped in (False, True))
        title, number = METHODS[name]
        picked = f"{number} {np.median(last['picked']):g}"
        return {
            "noise": noise,
            "title": title,
            "picked": "-" if number == "-" else picked,
            "last": last,
            "last_accuracy": accuracy(last),
            "last_gain": statistics.gain(last, found[noise, "plain", False]),
            "best_accuracy": accuracy(best),
            "best_gain": statistics.gain(best, found[noise, "plain", True]),
        }

    def gain(column: str) -> report.Cell:
        def cell(row: Mapping[str, Any]) -> str:
            is_plain = row["last"]["method"] == "plain"
            return "" if is_plain else f"{row[column]:+.2f}"

        return cell

    lines = [line(noise, name) for noise, name, stopped in found if not stopped]
    body = report.table(
        lines,
        (
            ("flips", "{noise:.0%}"),
            ("method", "{title}"),
            ("picked (median)", "{picked}"),
            ("test accuracy, %", "{last_accuracy:.2f}"),
            ("gain over plain", gain("last_gain")),
            ("test loss", "{last[test_loss_mean]:.3f}"),
            ("train loss", "{last[train_loss_mean]:.3f}"),
            ("with early stopping, %", "{best_accuracy:.2f}"),
            ("gain over plain", gain("best_gain")),
        ),
    )
    compared = len(lines) - len(payload["protocol"]["noises"])
    ahead, behind = statistics.verdicts(row["last_gain"] for row in lines)
    ahead_best, behind_best = statistics.verdicts(row["best_gain"] for row in lines)
    summary = (
        f"Means over {payload['protocol']['seeds']} seeds with 95% intervals, gains "
        f"paired by seed. At the last epoch {ahead} of {compared} are ahead of "
        f"plain training and {behind} behind; with early stopping {ahead_best} "
        f"and {behind_best}; the others' intervals include 0. With as many "
        f"comparisons a few intervals miss by chance."
    )
    parts = (body, summary, report.provenance(payload))
    return {record_name(payload): "\n\n".join(parts)}


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Test accuracy by method, with intervals: last epoch and early stopping."""
    noises = payload["protocol"]["noises"]
    fig, axes = panels(1, len(noises), size=(5 * len(noises) + 2, 5))
    for axis, noise in zip(axes, noises, strict=True):
        rows = [row for row in payload["rows"] if row["noise"] == noise]
        names = list(dict.fromkeys(row["method"] for row in rows))
        for stopped, marker in ((False, "o"), (True, "s")):
            chosen = [row for row in rows if row["early_stopping"] == stopped]
            half = [accuracy(row).half for row in chosen]
            finite = all(map(math.isfinite, half))
            shift = 0.15 if stopped else -0.15
            means = [row["accuracy_mean"] for row in chosen]
            axis.errorbar(
                means,
                np.arange(len(names)) + shift,
                xerr=half if finite else None,
                fmt=marker,
                mfc="white" if stopped else None,
                color="C1" if stopped else "C0",
                label="early stopping" if stopped else "last epoch",
                capsize=2,
                ms=4,
            )
            axis.axvline(means[0], color="C1" if stopped else "C0", lw=0.6, ls=":")
        axis.set_yticks(range(len(names)), [METHODS[name][0] for name in names])
        axis.invert_yaxis()
        axis.set(title=f"{noise:.0%} flips", xlabel="test accuracy, %")
        axis.label_outer()
    axes[0].legend(loc="lower left", fontsize=8)
    return {record_name(payload): fig}


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Columns, intervals and gain of each method."""

    def base_of(row: Mapping[str, Any]) -> str:
        return f"{row['noise']:.0%}/{report.epoch_of(row)}"

    def name_of(row: Mapping[str, Any]) -> str:
        return f"{base_of(row)}/{row['method']}"

    rows = payload["rows"]
    found = report.named(rows, name_of)
    plain = {base_of(row): row for row in rows if row["method"] == "plain"}
    for row in rows:
        name, gain = name_of(row), statistics.gain(row, plain[base_of(row)])
        found |= report.named_interval(name, "gain", gain)
        found[f"{name}/accuracy_half"] = accuracy(row).half
        found[f"{name}/picked_median"] = float(np.median(row["picked"]))
    return found
