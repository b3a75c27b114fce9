# Copyright 2026 DeepMind Technologies Limited. All Rights Reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ==============================================================================
"""Flooding.

Implementation of
"Do We Need Zero Training Loss After Achieving Zero Training Error?"
(https://arxiv.org/abs/2002.08709) by Takashi Ishida, Ikko Yamane, Tomoya Sakai,
Gang Niu and Masashi Sugiyama.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax._src import base
from optax._src import numerics


class FloodState(NamedTuple):
  """State of the transformation returned by `scale_by_flood`: what to log."""

  count: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32, updates so far.
  below: jax.typing.ArrayLike  # shape=(), dtype=jnp.int32, below the level.
  level: jax.typing.ArrayLike  # shape=(), dtype=jnp.float32, the last one used.
  value: jax.typing.ArrayLike  # shape=(), dtype=jnp.float32, the last loss.


def scale_by_flood(
    level: base.ScalarOrSchedule,
) -> base.GradientTransformationExtraArgs:
  r"""Reverse the gradient while the loss is below a level.

  Flooding keeps the training loss from sinking below the level :math:`b`: it
  replaces the loss :math:`L` by :math:`|L - b| + b`, whose gradient is

  .. math::
    \nabla L \text{ where } L \geq b, \qquad -\nabla L \text{ where } L < b.

  This transformation applies the sign to a finished gradient, for training
  loops that own the loss function. Put it first in a chain: moments, clipping
  and weight decay then see the gradient of the flooded loss.

  Note that one needs to pass the loss of the whole batch to the update function
  using the keyword argument ``value``. :class:`optax.MultiSteps` around this
  transformation passes on the loss of the last micro-batch alone.

  Args:
    level: The level :math:`b`, a scalar, or a schedule from the number of
      updates to one. ``-jnp.inf`` switches flooding off.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` object. A NaN loss makes
    all updates NaN.

  Examples:
    >>> import optax
    >>> from optax import contrib
    >>> import jax
    >>> import jax.numpy as jnp
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> solver = optax.chain(contrib.scale_by_flood(5.0), optax.sgd(0.1))
    >>> params = jnp.array([1., 2., 3.])
    >>> print('Objective function: ', f(params))
    Objective function:  14.0
    >>> opt_state = solver.init(params)
    >>> for _ in range(5):
    ...  value, grad = jax.value_and_grad(f)(params)
    ...  updates, opt_state = solver.update(
    ...    grad, opt_state, params, value=value)
    ...  params = optax.apply_updates(params, updates)
    ...  print('Objective function: {:.2f}'.format(f(params)))
    Objective function: 8.96
    Objective function: 5.73
    Objective function: 3.67
    Objective function: 5.28
    Objective function: 3.38

  References:
    Ishida et al., `Do We Need Zero Training Loss After Achieving Zero Training
    Error? <https://arxiv.org/abs/2002.08709>`_, 2020
  """

  def init_fn(params: base.Params) -> FloodState:
    del params
    return FloodState(
        count=jnp.zeros([], jnp.int32),
        below=jnp.zeros([], jnp.int32),
        level=jnp.zeros([], jnp.float32),
        value=jnp.zeros([], jnp.float32),
    )

  def update_fn(
      updates: base.Updates,
      state: FloodState,
      params: base.Params | None = None,
      *,
      value: jax.typing.ArrayLike,
      **extra_args,
  ) -> tuple[base.Updates, FloodState]:
    del params, extra_args
    if jnp.shape(value):
      raise ValueError(
          '`value` must be the scalar loss of the whole batch, got shape'
          f' {jnp.shape(value)}.'
      )
    current = level(state.count) if callable(level) else level
    loss = jnp.asarray(value)
    # Compare in float32 at least, so that the level is not rounded to bfloat16.
    dtype = jnp.promote_types(loss.dtype, jnp.float32)
    loss, current = loss.astype(dtype), jnp.asarray(current, dtype)
    is_below = loss < current
    sign = jnp.where(is_below, -1.0, 1.0)
    off = current == -jnp.inf
    sign = jnp.where(jnp.isnan(loss) & ~off, jnp.nan, sign)
    updates = jax.tree.map(lambda u: sign.astype(u.dtype) * u, updates)
    return updates, FloodState(
        count=numerics.safe_increment(state.count),
        below=jnp.where(
            is_below, numerics.safe_increment(state.below), state.below
        ),
        level=current.astype(jnp.float32),
        value=loss.astype(jnp.float32),
    )

  # pyrefly: ignore[bad-argument-type]
  return base.GradientTransformationExtraArgs(init_fn, update_fn)
