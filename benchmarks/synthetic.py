"""Repeats the paper's synthetic table: 36 accuracies with and without flooding.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import panels

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


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and gain of each cell, each level, the troughs of each curve."""
    cells = payload["cells"]

    def cell_of(row: Mapping[str, Any]) -> str:
        return f"{row['data']}/{row['noise']:.0%}"

    def entry_of(cell: Mapping[str, Any]) -> str:
        training = "flooded" if cell["flooded"] else "plain"
        return f"{cell_of(cell)}/{report.epoch_of(cell)}/{training}"

    found = report.named(cells, entry_of)
    for plain, flooded in zip(cells[::2], cells[1::2], strict=True):
        base = f"{cell_of(plain)}/{report.epoch_of(plain)}"
        found |= report.named_interval(base, "gain", statistics.gain(flooded, plain))
    for cell in payload["by_level"]:
        for i, level in enumerate(cell["level"]):
            for column in cell.keys() - {"data", "noise", "level"}:
                found[f"{cell_of(cell)}/level-{level:g}/{column}"] = cell[column][i]
    for curve in payload["curves"]:
        loss, descent = curve["test_loss"], second_descent(curve["test_loss"])
        base = f"{cell_of(curve)}/curve-{'flooded' if curve['level'] else 'plain'}"
        at = {"lowest": int(np.argmin(loss)), "last": len(loss) - 1}
        at |= {} if descent is None else descent._asdict()
        for name, epoch in at.items():
            found[f"{base}/{name}"] = loss[epoch]
            found[f"{base}/{name}_epoch"] = epoch
    return found


# header, cell, and whether the README's short table has the column too
COLUMNS = (
    ("data", "{title}", True),
    ("flips", "{plain[noise]:.0%}", True),
    ("early stopping", "{stopped}", False),
    ("without", "{plain[accuracy_mean]:.2f} ({plain[accuracy_sd]:.2f})", True),
    ("paper", "{plain[paper_mean]:.2f} ({plain[paper_sd]:.2f})", True),
    ("off by (sd)", "{plain_apart:+.1f}", False),
    ("with", "{flooded[accuracy_mean]:.2f} ({flooded[accuracy_sd]:.2f})", True),
    ("paper", "{flooded[paper_mean]:.2f} ({flooded[paper_sd]:.2f})", True),
    ("off by (sd)", "{flooded_apart:+.1f}", False),
    ("gain", "{gain:+.2f}", True),
    ("level", "{flooded[level_mean]:.2f} ({flooded[level_sd]:.2f})", False),
    (
        "paper",
        "{flooded[paper_level_mean]:.2f} ({flooded[paper_level_sd]:.2f})",
        False,
    ),
)


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """The table of the paper beside ours, and a sentence on what it shows."""
    cells = payload["cells"]

    def apart(entry: Mapping[str, Any]) -> float:
        return (entry["accuracy_mean"] - entry["paper_mean"]) / entry["paper_sd"]

    rows: list[dict[str, Any]] = [
        {
            "title": TITLES[plain["data"]],
            "stopped": "yes" if plain["early_stopping"] else "no",
            "plain": plain,
            "plain_apart": apart(plain),
            "flooded": flooded,
            "flooded_apart": apart(flooded),
            "gain": statistics.gain(flooded, plain),
        }
        for plain, flooded in zip(cells[::2], cells[1::2], strict=True)
    ]
    within = sum(abs(apart(entry)) <= 2 for entry in cells)
    ahead, behind = statistics.verdicts(row["gain"] for row in rows)
    summary = (
        f"{within} of {len(cells)} accuracies are within two of the paper's standard "
        f"deviations. Of {len(rows)} pairs, flooding is ahead in {ahead} and behind "
        f"in {behind}; in the other {len(rows) - ahead - behind} the 95% interval of "
        "the paired gain includes 0."
    )
    whole = report.table(rows, [(header, cell) for header, cell, _ in COLUMNS])
    short = report.table(
        [row for row in rows if row["stopped"] == "no"],
        [(header, cell) for header, cell, in_short in COLUMNS if in_short],
    )
    return {
        "synthetic": "\n\n".join((whole, summary, report.provenance(payload))),
        "synthetic-short": f"{short}\n\n{summary}",
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
    """A panel for each data set: plain and flooded, the second descent marked."""
    curves = payload["curves"]
    names = list(dict.fromkeys(curve["data"] for curve in curves))
    fig, axes = panels(1, len(names))
    for axis, name in zip(axes, names, strict=True):
        mine = [curve for curve in curves if curve["data"] == name]
        for colour, curve in zip(("C3", "C0"), mine, strict=False):
            loss, level = curve["test_loss"], curve["level"]
            found = second_descent(loss)
            label = f"level {level:.2f}" if level else "no flooding"
            label += ": no second descent" if found is None else ": second descent"
            axis.plot(loss, color=colour, label=label)
            if found is not None:
                ends = [found.peak, found.second_trough]
                axis.plot(ends, [loss[i] for i in ends], "o", color=colour)
        axis.set(title=f"{TITLES[name]}, {mine[0]['noise']:.0%} flips", xlabel="epoch")
        axis.legend(fontsize="small")
    axes[0].set_ylabel("test cross-entropy")
    return fig


def levels_figure(payload: Mapping[str, Any]) -> Any:
    """A panel for each cell: test accuracy of the last and the best epoch."""
    cells = payload["by_level"]
    columns = min(3, len(cells))
    fig, axes = panels(-(-len(cells) // columns), columns)
    for axis, cell in zip(axes, cells, strict=False):
        for which, label in (("last", "last epoch"), ("best", "early stopping")):
            accuracy = 100 * np.array(cell[f"test_accuracy_{which}"])
            axis.plot(cell["level"], accuracy, ".-", label=label)
        axis.set(title=f"{TITLES[cell['data']]}, {cell['noise']:.0%} flips")
        axis.set(xlabel="level", ylabel="test accuracy, %")
    axes[0].legend(fontsize="small")
    return fig
