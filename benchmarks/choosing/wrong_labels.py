"""The share of wrong labels that leave-one-out scores find, against the one put in."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import report


def spread(found: list[float], form: str = ".1f") -> str:
    """Mean and standard deviation over the draws, in per cent."""
    mean, sd = 100 * np.mean(found), 100 * np.std(found, ddof=1)
    return f"{mean:{form}} ({sd:.1f})"


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    rows, sizes = payload["wrong_labels"], payload["protocol"]["sizes"]
    shares = dict.fromkeys(row["flips"] for row in rows)
    found = {(row["data"], row["flips"]): spread(row["half"]) for row in rows}
    body = report.markdown(
        ["data (examples)", *(f"{share:.0%}" for share in shares)],
        [
            [f"{report.title(d)} ({size})", *(found[d, share] for share in shares)]
            for d, size in sizes.items()
        ],
    )
    text = (
        "Share of wrong labels put in (head) and found, in per cent: mean and, in "
        f"brackets, standard deviation over {payload['protocol']['draws']} draws. "
        f"A quarter of {payload['protocol']['whole']} digits gives "
        f"{spread(payload['subset']['difference'], '+.1f')} points more than all. Of a "
        f"weak annotator's labels {spread(payload['annotator']['wrong'])} are wrong, "
        f"and {spread(payload['annotator']['half'])} are found."
    )
    return {
        "choosing-wrong-labels": "\n\n".join((body, text, report.provenance(payload)))
    }
