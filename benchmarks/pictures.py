"""Figures that need no window and are legible on a page, light or dark, wide or narrow.

The ground is transparent, so every colour stands on white and on the dark grey of a
page at night: ink and lines are of middling lightness. A figure that is 6 inches wide
has letters of 9 pixels on a phone.
"""

import io
import pathlib
import re
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.figure import Figure

# Of Okabe and Ito's colours those with a contrast of 3 at least to both grounds.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, FAINT = "#757575", "#A0A0A0"  # letters and axes; what stands behind
INCHES = 6.0  # wide

mpl.rcParams.update(
    {
        "font.size": 11,
        "axes.titlesize": 11,
        "legend.fontsize": 11,
        "legend.frameon": False,
        "axes.prop_cycle": cycler(color=[BLUE, RED, GREEN, PINK]),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "svg.hashsalt": "flood_optax",  # the same figure gives the same file
        **dict.fromkeys(
            [
                "text.color",
                "axes.edgecolor",
                "axes.labelcolor",
                "axes.titlecolor",
                "xtick.color",
                "ytick.color",
                "grid.color",
            ],
            INK,
        ),
    }
)


class Picture(Figure):
    """A figure that is written as SVG, the same each time."""

    def write(self, path: pathlib.Path) -> None:
        """Paths to a hundredth of a point."""
        text = io.StringIO()
        self.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        fewer = lambda path: re.sub(r"(\d\.\d\d)\d+", r"\1", path[0])
        short = re.sub(r' d="[^"]*"', fewer, text.getvalue())
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = re.sub(r" +$", "", short, flags=re.MULTILINE)
        path.write_text(lines, encoding="utf-8")


def panels(
    rows: int, columns: int, *, size: tuple[float, float] | None = None, **shared: Any
) -> tuple[Any, Any]:
    """A figure and its axes in reading order."""
    size = size or (INCHES, 2.8 * rows)
    figure: Any = Picture(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).ravel()


def say(
    axis: Any, text: str, at: tuple[Any, Any], by: Any = (5, 0), **style: Any
) -> None:
    """Writes beside a point, `by` so many points away: in place of a legend."""
    given: dict[str, Any] = {"color": INK, "va": "center", **style}
    axis.annotate(text, at, by, textcoords="offset points", **given)
