"""Flax's TrainState, handing the loss to the optimizer."""

import dataclasses
import functools
from typing import Any

import optax

try:
    from flax.training import train_state
except ImportError as error:
    raise ImportError(
        "`flood_optax.flax` needs flax: pip install 'flood_optax[flax]'."
    ) from error


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` whose optimizer sees the loss.

    Flax's own passes every extra keyword of ``apply_gradients`` to ``replace``, so
    ``value=`` cannot reach the optimizer. Here keywords that name a field of the state
    replace it as before, and all others are extra arguments of ``tx.update``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flood_optax
      >>> from flood_optax.flax import TrainState
      >>> def loss_fn(params):
      ...     return (params["w"] - 2.0) ** 2
      >>> state = TrainState.create(
      ...     apply_fn=None,
      ...     params={"w": jnp.array(1.5)},
      ...     tx=optax.chain(flood_optax.scale_by_flood(0.5), optax.sgd(0.1)),
      ... )
      >>> value, grads = jax.value_and_grad(loss_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, value=value)
      >>> print(f"{state.params['w']:.4f}")
      1.4000
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
        """Updates params and optimizer state.

        Args:
          grads: gradients, a tree like ``params``.
          **kwargs: fields to replace, and extra arguments of ``tx.update`` such as
            ``value``, the raw loss of the whole batch, or ``weight``.

        Returns:
          The state after one step.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        extra = {name: arg for name, arg in kwargs.items() if name not in fields}
        replaced = {name: arg for name, arg in kwargs.items() if name in fields}
        update = functools.partial(self.tx.update, **extra)
        # built, not replaced: `optax.MultiSteps` is no named tuple
        forwarding = optax.GradientTransformationExtraArgs(self.tx.init, update)
        state = self.replace(tx=forwarding)
        stepped = super(TrainState, state).apply_gradients(grads=grads, **replaced)
        return stepped.replace(tx=self.tx)
