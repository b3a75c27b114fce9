"""How `sweep.run` calls what it trains, and the notes of its errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import sweep

LEVELS = (0.0, 0.2, -np.inf, 0.7)
KEYS = jax.random.split(jax.random.key(0), 3)


def train(level, key, steps=30):
    w = jax.random.uniform(key) * level
    return {"losses": jnp.full(steps, w)}


def test_run_branch_on_the_level_gets_a_note():
    def shaped_by_level(level, key):
        return {"a": jnp.zeros(3 if level > 0.5 else 2)}

    error = jax.errors.TracerBoolConversionError
    with pytest.raises(error, match="Attempted boolean conversion") as caught:
        sweep.run(shaped_by_level, LEVELS, KEYS)
    notes = "".join(caught.value.__notes__)
    assert "`sweep.run(train)` must be traceable: it is traced once" in notes


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (lambda b, k: {"x": float(b)}, "must be traceable.*instead of `float.level.`"),
        (lambda k, b: {"x": jax.random.uniform(k) * b}, r"called with \(level, key\)"),
    ],
    ids=["float", "swapped without names"],
)
def test_run_error_of_train_has_a_note_that_says_how_it_is_called(function, note):
    with pytest.raises(Exception, match=r"concrete value|PRNG key") as caught:
        sweep.run(function, LEVELS, KEYS)
    assert re.search(note, " ".join(caught.value.__notes__))


def test_run_train_may_have_more_arguments_that_need_not_be_given():
    bound = functools.partial(train, steps=4)
    for function in (train, bound, jax.jit(bound), lambda *runs: train(*runs)):
        assert len(sweep.run(function, LEVELS, KEYS).metrics["losses"]) == 4


@pytest.mark.parametrize("seeds", [[0, 1, 2], (3, 5), np.arange(2)], ids=str)
def test_run_takes_the_keys_that_the_refusal_of_seeds_names(seeds):
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    draws = sweep.run(lambda b, k: {"x": jax.random.uniform(k)}, [0.1], keys).metrics
    alone = [jax.random.uniform(jax.random.key(int(seed))) for seed in seeds]
    np.testing.assert_array_equal(draws["x"][0], np.stack(alone))
