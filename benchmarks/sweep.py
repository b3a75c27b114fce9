"""Measures 16 levels x 4 seeds: `flood_optax.sweep` beside the loops people write.

Finished: its record names the commit that holds its code, and the command.
"""

from typing import Any

from benchmarks import report


def tables(payload: dict[str, Any]) -> dict[str, str]:
    def count(row: dict[str, Any], name: str) -> str:
        return "-" if row[name] is None else str(row[name])

    rows = [
        [
            row["model"],
            row["rival"],
            f"{row['seconds_median']:.1f}",
            "{:.2f} ({:.2f} to {:.2f})".format(
                row["time_ratio_median"], *row["time_ratio_range"]
            ),
            "-" if row["steps_run"] is None else f"{row['steps_run']:,}",
            count(row, "traces"),
            count(row, "compilations"),
            f"{row['memory_mb']:.0f}",
        ]
        for row in payload["rows"]
    ]
    header = ["model", "rival", "seconds", "ratio (range)", "steps", "traces"]
    made = report.markdown([*header, "compilations", "memory, MB"], rows)
    return {"sweep": f"{made}\n\n{report.provenance(payload)}"}
