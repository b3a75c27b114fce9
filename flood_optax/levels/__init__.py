"""Where levels come from: schedules, validation, held-out models, targets, noise."""

from flood_optax.levels.accordance import gradient_accordance
from flood_optax.levels.folds import adaflood, held_out, held_out_losses
from flood_optax.levels.left_out import leave_one_out
from flood_optax.levels.noise import noise_floor, noise_matrix, noise_rate
from flood_optax.levels.schedules import warmup
from flood_optax.levels.targets import entropy_floor, wavebound
from flood_optax.levels.validation import at_best

__all__ = [
    "adaflood",
    "at_best",
    "entropy_floor",
    "gradient_accordance",
    "held_out",
    "held_out_losses",
    "leave_one_out",
    "noise_floor",
    "noise_matrix",
    "noise_rate",
    "warmup",
    "wavebound",
]
