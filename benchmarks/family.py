"""Compares the methods of the family, SAM and weight decay on the same noisy images.

Finished: its record names the commit that holds its code, and the command.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import BLUE, INCHES, INK, RED, panels, say

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


EDGES = -4.0, 10.0  # points; a gain beyond is a number at the edge


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Paired gains by method, sorted: at the last epoch and with early stopping."""
    noises = payload["protocol"]["noises"]
    found = {
        (row["noise"], row["method"], row["early_stopping"]): row
        for row in payload["rows"]
    }

    def gain(noise: float, name: str, stopped: bool) -> statistics.Interval:
        return statistics.gain(
            found[noise, name, stopped], found[noise, "plain", stopped]
        )

    names = list(dict.fromkeys(name for _, name, _ in found if name != "plain"))
    names.sort(key=lambda name: gain(noises[-1], name, False).mean)
    fig, axes = panels(
        1, len(noises), size=(INCHES, 0.3 * len(names) + 2.6), sharey=True
    )
    for axis, noise in zip(axes, noises, strict=True):
        for stopped, colour in ((False, BLUE), (True, RED)):
            for place, name in enumerate(names):
                mean, half = gain(noise, name, stopped)
                at = place - 0.15 + 0.3 * stopped
                if mean < EDGES[0]:
                    axis.plot(EDGES[0], at, "<", color=colour, ms=6)
                    say(axis, f"{mean:.0f}", (EDGES[0], at), (7, 0), color=colour)
                    continue
                look = {"fmt": "o", "ms": 5, "color": colour, "capsize": 0}
                filled = "none" if stopped else colour
                xerr = half if math.isfinite(half) else None
                axis.errorbar(mean, at, xerr=xerr, mfc=filled, **look)
        axis.axvline(0, color=INK, lw=0.8)
        axis.set(title=f"{noise:.0%} wrong" if noise else "right labels", xlim=EDGES)
        axis.set_xlabel("points over plain\ntraining, as judged")
    axes[0].set_yticks(range(len(names)), [METHODS[name][0] for name in names])
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == "flooding" else "normal")
    fig.suptitle("dots: last epoch, rings: early stopping", fontsize=11)
    return {record_name(payload): fig}
