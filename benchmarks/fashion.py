"""Repeats iFlood and SoftAD on Fashion-MNIST beside the runs of SoftAD's authors.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks import report, statistics

SETS = ("train", "validation", "test")
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


def their_row(name: str, theirs: Published) -> dict[str, Any]:
    """A published run as a line of the table."""
    return {
        "title": TITLES[name],
        "runs": "theirs",
        "epochs": 500,
        "level": "-" if name == "plain" else f"{theirs.level:g}",
        "train_loss": f"{theirs.train_loss:.4f}",
        "test_loss": f"{theirs.test_loss:.4f}",
        "train_accuracy": f"{theirs.train_accuracy:.4f}",
        "test_accuracy": f"{theirs.test_accuracy:.4f}",
        "norm": f"{theirs.norm:.1f}",
    }


def our_row(row: Mapping[str, Any]) -> dict[str, Any]:
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
    losses_and_accuracies = {
        f"{which}_{measure}": spread(f"{which}_{measure}", 4)
        for which in SETS
        for measure in ("loss", "accuracy")
    }
    return {
        "title": TITLES[row["method"]],
        "runs": f"ours, {row['selection']}",
        "epochs": row["epochs"],
        "level": level,
        "norm": spread("norm", 1),
        **losses_and_accuracies,
    }


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Theirs and ours, every level, and the losses on the way."""
    lines: list[dict[str, Any]] = []
    for name, theirs in PUBLISHED.items():
        lines.append(their_row(name, theirs))
        lines += [our_row(row) for row in payload["rows"] if row["method"] == name]
    beside = report.table(
        lines,
        {
            "method": "{title}",
            "runs": "{runs}",
            "epochs": "{epochs}",
            "level": "{level}",
            "train loss": "{train_loss}",
            "test loss": "{test_loss}",
            "train accuracy": "{train_accuracy}",
            "test accuracy": "{test_accuracy}",
            "norm": "{norm}",
        },
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
    on_the_way = report.table(
        [
            {
                "title": TITLES[seen["method"]],
                "part": part,
                "loss": seen[f"{part}_loss"],
            }
            for seen in payload["curves"]
            for part in ("train", "test")
        ],
        {
            "method": "{title}",
            "loss": "{part}",
            **{
                f"epoch {epoch}": f"{{loss[{i}]:.3f}}"
                for i, epoch in enumerate(payload["curves"][0]["epochs"])
            },
        },
    )
    return {
        "fashion": f"{beside}\n\n{report.provenance(payload)}",
        "fashion-levels": by_level,
        "fashion-curves": on_the_way,
    }
