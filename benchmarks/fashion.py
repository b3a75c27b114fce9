"""Repeats iFlood and SoftAD on Fashion-MNIST beside the runs of SoftAD's authors.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report, statistics

TITLES = {"plain": "plain", "iflood": "iFlood", "softad": "SoftAD"}


class Published(NamedTuple):
    """Means of three trials after 500 epochs (eval_benchmarks_iFlood.ipynb)."""

    level: float
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float
    norm: float


PUBLISHED = {
    "plain": Published(-np.inf, 6.7e-5, 0.8058, 1.0, 0.8966, 75.86),
    "iflood": Published(0.15, 0.1469, 0.4194, 1.0, 0.8937, 74.63),
    "softad": Published(0.01, 0.0024, 0.4651, 1.0, 0.8963, 54.69),
}


def their_row(name: str, theirs: Published) -> list[str]:
    """A published run as a line of the table."""
    level = "-" if name == "plain" else f"{theirs.level:g}"
    measures = (f"{value:.4f}" for value in theirs[1:5])
    return [TITLES[name], "theirs", "500", level, *measures, f"{theirs.norm:.1f}"]


def our_row(row: Mapping[str, Any]) -> list[str]:
    """A run of ours as a line of the table, with its spread over several seeds."""

    def spread(measure: str, digits: int) -> str:
        mean = f"{row[f'{measure}_mean']:.{digits}f}"
        several = f" ({row[f'{measure}_sd']:.{digits}f})"
        return mean + (several if row["seeds"] > 1 else "")

    level = "-"
    if row["levels"] is not None:
        seen = np.array(row["levels"])
        apart = statistics.sd(seen)
        level = f"{seen.mean():.3g}" + (f" ({apart:.2f})" if apart else "")
    measures = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    return [
        *(TITLES[row["method"]], f"ours, {row['selection']}", str(row["epochs"])),
        *(level, *(spread(measure, 4) for measure in measures), spread("norm", 1)),
    ]


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Theirs and ours, every level, and the losses on the way."""
    lines: list[list[str]] = []
    for name, theirs in PUBLISHED.items():
        lines.append(their_row(name, theirs))
        lines += [our_row(row) for row in payload["rows"] if row["method"] == name]
    beside = report.markdown(
        [
            *("method", "runs", "epochs", "level", "train loss", "test loss"),
            *("train accuracy", "test accuracy", "norm"),
        ],
        lines,
    )
    by_level = report.table(
        payload["by_level"],
        {
            "method": lambda row: TITLES[row["method"]],
            "level": "{level:g}",
            "train loss": "{train_loss:.4f}",
            "train accuracy": "{train_accuracy:.4f}",
            "test loss": "{test_loss:.4f}",
            "test acc.": "{test_accuracy:.4f}",
        },
    )
    epochs = payload["curves"][0]["epochs"]
    on_the_way = report.markdown(
        ["method", "loss", *(f"epoch {epoch}" for epoch in epochs)],
        [
            [TITLES[seen["method"]], part, *(f"{x:.3f}" for x in seen[f"{part}_loss"])]
            for seen in payload["curves"]
            for part in ("train", "test")
        ],
    )
    return {
        "fashion": f"{beside}\n\n{report.provenance(payload)}",
        "fashion-levels": by_level,
        "fashion-curves": on_the_way,
    }
