"""Floods the paper's MLP on real images: accuracy, test loss, calibration, flatness.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks import report, statistics
from benchmarks.pixels import TITLES


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Without beside with flooding, and what each level does."""
    entries = payload["rows"]
    rows = [
        {
            "title": TITLES[plain["data"]],
            "stopped": "yes" if plain["early_stopping"] else "no",
            "plain": plain,
            "flooded": flooded,
            "gain": statistics.gain(flooded, plain),
        }
        for plain, flooded in zip(entries[::2], entries[1::2], strict=True)
    ]

    def both(measure: str, spec: str) -> str:
        return f"{{plain[{measure}]:{spec}}} to {{flooded[{measure}]:{spec}}}"

    columns = {
        "data": "{title}",
        "flips": "{plain[noise]:.0%}",
        "early stopping": "{stopped}",
        "level (sd)": "{flooded[level_mean]:.2f} ({flooded[level_sd]:.2f})",
        "test accuracy, %": both("accuracy_mean", ".2f"),
        "gain (95%)": "{gain:+.2f}",
        "test loss": both("test_loss_mean", ".3f"),
        "calibration error": both("test_ece_mean", ".3f"),
    }
    return {
        "images": f"{report.table(rows, columns)}\n\n{report.provenance(payload)}",
        "images-levels": levels_table(payload),
    }


def levels_table(payload: Mapping[str, Any]) -> str:
    """Each level at the last epoch: how flat before it floods, and after."""

    def change(measure: str) -> report.Cell:
        def cell(row: Mapping[str, Any]) -> str:
            before, after = row[f"{measure}_before"], row[f"{measure}_after"]
            return f"{after:.3g}" if before is None else f"{before:.3g} to {after:.3g}"

        return cell

    return report.table(
        payload["by_level"],
        {
            "data": lambda row: TITLES[row["data"]],
            "flips": "{noise:.0%}",
            "level": "{level:.2f}",
            "train loss": "{train_loss:.3f}",
            "steps below": "{share_below:.0%}",
            "test accuracy, %": lambda row: f"{100 * row['test_accuracy']:.2f}",
            "test loss": "{test_loss:.3f}",
            "calibration error": "{test_ece:.3f}",
            "Hessian trace": change("hessian_trace"),
            "top eigenvalue": change("top_eigenvalue"),
        },
    )
