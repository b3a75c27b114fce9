"""Repeats the paper's synthetic table: 36 accuracies with and without flooding.

Finished: its record names the commit that holds its code, and the command.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import BLUE, FAINT, GREEN, INCHES, RED, panels, say
from flood_optax import levels as levels_of

TITLES = {"two_gaussians": "Two Gaussians", "spiral": "Spiral", "sinusoid": "Sinusoid"}


class Descent(NamedTuple):
    """Epochs of the first trough, the peak after it, and the trough after that."""

    trough: int
    peak: int
    second_trough: int


def second_descent(loss: Sequence[float], window: int = 11) -> Descent | None:
    """Finds where a loss, smoothed over `window` epochs, rises and falls again.

    Rise and fall must each be a tenth of the loss at the lower end: of the first
    trough, and of the lowest loss after the peak. None if the loss does not do so.
    """
    half = window // 2
    padded = np.pad(np.asarray(loss, np.float64), half, mode="edge")
    smooth = np.convolve(padded, np.ones(window) / window, "valid")
    lowest_before = np.minimum.accumulate(smooth)
    lowest_after = np.minimum.accumulate(smooth[::-1])[::-1]
    rises = smooth > 1.1 * lowest_before
    falls = smooth > 1.1 * lowest_after
    peaks = np.flatnonzero(rises & falls)
    if len(peaks) == 0:
        return None
    peak = int(peaks[np.argmax(smooth[peaks])])
    return Descent(
        int(np.argmin(smooth[:peak])), peak, peak + int(np.argmin(smooth[peak:]))
    )


HEADS = (
    *("data", "flips", "early stopping", "without", "paper", "off by (sd)", "with"),
    *("paper", "off by (sd)", "gain", "level", "paper"),
)


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """The table of the paper beside ours, and a sentence on what it shows."""
    cells = payload["cells"]
    pairs = list(zip(cells[::2], cells[1::2], strict=True))

    def apart(entry: Mapping[str, Any]) -> float:
        return (entry["accuracy_mean"] - entry["paper_mean"]) / entry["paper_sd"]

    def mean(entry: Mapping[str, Any], what: str) -> str:
        return f"{entry[f'{what}_mean']:.2f} ({entry[f'{what}_sd']:.2f})"

    def beside(entry: Mapping[str, Any]) -> list[str]:
        return [mean(entry, "accuracy"), mean(entry, "paper"), f"{apart(entry):+.1f}"]

    lines = [
        [
            *(TITLES[plain["data"]], f"{plain['noise']:.0%}"),
            *("yes" if plain["early_stopping"] else "no", *beside(plain)),
            *(*beside(flooded), f"{statistics.gain(flooded, plain):+.2f}"),
            *(mean(flooded, "level"), mean(flooded, "paper_level")),
        ]
        for plain, flooded in pairs
    ]
    within = sum(abs(apart(entry)) <= 2 for entry in cells)
    ahead, behind = statistics.verdicts(
        statistics.gain(flooded, plain) for plain, flooded in pairs
    )
    summary = (
        f"{within} of {len(cells)} accuracies are within two of the paper's standard "
        f"deviations. Of {len(pairs)} pairs, flooding is ahead in {ahead} and behind "
        f"in {behind}; in the other {len(pairs) - ahead - behind} the 95% interval of "
        "the paired gain includes 0."
    )
    whole = report.markdown(HEADS, lines)
    return {
        "synthetic": "\n\n".join((whole, summary, report.provenance(payload))),
        "synthetic-descent": descents(payload["curves"]),
    }


def descents(curves: Sequence[Mapping[str, Any]]) -> str:
    """Where the test loss descends a second time, and where it does not."""

    def second(curve: Mapping[str, Any]) -> str:
        loss = curve["test_loss"]
        if (found := second_descent(loss)) is None:
            return "no"
        peak, end = found.peak, found.second_trough
        return f"peak {loss[peak]:.2f} at {peak}, then {loss[end]:.2f} at {end}"

    def lowest(curve: Mapping[str, Any]) -> str:
        loss = curve["test_loss"]
        return f"{min(loss):.2f} at {int(np.argmin(loss))}"

    return report.table(
        curves,
        {
            "data": lambda curve: TITLES[curve["data"]],
            "flips": "{noise:.0%}",
            "level": "{level:.2f}",
            "lowest test loss": lowest,
            "last": lambda curve: f"{curve['test_loss'][-1]:.2f}",
            "second descent": second,
        },
    )


def figures(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Test loss over epochs, and test accuracy over levels."""
    drawn = {"synthetic-levels": levels_figure(payload)}
    if payload["curves"]:
        drawn["synthetic-curves"] = curves_figure(payload)
    return drawn


def curves_figure(payload: Mapping[str, Any]) -> Any:
    """A panel for each data set: plain and flooded.

    Dots mark a peak and the minimum after it, where the loss descends a second time.
    """
    curves = payload["curves"]
    names = list(dict.fromkeys(curve["data"] for curve in curves))
    fig, axes = panels(len(names), 1, size=(INCHES, 2.3 * len(names)), sharex=True)
    for axis, name in zip(axes, names, strict=True):
        mine = [curve for curve in curves if curve["data"] == name]
        for colour, curve in zip((RED, BLUE), mine, strict=False):
            loss, level = curve["test_loss"], curve["level"]
            found = second_descent(loss)
            axis.plot(loss, color=colour)
            text = f"flooded at {level:.2f}" if level else "not flooded"
            end = (len(loss) - 1, loss[-1])
            say(axis, text, end, (0, 10), color=colour, ha="right")
            if found is not None:
                peak, low = found.peak, found.second_trough
                axis.plot([peak, low], [loss[peak], loss[low]], "o", color=colour)
        axis.margins(y=0.15)
        axis.set(title=f"{TITLES[name]}, {mine[0]['noise']:.0%} of the labels wrong")
        axis.set_ylabel("test loss")
    axes[-1].set_xlabel("epoch; dots: a peak, and the minimum after it")
    return fig


def levels_figure(payload: Mapping[str, Any]) -> Any:
    """A panel for each data set: the gain over the level, at the last epoch.

    A dot marks the noise floor. A ring marks the levels that validation picked
    and what they gain, with their standard deviation and the interval of the gain: of
    the lines the record has no trials.
    """
    cells, pairs = payload["by_level"], payload["cells"]
    picked = {
        (flooded["data"], flooded["noise"]): (flooded, statistics.gain(flooded, plain))
        for plain, flooded in zip(pairs[::2], pairs[1::2], strict=True)
        if not flooded["early_stopping"]
    }
    names = list(dict.fromkeys(cell["data"] for cell in cells))
    fig, axes = panels(
        len(names), 1, size=(INCHES, 2.4 * len(names)), sharex=True, sharey=True
    )
    for axis, name in zip(axes, names, strict=True):
        mine = [cell for cell in cells if cell["data"] == name]
        lowest = (-9, -9, -3)  # where a line that falls bears its name
        for colour, low, cell in zip((BLUE, GREEN, RED), lowest, mine, strict=False):
            levels, noise = np.array(cell["level"]), cell["noise"]
            accuracy = 100 * np.array(cell["test_accuracy_last"])
            gains = accuracy - accuracy[0]
            axis.plot(levels, gains, color=colour)
            floor = float(levels_of.noise_floor(noise, 2))
            look: dict[str, Any] = {"color": colour, "ms": 8, "mew": 1.5}
            axis.plot(floor, np.interp(floor, levels, gains), "o", **look)
            flooded, (gain, half) = picked[name, noise]
            look |= {"mfc": "none", "elinewidth": 1, "xerr": flooded["level_sd"]}
            at = flooded["level_mean"]
            axis.errorbar(
                at, gain, half if math.isfinite(half) else None, fmt="o", **look
            )
            inside = np.flatnonzero(gains > low)[-1]
            end = (levels[inside], gains[inside])
            left = low == -9 and inside < len(levels) - 1
            by, side = ((-7, 0), "right") if left else ((5, 2), "left")
            say(axis, f"{noise:.0%} wrong", end, by, color=colour, ha=side)
        axis.axhline(0, color=FAINT, lw=0.6)
        axis.set(title=TITLES[name], ylabel="points gained", ylim=(-10, 10))
    axes[-1].set_xlabel(
        "level; dot: noise floor, ring: levels picked by validation,\n"
        "with standard deviation and 95 % interval of the gain over "
        f"{payload['protocol']['trials']} trials"
    )
    return fig
