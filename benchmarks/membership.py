"""Asks what a membership attack with shadow models tells of a trained network.

Each of sixteen models of a method is trained on half of the candidates, so that each
candidate is in eight. The likelihood-ratio attack (Carlini et al. 2022) scores it by
what the other fifteen say of it. The first candidates are canaries: their labels are
wrong, so nothing but memory gives them.

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import report, statistics

METHODS = {
    "plain": "plain training",
    "early": "stopped after a third of the steps",
    "elr": "early-learning regularisation",
    "smoothing": "label smoothing",
    "decay": "weight decay",
    "relax": "RelaxLoss",
    "flood": "flooding",
    "band": "flooding in a band",
    "example": "flooding each example",
    "soft": "soft flooding (SoftAD's shape)",
}
OURS = ("flood", "band", "example", "soft")
BESIDE = {"relax": "less RelaxLoss", "early": "less stopping early"}


def row_of(payload: Mapping[str, Any], data: str, method: str) -> Mapping[str, Any]:
    return next(
        r for r in payload["rows"] if r["data"] == data and r["method"] == method
    )


def difference(
    payload: Mapping[str, Any], data: str, method: str, column: str, over: str = "plain"
) -> statistics.Effect:
    """Paired by draw, and widened for what the draws share."""
    one, other = (row_of(payload, data, name) for name in (method, over))
    return statistics.corrected(np.subtract(one[column], other[column]), one["overlap"])


COLUMNS = {
    "accuracy": "test accuracy, %",
    "canaries": "canaries found",
    "all": "of all found",
    "threshold_auc": "AUC of the loss alone",
}


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """By data: what the attack finds of each method, beside plain training."""
    names: list[str] = list(payload["protocol"]["settings"])
    verdicts = statistics.judged(
        {
            (d, m): difference(payload, d, m, "canaries")
            for d in names
            for m in METHODS
            if m != "plain"
        }
    )

    def cell(data: str, method: str, column: str) -> str:
        row = row_of(payload, data, method)
        one = statistics.corrected(row[column], row["overlap"])
        text = f"{one:.1f}" if column == "accuracy" else f"{one:.2f}"
        left_open = verdicts.get((data, method), statistics.OPEN) == statistics.OPEN
        return text if column != "canaries" or left_open else f"**{text}**"

    titles = {name: report.title(name) for name in names}
    columns = {
        (name, column): f"{titles[name]}: {head}"
        for name in names
        for column, head in COLUMNS.items()
    }
    body = report.markdown(
        ["method", *columns.values()],
        [
            [title, *(cell(name, method, column) for name, column in columns)]
            for method, title in METHODS.items()
        ],
    )
    text = (
        "Found: true positives at 1 % false positives. Bold: not as plain training, by "
        f"intervals over {payload['protocol']['draws']} draws and Holm's steps."
    )
    return {
        "membership": "\n\n".join((body, text, report.provenance(payload))),
        "membership-less": less_table(payload, titles),
    }


def less_table(payload: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """Canaries found by our forms less those found by two rivals."""
    effects = {
        (name, method, over): difference(payload, name, method, "canaries", over)
        for name in titles
        for method in OURS
        for over in BESIDE
    }
    cells = statistics.marked(effects, "+.2f")
    body = report.markdown(
        ["data", "canaries found", *BESIDE.values()],
        [
            [
                titles[name],
                METHODS[method],
                *(cells[name, method, over] for over in BESIDE),
            ]
            for name, method in dict.fromkeys(key[:2] for key in cells)
        ],
    )
    text = "Bold: told apart from 0 by Holm's steps over this table."
    return "\n\n".join((body, text, report.provenance(payload)))
