"""What `sweep.run` and `sweep.forked` refuse, and that what they advise works."""

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


# --- run: errors ----------------------------------------------------------------------

METRICS_ERRORS = {
    "no dict": (
        lambda level, key: level,
        TypeError,
        "as a dict of arrays, got .*Tracer",
    ),
    "nothing": (
        lambda level, key: None,
        TypeError,
        "as a dict of arrays, got NoneType",
    ),
    "empty": (lambda level, key: {}, TypeError, "one metric at least"),
    "name": (lambda level, key: {1: level}, TypeError, "by strings, got 1"),
    "nested": (
        lambda level, key: {"a": {"b": level}},
        TypeError,
        "that are arrays, got 'a' of type dict",
    ),
    "text": (lambda level, key: {"a": "x"}, TypeError, "got 'a' of type str"),
    "complex": (
        lambda level, key: {"a": level * 1j},
        TypeError,
        "real numbers, got 'a' of dtype complex64",
    ),
    "key": (lambda level, key: {"a": key}, TypeError, "got 'a' of dtype key<fry>"),
}


@pytest.mark.parametrize("case", METRICS_ERRORS)
def test_run_refuses_what_is_no_dict_of_metrics(case):
    function, error, message = METRICS_ERRORS[case]
    with pytest.raises(error, match=r"`sweep.run\(train\)` must .*" + message):
        sweep.run(function, LEVELS, KEYS)


def test_run_branch_on_the_level_gets_a_note():
    def shaped_by_level(level, key):
        return {"a": jnp.zeros(3 if level > 0.5 else 2)}

    error = jax.errors.TracerBoolConversionError
    with pytest.raises(error, match="Attempted boolean conversion") as caught:
        sweep.run(shaped_by_level, LEVELS, KEYS)
    notes = "".join(caught.value.__notes__)
    assert "`sweep.run(train)` must be traceable: it is traced once" in notes


CALL_ERRORS = {
    "swapped": (lambda key, level: {}, r"called with \(level, key\), got .*key, level"),
    "one": (lambda level: {}, r"called with \(level, key\), got one of \(level\)"),
    "three": (lambda level, key, x: {}, r"\(level, key\), got one of \(level, key, x"),
    "no function": (None, "must be callable, got NoneType"),
}


@pytest.mark.parametrize("case", CALL_ERRORS)
def test_run_train_of_other_arguments_is_refused(case):
    function, message = CALL_ERRORS[case]
    with pytest.raises(TypeError, match=r"`sweep.run\(train\)` .*" + message):
        sweep.run(function, LEVELS, KEYS)


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


LEVEL_ERRORS = {
    "scalar": (0.5, ValueError, r"shape \[levels\] .* got shape \(\)"),
    "matrix": ([[0.1, 0.2]], ValueError, r"got shape \(1, 2\)"),
    "ragged": ([0.1, [0.2]], ValueError, "got a ragged list"),
    "empty": ([], ValueError, r"got shape \(0,\)"),
    "nan": ([0.1, np.nan], ValueError, "must not be NaN"),
    "inf": ([0.1, np.inf], ValueError, r"must not be \+inf"),
    "twice": ([0.1, 0.2, 0.1], ValueError, r"distinct in float32, got 0.1"),
    "twice in float32": ([0.1, 0.1 + 1e-12], ValueError, "distinct in float32"),
    "text": (["a"], TypeError, "must be real numbers, got dtype <U1"),
    "bool": ([True, False], TypeError, "must be real numbers, got dtype bool"),
    "none": ([0.1, None], TypeError, "must be real numbers, got dtype object"),
}


@pytest.mark.parametrize("case", LEVEL_ERRORS)
@pytest.mark.parametrize("call", ["run", "forked"])
def test_levels_that_are_none_are_refused(case, call):
    levels, error, message = LEVEL_ERRORS[case]
    calls = {
        "run": lambda: sweep.run(train, levels, KEYS),
        "forked": lambda: sweep.forked(None, jnp.ones(2), jnp.ones(3), levels),
    }
    with pytest.raises(error, match=rf"`sweep.{call}\(levels\)` .*{message}"):
        calls[call]()


KEY_ERRORS = {
    "twice": (jnp.stack([KEYS[0], KEYS[1], KEYS[0]]), ValueError, "3 keys of which 2"),
    "one": (KEYS[0], ValueError, r"got shape \(\)"),
    "one raw": (jax.random.key_data(KEYS[0]), ValueError, r"got shape \(2,\)"),
    "none": (KEYS[:0], ValueError, r"got shape \(0,\)"),
    "seeds": (np.arange(3), TypeError, r"jax.vmap\(jax.random.key\)\(jnp.array"),
    "listed seeds": (
        [0, 1],
        TypeError,
        r"got list .*random.key\)\(jnp.array\(seeds\)\)",
    ),
    "int": (0, TypeError, "got int of dtype None"),
}


@pytest.mark.parametrize("case", KEY_ERRORS)
def test_run_keys_that_are_none_are_refused(case):
    keys, error, message = KEY_ERRORS[case]
    with pytest.raises(error, match=rf"`sweep.run\(keys\)` must .*{message}"):
        sweep.run(train, LEVELS, keys)


@pytest.mark.parametrize("seeds", [[0, 1, 2], (3, 5), np.arange(2)], ids=str)
def test_run_takes_the_keys_that_the_refusal_of_seeds_names(seeds):
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    draws = sweep.run(lambda b, k: {"x": jax.random.uniform(k)}, [0.1], keys).metrics
    alone = [jax.random.uniform(jax.random.key(int(seed))) for seed in seeds]
    np.testing.assert_array_equal(draws["x"][0], np.stack(alone))


OPTION_ERRORS = {
    "strategy": ({"strategy": "pmap"}, ValueError, "\"shard\", got 'pmap'"),
    "mesh": (
        {"mesh": jax.sharding.Mesh(np.array(jax.devices()[:1]), ("a",))},
        ValueError,
        'needs strategy="shard"',
    ),
    "chunk": ({"chunk_size": 0}, ValueError, "must be at least 1, got 0"),
    "chunk type": ({"chunk_size": 1.5}, TypeError, "must be a static int, got 1.5"),
}


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_run_options_that_are_wrong_are_refused(case):
    options, error, message = OPTION_ERRORS[case]
    (name,) = options
    with pytest.raises(error, match=rf"`sweep.run\({name}=...\)` .*{message}"):
        sweep.run(train, LEVELS, KEYS, **options)


# --- forked: errors -------------------------------------------------------------------

STEP_ERRORS = {
    "two": (
        lambda w, x: (w, {}),
        r"is called with \(state, batch, level\), got one of",
    ),
    "swapped": (lambda state, level, batch: (state, {}), r"got one of \(state, level"),
    "no pair": (lambda w, x, b: w, "must return .state, metrics., got .*Tracer"),
    "no dict": (lambda w, x, b: (w, w), "as a dict of arrays"),
    "no loss": (lambda w, x, b: (w, {"cost": w}), "the metric 'loss', got 'cost'"),
    "vector": (lambda w, x, b: (w, {"loss": w[None]}), r"scalar, got shape \(1,\)"),
    "integer": (lambda w, x, b: (w, {"loss": 1}), "real float dtype, got int32"),
    "tree": (lambda w, x, b: ((w, w), {"loss": w}), "structure of the state"),
    "shape": (
        lambda w, x, b: (w[None], {"loss": w}),
        r"shapes and dtypes of the state, got float32\[1\] from float32\[\]",
    ),
    "dtype": (
        lambda w, x, b: (w.astype(jnp.float16), {"loss": w}),
        r"got float16\[\] from float32\[\]",
    ),
}


@pytest.mark.parametrize("case", STEP_ERRORS)
def test_forked_step_that_returns_something_else_is_refused(case):
    step, message = STEP_ERRORS[case]
    error = ValueError if case == "vector" else TypeError
    with pytest.raises(error, match=r"`sweep.forked\(step\).*" + message):
        sweep.forked(step, jnp.float32(1), jnp.ones(3), [0.0, 0.1])


@pytest.mark.parametrize(
    "batches",
    [(), jnp.float32(1), (jnp.zeros(3), jnp.zeros((4, 2))), jnp.zeros((0, 2))],
    ids=["none", "scalar", "uneven", "empty"],
)
def test_forked_batches_without_one_leading_axis_are_refused(batches):
    with pytest.raises(ValueError, match=r"`sweep.forked\(batches\)` must have one"):
        sweep.forked(None, jnp.float32(1), batches, [0.0, 0.1])
