"""What to log of a flooded run, read from its state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flood_optax.checks import check_that
from flood_optax.transform import FloodState


def metrics(state: Any) -> dict[str, jax.Array]:
    """What to log, found anywhere in a state.

    The four numbers are those of the last step, or of the last window under
    ``every_k``. Before the first one all are 0.

    Args:
      state: an optimizer state with a FloodState in it, as of
        `flood_optax.scale_by_flood` or `flood_optax.flood`, or a tree that holds one,
        such as a TrainState, an ``nnx.Optimizer`` or a restored checkpoint. It may be
        called under `jax.jit`.

    Returns:
      A dictionary of scalars:

      * ``"flood/loss"``, float32, the raw loss;
      * ``"flood/level"``, float32, the level that it met, an end of the band if there
        is one;
      * ``"flood/share_below"``, float32 in [0, 1], the share of all steps so far whose
        loss was strictly below the level;
      * ``"flood/steps"``, int32, how many steps that is.

    Raises:
      ValueError: if there is no FloodState in it, or more than one.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flood_optax import metrics, scale_by_flood
      >>> optimizer = optax.chain(scale_by_flood(0.5), optax.sgd(0.1))
      >>> w = jnp.array([1.0, -2.0])
      >>> state = optimizer.init(w)
      >>> for loss in (0.7, 0.45, 0.6, 0.55):
      ...     updates, state = optimizer.update(w, state, w, value=loss)
      >>> for name, number in metrics(state).items():
      ...     print(name, number)
      flood/loss 0.55
      flood/level 0.5
      flood/share_below 0.25
      flood/steps 4
    """
    found = optax.tree.get_all_with_path(state, "flood_step")
    places = ", ".join(jax.tree_util.keystr(path[:-1]) for path, _ in found)
    none = "none: with the loss form log `flooded(..., return_info=True)`"
    got = f"{len(found)}: {places}. Call it on each, `metrics(part)`" if found else none
    check_that(len(found) == 1, "metrics(state)", "hold one FloodState", got)
    fields = (optax.tree.get(state, name) for name in FloodState._fields)
    # a leaf may be in a box, such as a variable of NNX
    step, level, value, below = (
        jnp.asarray(*jax.tree.leaves(field)) for field in fields
    )
    return {
        "flood/loss": value,
        "flood/level": level,
        "flood/share_below": below / jnp.maximum(step, 1),  # of no steps 0, not NaN
        "flood/steps": step,
    }
