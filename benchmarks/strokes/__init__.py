"""Strokes between the ends of a band: what they do to the drift, and whom they help.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import BLUE, FAINT, GREEN, INCHES, INK, RED, panels, say
from benchmarks.strokes.formulas import RULES, Rule

POINTS = 1.0  # what counts as a gain


def gain(row: Mapping[str, Any]) -> statistics.Interval:
    """What the band gives in points of accuracy, paired by seed."""
    within, without = row["accuracies_within"], row["accuracies_without"]
    return statistics.interval(100 * (np.array(within) - np.array(without)))


def helped(row: Mapping[str, Any]) -> bool:
    return gain(row).mean >= POINTS


def counted(rows: list[dict[str, Any]]) -> str:
    """How often each rule was right, and how often there was a gain to foretell."""
    ahead, behind = statistics.verdicts(gain(row) for row in rows)
    first, amended = (
        sum(row[rule] == helped(row) for row in rows)
        for rule in ("foretold", "amended")
    )
    return (
        f"With {rows[0]['flipped']:.0%} of the labels wrong the first rule was right "
        f"in {first} of {len(rows)} rows and the amended one in {amended}. "
        f"{sum(map(helped, rows))} rows gain a point or more; the interval of "
        f"{ahead} lies above 0, that of {behind} below."
    )


def tables(payload: dict[str, Any]) -> dict[str, str]:
    """The drift by rule and length of a stroke, on batches, and the prediction."""
    source = report.provenance(payload)
    return {
        "strokes-drift": f"{_drift(payload['drift'])}\n\n{source}",
        "strokes-batches": f"{_batches(payload['batches'])}\n\n{source}",
        "strokes-practice": f"{_practice(payload['practice'])}\n\n{source}",
    }


def _drift(rows: list[dict[str, Any]]) -> str:
    crossings = list(dict.fromkeys(row["crossing"] for row in rows))

    def shown(number: float) -> str:
        return f"{number:.{0 if abs(number) >= 100 else 2}f}"

    def cell(row: Mapping[str, Any]) -> str:
        known = row["predicted"] is not None
        return shown(row["ratio"]) + (f" ({shown(row['predicted'])})" if known else "")

    def cosines(seen: list[dict[str, Any]], column: str) -> str:
        sizes = [abs(row[column]) for row in seen]
        low, high = f"{min(sizes):.3f}", f"{max(sizes):.3f}"
        return low if low == high else f"{low} to {high}"

    lines: list[list[str]] = []
    for name in dict.fromkeys(row["rule"] for row in rows):
        at = {row["crossing"]: row for row in rows if row["rule"] == name}
        seen = [at[crossing] for crossing in crossings]
        ends = (cosines(seen, column) for column in ("cosine", "cosine_penalty"))
        lines.append([name, *map(cell, seen), shown(RULES[name].limit), *ends])
    heads = (f"2d = {one} h" for one in crossings)
    tail = ("long strokes", "cosine, prediction", "cosine, -P H g")
    return report.markdown(["rule", *heads, *tail], lines)


def _batches(rows: list[dict[str, Any]]) -> str:
    return report.table(
        rows,
        {
            "rule": "{rule}",
            "band / sd": "{band:g}",
            "steps of a stroke": "{steps:.1f}",
            "ratio": "{ratio:.1f} ± {standard_error:.1f}",
            "of first order": "{first_order:.2f}",
            "first order, times steps": lambda row: (
                f"{row['first_order'] * row['steps']:.0f}"
            ),
            "cosine": "{cosine:.2f}",
        },
    )


def _practice(rows: list[dict[str, Any]]) -> str:
    def optional(number: float | None) -> str:
        return "-" if number is None else f"{number:.1f}"

    def percent(column: str) -> report.Cell:
        return lambda row: f"{100 * float(np.mean(row[column])):.1f}"

    def verdict(column: str) -> report.Cell:
        def write(row: Mapping[str, Any]) -> str:
            right = "right" if row[column] == helped(row) else "wrong"
            return f"{'gain' if row[column] else 'none'}, {right}"

        return write

    shares = dict.fromkeys(row["flipped"] for row in rows)
    of_share = [[row for row in rows if row["flipped"] == share] for share in shares]
    made = report.table(
        rows,
        {
            "wrong labels": "{flipped:.0%}",
            "optimizer": "{optimizer}, {learning_rate:g}",
            "loss a step": "{speed:.2g}",
            "batch sd": "{deviation:.2f}",
            "drift multiplied": lambda row: optional(row["growth"]),
            "swing / d, foretold (seen)": lambda row: (
                f"{optional(row['excess'])} ({row['swing']:.1f})"
            ),
            "stroke, foretold (seen)": "{foretold_steps:.0f} ({steps:.0f})",
            "no band": percent("accuracies_without"),
            "band": percent("accuracies_within"),
            "gain": lambda row: f"{gain(row):+.1f}",
            "first rule": verdict("foretold"),
            "amended": verdict("amended"),
        },
    )
    return "\n\n".join((made, " ".join(map(counted, of_share))))


LOOKS = {  # colour and line, and where its name stands: steps of a stroke, and by
    "SGD": (INK, "-", 60, (0, 9)),
    "heavy ball 0.5": (BLUE, "-", 60, (0, -12)),
    "heavy ball 0.9": (RED, "-", 40, (-8, 6)),
    "Nesterov 0.9": (GREEN, "--", 10, (8, -8)),
    "Adam": (BLUE, "-", 60, (0, -14)),
}


def figures(payload: dict[str, Any]) -> dict[str, Any]:
    """The drift over the length of a stroke: formulas as lines, runs as dots."""
    figure, (momentum, adam) = panels(2, 1, size=(INCHES, 6.4), sharex=True)
    steps = np.geomspace(1, 500, 200)
    for name, rule in RULES.items():
        axes = momentum if rule.beta2 is None else adam
        colour, line, at, by = LOOKS[name]
        axes.plot(steps, [rule.ratio(n) for n in steps], line, color=colour)
        side = "right" if by[0] < 0 else "left"
        say(axes, name, (at, rule.ratio(at)), by, color=colour, ha=side)
        banded = [
            row for row in payload["drift"] if row["rule"] == name and row["crossing"]
        ]
        dots = [row["steps"] for row in banded], [row["ratio"] for row in banded]
        axes.plot(*dots, "o", color=colour)
    momentum.set(xscale="log", yscale="log", title="lines: formulas, dots: runs")
    momentum.set_ylabel("drift, times\nthat of plain SGD")
    alone = Rule(RULES["Adam"].momentum, beta2=1.0)
    adam.plot(steps, [alone.ratio(n) for n in steps], ":", color=FAINT)
    say(adam, "without the second moment", (70, alone.ratio(70)), (-8, 8), ha="right")
    adam.axhline(0, color=FAINT, linewidth=0.6)
    say(adam, "below 0: towards larger gradients", (1, 0), (0, -10))
    adam.set(ylim=(-22, 20), ylabel="drift, times one step\nin Adam's metric")
    adam.set_xlabel("steps of a stroke")
    return {"strokes": figure}
