"""Compares the methods of the family, SAM and weight decay on the same noisy images.

Finished: its record names the commit that holds its code, and the command.
"""

import functools
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


Rows = Mapping[tuple[float, str, bool], Mapping[str, Any]]


def rows_of(payload: Mapping[str, Any]) -> Rows:
    """By noise, method, and whether it was stopped early."""
    return {
        (row["noise"], row["method"], row["early_stopping"]): row
        for row in payload["rows"]
    }


def gain_of(found: Rows, noise: float, name: str, stopped: bool) -> statistics.Interval:
    return statistics.gain(found[noise, name, stopped], found[noise, "plain", stopped])


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Every method at the last epoch, and with early stopping."""
    found = rows_of(payload)
    gain = functools.partial(gain_of, found)

    def cells(noise: float, name: str, stopped: bool) -> list[str]:
        """The accuracy, and what it is more than plain training's."""
        reached = f"{accuracy(found[noise, name, stopped]):.2f}"
        more = gain(noise, name, stopped)
        return [reached, "" if name == "plain" else f"{more:+.2f}"]

    def picked(noise: float, name: str) -> str:
        number, values = METHODS[name][1], found[noise, name, False]["picked"]
        return "-" if number == "-" else f"{number} {np.median(values):g}"

    shown = [(noise, name) for noise, name, stopped in found if not stopped]
    body = report.markdown(
        [
            *("flips", "method", "picked (median)"),
            *("test accuracy, %", "gain over plain", "test loss", "train loss"),
            *("with early stopping, %", "gain over plain"),
        ],
        [
            [
                *(f"{noise:.0%}", METHODS[name][0], picked(noise, name)),
                *cells(noise, name, stopped=False),
                f"{found[noise, name, False]['test_loss_mean']:.3f}",
                f"{found[noise, name, False]['train_loss_mean']:.3f}",
                *cells(noise, name, stopped=True),
            ]
            for noise, name in shown
        ],
    )
    compared = len(shown) - len(payload["protocol"]["noises"])
    (ahead, behind), (ahead_best, behind_best) = (
        statistics.verdicts(gain(*one, stopped) for one in shown)
        for stopped in (False, True)
    )
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
    found = rows_of(payload)
    gain = functools.partial(gain_of, found)
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
