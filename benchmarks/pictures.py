"""A figure that needs no window."""

from typing import Any

from matplotlib.figure import Figure


def panels(
    rows: int, columns: int, *, size: tuple[float, float] | None = None, **shared: Any
) -> tuple[Any, Any]:
    """A figure and its axes in reading order."""
    size = size or (4 * columns, 3.2 * rows)
    figure: Any = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).ravel()
