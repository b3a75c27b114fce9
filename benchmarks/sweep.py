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
            count(row, "traces"),
            count(row, "compilations"),
            f"{row['memory_mb']:.0f}",
        ]
        for row in payload["rows"]
    ]
    header = ["model", "rival", "seconds", "ratio (range)", "traces", "compilations"]
    source = report.provenance(payload)
    return {"sweep": f"{report.markdown([*header, 'memory, MB'], rows)}\n\n{source}"}
