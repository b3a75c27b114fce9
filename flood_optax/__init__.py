"""Flooding for JAX: keep the training loss from sinking below a level.

Wrap the loss before `jax.grad` with `flooded`, or put `scale_by_flood` first in an
`optax.chain`; both give the same gradient of one batch.
"""

from flood_optax import levels, objective, penalty, shapes, sharpness, sweep
from flood_optax.average import AverageState, average_params, averaged
from flood_optax.checks import FloodWarning
from flood_optax.logs import metrics
from flood_optax.objective import FloodInfo, flood_loss, flood_mean, flooded
from flood_optax.shapes import Shape
from flood_optax.transform import FloodState, scale_by_flood
from flood_optax.wrapper import FloodWindow, FloodWrapperState, flood

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
