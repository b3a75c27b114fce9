"""What the rules give on labels whose noise depends on the class or on the input."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import report, statistics

SHOWN = {  # rules, and the heads of their columns
    "average": "averaged",
    "early": "early stopping",
    "decay": "weight decay",
    "known": "`noise_floor`, last",
    "known_average": "averaged",
    "known_band": "in a band, averaged",
    "estimated": "share estimated, last",
    "estimated_average": "averaged",
    "estimated_band": "in a band, averaged",
}
NAMES = {
    "average": "averaged weights alone",
    "early": "early stopping, validation accuracy",
    "decay": "weight decay, by validation",
    "decay_average": "weight decay, averaged weights, by validation",
    "grid": "three levels, by validation, last weights",
    "grid_average": "three levels, by validation, averaged weights",
    "known": "`noise_floor`, share known, last weights",
    "known_average": "`noise_floor`, share known, averaged weights",
    "known_band": "`noise_floor`, share known, band, averaged weights",
    "estimated": "`noise_floor`, share estimated, last weights",
    "estimated_average": "`noise_floor`, share estimated, averaged weights",
    "estimated_band": "`noise_floor`, share estimated, band, averaged weights",
}
Rows = Sequence[Mapping[str, Any]]
GROUPS: dict[str, tuple[str, Callable[[Mapping[str, Any]], bool]]] = {
    "none": ("none", lambda n: n["kind"] == "even" and n["rate"] == 0),
    "even": ("even, 20 and 40 %", lambda n: n["kind"] == "even" and n["rate"] > 0),
    "class": ("by class, 20 %", lambda n: n["kind"] == "class"),
    "teacher": ("by a weak teacher", lambda n: n["kind"] == "teacher"),
}


def gains(row: Mapping[str, Any], rule: str, over: str = "plain") -> np.ndarray:
    return np.array(row["rules"][rule]) - np.array(row["rules"][over])


def over_data(rows: Rows, rule: str, over: str = "plain") -> statistics.Effect:
    """The mean gain over the settings, data sets being the unit."""
    return statistics.over_data((row["data"], gains(row, rule, over)) for row in rows)


def of_kind(rows: Rows, group: str) -> Rows:
    return [row for row in rows if GROUPS[group][1](row["noise"])]


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """The gains of every rule by kind of noise, and setting by setting."""
    rows = payload["noise"]
    source = report.provenance(payload)
    chosen = {group: found for group in GROUPS if (found := of_kind(rows, group))}
    columns = [  # each is a family
        statistics.marked({rule: over_data(found, rule) for rule in NAMES})
        for found in chosen.values()
    ]
    heads = (f"{GROUPS[g][0]} ({len(found)} settings)" for g, found in chosen.items())
    means = report.markdown(
        ["rule", *heads],
        [
            [title, *(column[rule] for column in columns)]
            for rule, title in NAMES.items()
        ],
    )

    def wrong(row: Mapping[str, Any]) -> str:
        return f"{np.mean(row['wrong']):.0f} ({np.mean(row['estimated']):.0f})"

    def gain(rule: str) -> report.Cell:
        return lambda row: (
            f"{statistics.corrected(gains(row, rule), row['overlap']):+.1f}"
        )

    settings = report.table(
        rows,
        [
            ("data, batch", setting_title),
            ("wrong labels", lambda row: noise_title(row["noise"])),
            ("%, found %", wrong),
            ("plain", lambda row: f"{np.mean(row['rules']['plain']):.1f}"),
            *((head, gain(rule)) for rule, head in SHOWN.items()),
        ],
    )
    return {
        "choosing-noise": "\n\n".join((means, note(payload), source)),
        "choosing-noise-settings": f"{settings}\n\n{source}",
    }


def note(payload: Mapping[str, Any]) -> str:
    """What the table is of, and what averaging the weights does at the known level."""
    rows = payload["noise"]
    noisy = [row for row in rows if np.mean(row["wrong"]) > 0]
    batches = {
        "full batches": [row for row in noisy if row["batch"] is None],
        "mini-batches": [row for row in noisy if row["batch"] is not None],
    }
    averaged = " and ".join(
        f"{over_data(chosen, 'known_average', 'known'):+.1f} on {title}"
        for title, chosen in batches.items()
        if chosen
    )
    return (
        f"Points over plain training, {len({row['data'] for row in rows})} data sets, "
        f"{payload['protocol']['seeds']} seeds. **Bold**: ahead or behind, by Holm's "
        "steps over the rows of the column. Averaged less last weights, where labels "
        f"are wrong and the share is known: {averaged}."
    )


def setting_title(row: Mapping[str, Any]) -> str:
    return f"{report.title(row['data'])}, {row['batch'] or 'full'}"


def noise_title(noise: Mapping[str, Any]) -> str:
    if noise["kind"] == "teacher":
        return f"a teacher of {noise['taught']}"
    words = {"even": "", "class": " by class"}[noise["kind"]]
    return f"{noise['rate']:.0%}{words}" if noise["rate"] else "none"
