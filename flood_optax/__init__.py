"""Flooding for JAX: keep the training loss from sinking below a level.

Wrap the loss before `jax.grad` with `flooded`, or put `scale_by_flood` first in an
`optax.chain`; both give the same gradient of one batch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from flood_optax import objective, shapes
from flood_optax.average import AverageState, average_params, averaged
from flood_optax.checks import FloodWarning
from flood_optax.logs import metrics
from flood_optax.objective import FloodInfo, flood_loss, flood_mean, flooded
from flood_optax.shapes import Shape
from flood_optax.transform import FloodState, scale_by_flood
from flood_optax.wrapper import FloodWindow, FloodWrapperState, flood

if TYPE_CHECKING:
    from flood_optax import levels, penalty, sharpness, sweep

__version__ = "0.1.0"

__all__ = [
    "AverageState",
    "FloodInfo",
    "FloodState",
    "FloodWarning",
    "FloodWindow",
    "FloodWrapperState",
    "Shape",
    "average_params",
    "averaged",
    "flood",
    "flood_loss",
    "flood_mean",
    "flooded",
    "levels",
    "metrics",
    "objective",
    "penalty",
    "scale_by_flood",
    "shapes",
    "sharpness",
    "sweep",
]


def __getattr__(name: str) -> Any:
    # No training step needs these, and half of the time to import is theirs.
    if name in {"levels", "penalty", "sharpness", "sweep"}:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
