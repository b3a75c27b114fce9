"""What flooding reaches on images, and what each level does."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from benchmarks import report, statistics
from benchmarks.pixels import TITLES
from flood_optax import sweep

MEASURES = ("loss", "accuracy", "ece")
FLATNESS = ("gradient_norm", "hessian_trace", "top_eigenvalue")


def summarise(name: str, noise: float, result: sweep.Result) -> list[dict[str, Any]]:
    """Without and with flooding, at the last and the best epoch.

    The level is picked for each seed by validation accuracy, the lowest of the best.
    """
    entries: list[dict[str, Any]] = []
    for early_stopping in (False, True):
        which, at = ("best", "best") if early_stopping else ("last", -1)
        seeds = result.metrics["entered"].shape[1]
        picks = {
            False: np.zeros(seeds),
            True: result.best("validation_accuracy", "max", at=cast(Any, at)),
        }
        for flooded, levels in picks.items():
            reached = result.curves(which, levels).astype(np.float64)
            accuracies = 100 * reached[:, MEASURES.index("accuracy")]
            entry: dict[str, Any] = {
                "data": name,
                "noise": noise,
                "early_stopping": early_stopping,
                "flooded": flooded,
                "seeds": seeds,
                **statistics.summary("accuracy", accuracies),
                "accuracies": accuracies.tolist(),
                **statistics.summary("level", levels),
                "levels": levels.tolist(),
            }
            for measure in ("loss", "ece"):
                values = reached[:, MEASURES.index(measure)]
                entry |= statistics.summary(f"test_{measure}", values)
            entries.append(entry)
    return entries


def by_level(name: str, noise: float, result: sweep.Result) -> list[dict[str, Any]]:
    """Means over the seeds at the last epoch, flatness before only where it floods."""
    rows: list[dict[str, Any]] = []
    for i, level in enumerate(result.levels):
        metrics = {k: v[i].astype(np.float64) for k, v in result.metrics.items()}
        row: dict[str, Any] = {"data": name, "noise": noise, "level": float(level)}
        row["train_loss"] = float(metrics["train_loss"][:, -1].mean())
        row["share_below"] = float(metrics["share_below"].mean())
        for j, measure in enumerate(MEASURES):
            row[f"test_{measure}"] = float(metrics["last"][:, j].mean())
        entered = bool(metrics["entered"].all())
        for j, measure in enumerate(FLATNESS):
            before = float(metrics["flatness_before"][:, j].mean())
            row[f"{measure}_before"] = before if entered else None
            row[f"{measure}_after"] = float(metrics["flatness_after"][:, j].mean())
        rows.append(row)
    return rows


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


def numbers(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and gain of each pair, and of each level."""
    rows = payload["rows"]

    def base_of(row: Mapping[str, Any]) -> str:
        return f"{row['data']}/{row['noise']:.0%}"

    def pair_of(row: Mapping[str, Any]) -> str:
        return f"{base_of(row)}/{report.epoch_of(row)}"

    def entry_of(row: Mapping[str, Any]) -> str:
        return f"{pair_of(row)}/{'flooded' if row['flooded'] else 'plain'}"

    def level_of(row: Mapping[str, Any]) -> str:
        return f"{base_of(row)}/level-{row['level']:g}"

    found = report.named(rows, entry_of) | report.named(payload["by_level"], level_of)
    for plain, flooded in zip(rows[::2], rows[1::2], strict=True):
        gain = statistics.gain(flooded, plain)
        found |= report.named_interval(pair_of(plain), "gain", gain)
    return found
