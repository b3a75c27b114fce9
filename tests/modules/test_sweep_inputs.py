"""What a sweep is given: states, and batches of one part and of many."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import sweep
from tests.modules.test_forked import TOY_STATE, descent, toy_batches, toy_step


def test_forked_state_may_hold_keys_weak_types_and_integers():
    def step(state, x, level):
        w, metrics = descent(state["w"], x, level)
        key = jax.random.split(state["key"])[0]
        draw = jax.random.uniform(key)
        return {"w": w, "key": key, "n": state["n"] + 1}, {**metrics, "draw": draw}

    state = {"w": 1.0, "key": jax.random.key(0), "n": 0}
    rates = jnp.full(20, 1 / 16, jnp.bfloat16)  # a weak 1.0 would become bfloat16
    result = sweep.forked(step, state, rates, [0.5, 0.0])
    np.testing.assert_array_equal(*result.metrics["draw"])
    assert result.metrics["loss"].dtype == np.float32
    assert result.metrics["loss"][0].min() == 0.4375


def mean_step(w, batch, level):
    return toy_step(w, jnp.stack([*batch]).mean(), level)


def pair_step(w, batch, level):
    x, y = batch
    return toy_step(w, (x * y).mean(), level)


LISTED = [jnp.full(4, x) for x in (0.5, 0.75, 1.0, 1.25)]  # batches of four examples
PAIRS = [(x, x + 1) for x in LISTED]
BATCHES = {
    "list of pairs": (pair_step, PAIRS, "list of 4"),
    "tuple": (mean_step, tuple(LISTED), "tuple of 4, each"),
    "tuple of pairs": (pair_step, tuple(PAIRS[:2]), "tuple of 2, each"),
    "lists in a dict": (
        lambda w, x, b: toy_step(w, x["x"].mean(), b),
        {"x": LISTED},
        "list of 4",
    ),
}


@pytest.mark.parametrize("case", BATCHES)
def test_forked_batches_that_are_not_stacked_are_refused_and_stacked_are_taken(case):
    step, batches, message = BATCHES[case]
    match = rf"got a {message}.*`jax.tree.map\(lambda \*b: jnp.stack\(b\), \*batches\)`"
    with pytest.raises(TypeError, match=match):
        sweep.forked(step, TOY_STATE, batches, [0.0, 0.3])
    if case == "lists in a dict":
        batches = [{"x": x} for x in batches["x"]]
    stacked = jax.tree.map(lambda *b: jnp.stack(b), *batches)
    losses = sweep.forked(step, TOY_STATE, stacked, [0.0, 0.3]).metrics["loss"]
    w = TOY_STATE
    for t, batch in enumerate(batches):
        w, metrics = step(w, batch, 0.3)
        np.testing.assert_allclose(losses[1, t], metrics["loss"], rtol=1e-5)


def indexed(w, batch, level):
    return toy_step(w, (batch[0] * batch[1]).mean(), level)


COLUMN, ONE = toy_batches(9)[:, None], jnp.ones((9, 1))
TWICE = jnp.repeat(COLUMN, 2, axis=1)
# alike or not, and though a step that takes them by number would take one alone
PARTS = {
    "alike": (TWICE, jnp.ones((9, 2))),
    "unlike": (TWICE, jnp.ones((9, 1), jnp.int32)),
}
MANY_PARTS = (COLUMN, ONE, jnp.zeros(9), jnp.zeros((9, 2)))


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        *((step, parts) for step in (pair_step, indexed) for parts in PARTS),
        (indexed, "many"),
    ],
)
def test_forked_tuple_of_arrays_is_one_batch_a_step_of_many_parts(step, parts):
    given = MANY_PARTS if parts == "many" else PARTS[parts]
    result = sweep.forked(step, TOY_STATE, given, [0.0, 0.3])
    expected = sweep.forked(toy_step, TOY_STATE, toy_batches(9), [0.0, 0.3])
    chex.assert_trees_all_close(result.metrics, expected.metrics, rtol=1e-5)
