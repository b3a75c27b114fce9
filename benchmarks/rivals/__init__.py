"""Asks what beats flooding: each method tries 20 configurations of a space, or none.

Finished: its records name the commits that hold its code, and the commands.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import report, statistics
from benchmarks.pictures import BLUE, FAINT, INCHES, RED, panels, say
from benchmarks.rivals.compared import (
    COLUMNS,
    COMPARED,
    PLAIN,
    READOUTS,
    RECIPE,
    WHEN,
    Findings,
    Payload,
    pieces_of,
)
from benchmarks.rivals.methods import BUDGETS, METHODS, PIECES, SCHEDULES, TRIES


def judged(family: Mapping[Any, statistics.Effect]) -> dict[Any, str]:
    """Differences with their intervals, and what Holm's correction lets one say."""
    known = {name: one for name, one in family.items() if np.isfinite(one.mean)}
    cells = dict.fromkeys(family, "-")
    for name, verdict in statistics.judged(known).items():
        said = "" if verdict == statistics.OPEN else f", **{verdict}**"
        cells[name] = f"{known[name]:+.1f}{said}"
    return cells


def flat(nested: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    return {(a, b): one for a, inner in nested.items() for b, one in inner.items()}


def title_of(method: str) -> str:
    one = METHODS[method]
    return one.title + (" (told the share)" if one.told else "")


def shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.1f}"


def standing_table(found: Findings) -> str:
    """Where flooding stands beside the best rival of each setting."""
    family = flat(found.standings())
    cells = judged(family)
    known = [one for one in family.values() if np.isfinite(one.mean)]
    verdicts = statistics.verdicts_of(known)
    above, below = statistics.verdicts(one.interval for one in known)
    note = (
        f"Of {len(known)} differences Holm's steps leave "
        f"{verdicts.count(statistics.AHEAD)} ahead and "
        f"{verdicts.count(statistics.BEHIND)} behind. By themselves the intervals of "
        f"{above} lie above 0 and those of {below} below."
    )
    made = report.markdown(
        ["points over the best rival", *(title for title, _ in COLUMNS.values())],
        [
            [title, *(cells[name, column] for column in COLUMNS)]
            for name, (title, *_) in COMPARED.items()
        ],
    )
    return f"{made}\n\n{note}"


def tries_table(found: Findings) -> str:
    """What a method gains by the number of configurations that are tried."""
    beside = {when: judged(found.over_plain(when)) for when in WHEN}
    titles = {"end": "at the end", "early": "early"}
    return report.markdown(
        [
            "method",
            *(f"{title}, {k}" for title in titles.values() for k in BUDGETS),
            *(f"less plain's, {title}" for title in titles.values()),
            "runs' cost",
        ],
        [
            [
                title_of(m),
                *(
                    shown(found.gain_of_tries(m, k, when))
                    for when in WHEN
                    for k in BUDGETS
                ),
                *(beside[when].get(m, "-") for when in WHEN),
                f"{METHODS[m].cost:g}",
            ]
            for m in found.methods
        ],
    )


def fixed_table(found: Findings) -> str:
    """What the defaults reach, where there is no validation set."""
    beside = judged(found.beside_recipe())
    return report.markdown(
        [
            "method, nothing tuned",
            *(f"{schedule}, {r}" for schedule in SCHEDULES for r in READOUTS),
            "right labels (constant, last)",
            *(f"recipe less this ({r} weights)" for r in READOUTS),
        ],
        [
            [
                title_of(m),
                *(
                    shown(found.gain_of_fixed(m, schedule, r, noisy=True))
                    for schedule in SCHEDULES
                    for r in READOUTS
                ),
                shown(found.gain_of_fixed(m, "constant", "last", noisy=False)),
                *(beside.get(f"{m}/{r}", "-") for r in READOUTS),
            ]
            for m in found.methods
            if METHODS[m].defaults is not None
        ],
    )


def partner_table(found: Findings) -> str:
    """What a band adds to other methods."""
    nested = found.added()
    cells = judged(flat(nested))
    return report.markdown(
        ["to", "at the end", "stopped early"],
        [[title_of(m), *(cells[m, when] for when in WHEN)] for m in nested],
    )


def summary_table(found: Findings) -> str:
    """Each setting: plain training, the recipe, the best rival and the best of ours."""
    rows: list[list[str]] = []
    effects: dict[str, statistics.Effect] = {}
    for s in found.settings:
        ours, rivals = (
            statistics.cross_fitted(s.group(COMPARED["all"][i], "early"))
            for i in (1, 2)
        )
        effects[s.title] = statistics.corrected(ours - rivals, s.ratio)
        reached = (s.fixed(*PLAIN), s.fixed(*RECIPE), rivals, ours)
        cells = ["-" if one is None else f"{one.mean():.1f}" for one in reached]
        rows.append([s.title, str(len(s.seeds)), *cells])
    cells = judged(effects)
    return report.markdown(
        [
            "data, wrong labels",
            "seeds",
            "plain, nothing tuned",
            "recipe, nothing tuned",
            "best rival, 20 tries, stopped early",
            "best flooded, the same",
            "difference",
        ],
        [[*row, cells[row[0]]] for row in rows],
    )


def piece_table(found: Findings) -> str:
    """The pieces of the study."""
    recorded = {piece["piece"]: piece for piece in pieces_of(found.payload)}
    rows: list[list[str]] = []
    for name in (name for name in PIECES if name in recorded):
        piece, size = recorded[name], recorded[name]["protocol"]
        done = min(len(s.seeds) for s in found.settings if s.piece == name)
        rows.append(
            [
                report.title(name),
                f"{size['train']}, {size['validation']}, {size['test']}",
                f"{size['steps']} of {size['batch']}",
                ", ".join(f"{flips:.0%}" for flips in size["flips"]),
                f"{done} of {size['seeds']}",
                str(len(piece["rows"]) * TRIES),
                ", ".join(sorted({str(row["commit"]) for row in piece["rows"]})),
            ]
        )
    return report.markdown(
        [
            "piece",
            "training, validation, test",
            "steps of a batch",
            "wrong labels",
            "seeds",
            "runs",
            "commit",
        ],
        rows,
    )


def space_table() -> str:
    """What is drawn, and what is taken where nothing is tuned."""

    def numbers(pairs: Iterable[tuple[str, Any]]) -> str:
        return ", ".join(f"{name} {value}" for name, value in pairs) or "-"

    return report.markdown(
        ["method", "drawn beside learning rate and schedule", "default"],
        [
            [
                title_of(name),
                numbers(
                    (field, f"{s.low:g} to {s.high:g}" + " (log)" * s.log)
                    for field, s in one.space.items()
                    if s.low < s.high
                ),
                "none" if one.defaults is None else numbers(one.defaults.items()),
            ]
            for name, one in METHODS.items()
            if not one.of
        ],
    )


def source(payload: Payload) -> str:
    """The line under a table: where its numbers come from."""
    pieces = pieces_of(payload)
    env = pieces[0]["environment"]
    commits = sorted({str(row["commit"]) for piece in pieces for row in piece["rows"]})
    return (
        f"`python -m benchmarks rivals PIECE`, commit {', '.join(commits)}, jax "
        f"{env['jax']}, optax {env['optax']}, {env['cpu_count']} x {env['cpu']}."
    )


def tables(payload: Payload) -> dict[str, str]:
    """What the pages show."""
    found = Findings(payload)
    made = {
        "rivals": summary_table(found),
        "rivals-standing": standing_table(found),
        "rivals-tries": tries_table(found),
        "rivals-fixed": fixed_table(found),
        "rivals-partners": partner_table(found),
        "rivals-pieces": piece_table(found),
        "rivals-spaces": space_table(),
    }
    return {name: f"{table}\n\n{source(payload)}" for name, table in made.items()}


DRAWN = {  # methods of the figure: a short name, and the line
    "plain": ("plain", {"color": FAINT}),
    "sam": ("SAM", {"color": RED, "ls": "--"}),
    "elr": ("ELR", {"color": RED}),
    "forward": ("forward, told", {"color": RED, "ls": ":"}),
    "pruned": ("labels left out", {"color": RED, "ls": "-."}),
    "band": ("band", {"color": BLUE, "ls": "--"}),
    "estimated": ("band, estimated", {"color": BLUE}),
    "floor": ("band, told", {"color": BLUE, "ls": ":"}),
}


BARS = 24, 44  # where the intervals stand, beside the most configurations


def named(axis: Any, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Names beside the lines, from below: apart, and within the axes."""
    low, high = axis.get_ylim()
    line = (high - low) / 14  # of letters
    places: list[float] = []
    for gain, *_ in ends:
        places.append(max(gain, places[-1] + line) if places else gain)
    for up, (place, (_, name, color)) in enumerate(zip(places, ends, strict=True)):
        highest = high - line * (len(ends) - 1 - up)
        say(axis, name, (BARS[-1], min(place, highest)), color=color)


def figures(payload: Payload) -> dict[str, Any]:
    """The gain by the number of configurations tried, and its intervals at the end."""
    found = Findings(payload)
    beside = dict(zip(DRAWN, np.geomspace(*BARS, len(DRAWN)), strict=True))
    fig, axes = panels(2, 1, size=(INCHES, 8), sharex=True)
    for axis, when in zip(axes, WHEN, strict=True):
        ends: list[tuple[float, str, Any]] = []
        for m, (name, style) in DRAWN.items():
            if m in found.methods:
                gains = [found.gain_of_tries(m, k, when) for k in BUDGETS]
                axis.plot(BUDGETS, gains, marker="o", ms=3, **style)
                ends.append((gains[-1], name, style["color"]))
                mean, half = found.spread_of_tries(m, when)
                if np.isfinite(half):
                    edges = (mean - half, mean + half)
                    axis.plot([beside[m]] * 2, edges, lw=1.2, **style)
                    axis.plot(beside[m], mean, ".", color=style["color"])
        named(axis, sorted(ends))
        axis.axhline(0, color=FAINT, lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlim(0.9, 200)  # space for the names
        axis.set_xticks(BUDGETS, [str(k) for k in BUDGETS])
        axis.set_title("at the end of the run" if when == "end" else "stopped early")
        axis.set_ylabel("points gained")
    axes[1].set_xlabel(
        "configurations tried, the best by noisy validation;\n"
        "bars: 95 % intervals at the last, data sets being the unit"
    )
    return {"rivals": fig}
