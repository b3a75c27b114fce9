"""Compares flooding with the gradient penalty: drift by rule, cost, and paths.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.pictures import BLUE, FAINT, GREEN, INCHES, INK, RED, panels, say

LEAN = 0.4  # of the bowl (1 + LEAN x) |w|^2 / 2, flattest at one point of a level set


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The drift by rule and the cost."""
    drift, rates = payload["drift"], payload["protocol"]["learning_rates"]

    def ratio(row: Mapping[str, Any]) -> str:
        error = row["standard_error"]
        return f"{row['ratio']:.3f}" + ("" if error is None else f" ± {error:.3f}")

    lines: list[list[str]] = []
    for rule in dict.fromkeys(row["rule"] for row in drift):
        seen = {row["learning_rate"]: row for row in drift if row["rule"] == rule}
        last, cosine = seen[rates[-1]], seen[rates[-1]]["cosine"]
        moves = cosine is not None
        agrees = moves and abs(last["ratio"] - 1) < 0.02 and cosine > 0.999
        lines.append([rule, *(ratio(seen[rate]) for rate in rates)])
        lines[-1] += [f"{cosine:.3f}" if moves else "no motion"]
        lines[-1] += [f"{last['alternating']:.2f}", "yes" if agrees else "no"]
    heads = (f"ratio, η = {rate:g}" for rate in rates)
    tail = ("cosine", "alternating", "equals the penalty's drift")
    shown = report.markdown(["rule", *heads, *tail], lines)
    batch = payload["pairs_of_batches"]
    noise = f"{batch['independent_noise']:.0f}"
    pairs = report.markdown(
        ["pair of steps on", "mean, ratio to -η² H g", "noise / mean"],
        [
            ["independent mini-batches", f"{batch['independent_ratio']:.3f}", noise],
            ["one mini-batch twice", f"{batch['same_batch_ratio']:.3f}", ""],
        ],
    )
    costs = report.table(
        payload["cost"],
        {
            "model": "{model}",
            "variant": "{variant}",
            "step time (IQR)": "{time_ratio_median:.2f} "
            "({time_ratio_iqr[0]:.2f} to {time_ratio_iqr[1]:.2f})",
            "FLOPs": "{flops_ratio:.3f}",
            "peak temporary memory": "{temp_memory_ratio:.2f}",
        },
    )
    source = report.provenance(payload)
    return {
        "penalty-drift": f"{shown}\n\n{source}",
        "penalty-pairs": f"{pairs}\n\n{source}",
        "penalty-cost": f"{costs}\n\n{source}",
    }


def figures(payload: dict[str, Any]) -> dict[str, Any]:
    """Contours of the leaning bowl, its level set, the iterates and the flow."""
    seen = payload["paths"]
    span = np.linspace(-1.7, 1.3, 150)
    grid = np.stack(np.meshgrid(span, span), -1)
    loss = 0.5 * (1 + LEAN * grid[..., 0]) * (grid**2).sum(-1)
    figure, (axes,) = panels(1, 1, size=(INCHES, 5.4))
    lines = axes.contour(
        span, span, loss, levels=[0.1, 0.2, 0.3, 0.7, 1.0], colors=FAINT, linewidths=0.6
    )
    axes.clabel(lines, fontsize=9.5, fmt="%g")
    axes.contour(span, span, loss, levels=[seen["level"]], colors=INK, linewidths=1.8)

    def draw(name: str, *style: Any, **options: Any) -> None:
        axes.plot(*np.array(seen[name]).T, *style, **options)

    draw("plain", "-", color=GREEN, linewidth=2)
    draw("flow", "-", color=RED, linewidth=5, alpha=0.5)
    draw("flooded", ".", color=BLUE, markersize=2)
    draw("flooded_first", "-", color=BLUE, linewidth=0.6)
    axes.plot(*seen["start"], "o", color=INK, markersize=5)
    ends = np.roots([LEAN, 1.0, 0.0, -2 * seen["level"]]).real
    flattest = ends[np.argmin(abs(ends + 1.5))]
    axes.plot(flattest, 0, "*", color=INK, markersize=12)
    say(axes, "start", tuple(seen["start"]), (8, 4))
    say(axes, "SGD runs to the minimum", (0, 0), (-10, -12), color=GREEN, ha="center")
    middle = seen["flow"][len(seen["flow"]) // 40]
    say(
        axes,
        "flooded SGD (dots)\nalong the flow of\nthe gradient penalty",
        middle,
        (34, 44),
        color=BLUE,
        ha="center",
        va="bottom",
    )
    say(axes, "flattest point\nof the level set", (flattest, 0), (12, 0))
    axes.set(aspect="equal", xlabel="w₁", ylabel="w₂", xlim=(-1.7, 1.3))
    axes.set(
        ylim=(-1.3, 1.3), title=f"loss; the thick line is its level set {seen['level']}"
    )
    return {"penalty": figure}
