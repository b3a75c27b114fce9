"""Floods the paper's MLP on real images: accuracy, test loss, calibration, flatness.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks import report, statistics


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """Without beside with flooding, and what each level does."""
    entries = payload["rows"]

    def line(plain: Mapping[str, Any], flooded: Mapping[str, Any]) -> list[str]:
        def both(measure: str, spec: str) -> str:
            return f"{plain[measure]:{spec}} to {flooded[measure]:{spec}}"

        return [
            report.title(plain["data"]),
            f"{plain['noise']:.0%}",
            "yes" if plain["early_stopping"] else "no",
            f"{flooded['level_mean']:.2f} ({flooded['level_sd']:.2f})",
            both("accuracy_mean", ".2f"),
            f"{statistics.gain(flooded, plain):+.2f}",
            both("test_loss_mean", ".3f"),
            both("test_ece_mean", ".3f"),
        ]

    body = report.markdown(
        [
            *("data", "flips", "early stopping", "level (sd)", "test accuracy, %"),
            *("gain (95%)", "test loss", "calibration error"),
        ],
        [line(*pair) for pair in zip(entries[::2], entries[1::2], strict=True)],
    )
    return {
        "images": f"{body}\n\n{report.provenance(payload)}",
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
            "data": lambda row: report.title(row["data"]),
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
