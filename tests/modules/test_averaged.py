"""What averaged finds in a state, and which parameters it is given for."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flood_optax import average_params, averaged, scale_by_flood
from flood_optax.flax import TrainState
from tests.modules.test_average import (
    LEVEL,
    PARAMS,
    VALUES,
    assert_average,
    chain,
    expected,
    gradients,
    run,
)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_averaged_outlives_a_donated_state():
    averaging = optax.masked(average_params(0.9), {"w": True, "b": False})
    optimizer = optax.chain(scale_by_flood(LEVEL), optax.sgd(0.1), averaging)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = optimizer.update(params, state, params, value=0.1)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    for begin in (optimizer.init, jax.jit(optimizer.init)):
        state = begin(params)
        held = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
        assert len(set(held)) == len(held)
    for _ in range(3):
        kept = averaged(state, params)
        wanted = float64(kept)
        params, state = step(params, state)
        chex.assert_trees_all_equal(float64(kept), wanted)


def test_averaged_finds_the_average_in_a_train_state_and_under_jit():
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=chain())
    visited = []
    for i in range(4):
        state = state.apply_gradients(grads=gradients(i), value=VALUES[i])
        visited.append(state.params)
    got = jax.jit(lambda state: averaged(state, state.params))(state)
    assert_average(got, expected(visited, 0.9))


def test_averaged_of_an_nnx_optimizer_is_a_state_of_the_model():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    trainer = nnx.Optimizer(model, chain(), wrt=nnx.Param)
    x = jnp.array([[1.0, 2.0, -1.0], [0.5, 0.0, 1.0]])

    @nnx.jit
    def step(model, trainer):
        value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
        trainer.update(model, grads, value=value)

    visited = []
    for _ in range(12):
        step(model, trainer)
        visited.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    average = averaged(trainer.opt_state, nnx.state(model, nnx.Param))
    best = nnx.clone(model)
    nnx.update(best, average)
    assert_average(nnx.to_pure_dict(nnx.state(best, nnx.Param)), expected(visited, 0.9))


def test_two_averages_of_one_parameter_are_refused_and_the_remedy_works():
    optimizer = optax.chain(optax.sgd(0.1), average_params(0.5), average_params(0.9))
    state, visited = run(optimizer)
    message = "params['b'][0], got 2: [1]AverageState.flood_average, [2]"
    with pytest.raises(ValueError, match=re.escape(message)):
        averaged(state, visited[-1])
    for part, decay in ((state[1], 0.5), (state[2], 0.9)):
        assert_average(averaged(part, visited[-1]), expected(visited, decay))
