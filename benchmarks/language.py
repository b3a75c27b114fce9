"""Trains a language model on padded text in unequal parts: is it the large batch?

Finished: its record names the commit that holds its code, and the command.
"""

from collections.abc import Mapping
from typing import Any

from benchmarks import report


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """The generated table of docs/evidence/language.md."""
    shown = [
        {**row, "signs": "-" if signs is None else f"{signs} of {row['steps']}"}
        for row in payload["rows"]
        for signs in [row["wrong_signs"]]
    ]
    made = report.table(
        shown,
        {
            "a window of eight unequal parts": "{form}",
            "largest distance to the large batch's loss curve": "{distance:.1e}",
            "steps with the wrong sign": "{signs}",
            "mean loss of the last quarter": "{last_losses:.3f}",
        },
    )
    return {"language": f"{made}\n\n{report.provenance(payload)}"}
