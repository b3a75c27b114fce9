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
"""Specific tests for flooding, see `common_test.py` for usual unit-tests."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
from optax._src import alias
from optax._src import combine
from optax._src import test_utils
from optax._src import update
from optax.contrib import _flood
import optax.tree

_LEVEL = 0.4


def _loss(params):
  return jnp.mean((params - jnp.array([0.3, -1.2, 0.8])) ** 2)


def _flooded_loss(params):
  return jnp.abs(_loss(params) - _LEVEL) + _LEVEL


class FloodTest(parameterized.TestCase):

  @parameterized.parameters(0.5, 0.9)
  def test_equals_adam_on_the_flooded_loss(self, learning_rate):
    adam = alias.adam(learning_rate)
    flooded = combine.chain(_flood.scale_by_flood(_LEVEL), adam)
    params = by_loss = jnp.array([2.0, 1.0, -1.0])
    state, state_by_loss = flooded.init(params), adam.init(params)
    losses = []
    for _ in range(40):
      value, grads = jax.value_and_grad(_loss)(params)
      losses.append(float(value))
      updates, state = flooded.update(grads, state, params, value=value)
      params = update.apply_updates(params, updates)
      grads = jax.grad(_flooded_loss)(by_loss)
      updates, state_by_loss = adam.update(grads, state_by_loss, by_loss)
      by_loss = update.apply_updates(by_loss, updates)
      test_utils.assert_trees_all_close(params, by_loss, rtol=1e-6)
    below = sum(loss < _LEVEL for loss in losses)
    self.assertBetween(below, 5, 35)
    self.assertEqual(optax.tree.get(state, 'below'), below)

  @parameterized.parameters(
      (0.7, 0.5, 1.0),
      (0.5, 0.5, 1.0),  # A tie descends, as the gradient of jnp.abs does.
      (0.3, 0.5, -1.0),
      (jnp.inf, 0.5, 1.0),
      (jnp.nan, 0.5, jnp.nan),
      (jnp.nan, -jnp.inf, 1.0),
      (0.3, lambda count: 0.5 + count, -1.0),
  )
  def test_sign(self, value, level, sign):
    flood = _flood.scale_by_flood(level)
    grads = {'a': jnp.array([1.0, -2.0]), 'b': None}
    updates, state = flood.update(grads, flood.init(grads), value=value)
    np.testing.assert_array_equal(updates['a'], sign * grads['a'])
    np.testing.assert_array_equal(state.value, np.float32(value))

  def test_bfloat16_updates_keep_their_dtype_and_the_level_its_digits(self):
    flood = _flood.scale_by_flood(0.5004883)  # Rounds to 0.5 in bfloat16.
    grads = jnp.ones(2, jnp.bfloat16)
    updates, _ = flood.update(
        grads, flood.init(grads), value=jnp.bfloat16(0.5)
    )
    test_utils.assert_trees_all_equal(updates, -grads)

  def test_loss_per_example_is_refused(self):
    flood = _flood.scale_by_flood(_LEVEL)
    with self.assertRaisesRegex(ValueError, 'scalar loss of the whole batch'):
      flood.update(jnp.ones(2), flood.init(jnp.ones(2)), value=jnp.ones(3))


if __name__ == '__main__':
  absltest.main()
