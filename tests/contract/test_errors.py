"""Bad levels and bands of every call, and what only flooding could mean."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import (
    flood,
    flood_loss,
    flood_mean,
    flooded,
    levels,
    scale_by_flood,
)

GRADS = jnp.array([1.0, 2.0])
LOSSES = jnp.array([0.1, 0.4, 0.2])


def update(value, transform=None, **extra_args):
    transform = transform or scale_by_flood(0.5)
    return transform.update(
        GRADS, transform.init(GRADS), GRADS, value=value, **extra_args
    )


LEVEL_TAKERS = {
    "flood_loss": lambda level: flood_loss(LOSSES, level),
    "flood_mean": lambda level: flood_mean(LOSSES, level),
    "flooded": lambda level: flooded(jnp.sum, level),
    "scale_by_flood": scale_by_flood,
    "flood": lambda level: flood(optax.sgd(0.1), level),
    "warmup": lambda level: levels.warmup(level, 3),
}
BAD_LEVELS = {
    "nan": (np.nan, ValueError, "must not be NaN, got nan."),
    "nan_array": (jnp.float32(np.nan), ValueError, "must not be NaN, got nan."),
    "inf": (np.inf, ValueError, "must not be +inf, got inf. To switch flooding off"),
    "text": ("0.1", TypeError, "must be a number or an array of numbers, got '0.1'"),
    "none": (None, TypeError, "must be a number or an array of numbers, got None"),
    "bool": (True, TypeError, "must be a number or an array of numbers, got True"),
    "complex": (jnp.array(1j), TypeError, "must be real, got dtype complex64."),
    "text_array": (np.array("0.1"), TypeError, "must be real, got <U3."),
}


@pytest.mark.parametrize("case", BAD_LEVELS)
@pytest.mark.parametrize("call", LEVEL_TAKERS)
def test_bad_level_is_refused_at_construction(call, case):
    level, error, message = BAD_LEVELS[case]
    with pytest.raises(error, match=re.escape(f"`{call}(level=...)` {message}")):
        LEVEL_TAKERS[call](level)


@pytest.mark.parametrize(
    "call", ["flood_mean", "flooded", "scale_by_flood", "flood", "warmup"]
)
def test_level_that_is_no_scalar_is_refused_where_one_loss_is_flooded(call):
    message = "must be a scalar where one loss is flooded, got shape (2,)."
    with pytest.raises(ValueError, match=re.escape(f"`{call}(level=...)` {message}")):
        LEVEL_TAKERS[call](jnp.array([0.1, 0.2]))


@pytest.mark.parametrize("level", [0, -3, -np.inf, np.float16(0.5), np.int32(2)])
@pytest.mark.parametrize("call", LEVEL_TAKERS)
def test_legal_levels_are_taken(call, level):
    LEVEL_TAKERS[call](level)


BANDS = {
    "scale_by_flood": lambda band: scale_by_flood(-0.5, band=band),
    "flood": lambda band: flood(optax.sgd(0.1), -0.5, band=band),
}
RULE = "must be non-negative and finite, got "
BAD_BANDS = {
    "negative": (-0.1, ValueError, RULE + "-0.1."),
    "negative_array": (jnp.int32(-2), ValueError, RULE + "-2."),
    "nan": (np.nan, ValueError, RULE + "nan."),
    "inf": (np.float16(np.inf), ValueError, RULE + "inf."),
    # flooding would be off without a word: the lower end is -inf
    "inf_in_float32": (1e39, ValueError, RULE + "1e+39."),
    "vector": (np.array([0.1]), ValueError, "must be a scalar, got shape (1,)."),
    "bool": (True, TypeError, "must be a real number, got True of type bool."),
    "bool_array": (np.True_, TypeError, "must be a real number, got dtype bool."),
    "text": ("0.1", TypeError, "must be a real number, got '0.1' of type str."),
    "complex": (jnp.array(1j), TypeError, "must be a real number, got dtype complex64"),
    "list": ([0.1], TypeError, "must be a real number, got [0.1] of type list."),
    "schedule": (lambda step: 0.1, TypeError, "must be a real number, got <function"),
}


@pytest.mark.parametrize("case", BAD_BANDS)
@pytest.mark.parametrize("call", BANDS)
def test_bad_band_is_refused_at_construction(call, case):
    band, error, message = BAD_BANDS[case]
    with pytest.raises(error, match=re.escape(f"`{call}(band=...)` {message}")):
        BANDS[call](band)


@pytest.mark.usefixtures("x64")
def test_band_that_float64_holds_is_taken_with_64_bits():
    for make in BANDS.values():
        make(1e39)


NEAR_MISSES = ["weights", "values", "losses", "level", "levels", "band", "every_k"]
FORMS = {
    "scale_by_flood()": scale_by_flood(0.5),
    "flood(inner)": flood(optax.sgd(0.1), 0.5, every_k=2),
}


@pytest.mark.parametrize("name", [*NEAR_MISSES, "axis_name"])
@pytest.mark.parametrize("form", FORMS)
def test_names_that_only_flooding_could_mean_are_refused_by_update(form, name):
    for inside in (FORMS[form], optax.chain(FORMS[form], optax.sgd(0.1))):
        message = f"`{form}.update({name}=...)` must not be given, got one, which would"
        with pytest.raises(TypeError, match=re.escape(message)):
            update(0.3, inside, **{name: 0.3})
        update(0.3, inside, **{name: None})  # as not given


def test_names_that_belong_to_others_in_the_chain_reach_them():
    seen = {}

    def other(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    names = {"loss": 0.25, "step": 7, "batch": LOSSES, "obj_fn": jnp.sum, "key": None}
    reader = optax.GradientTransformationExtraArgs(lambda _: (), other)
    update(0.3, optax.chain(scale_by_flood(0.5), reader), **names)
    assert seen == {"value": 0.3, **names}
    seen.clear()
    # what value_fn takes may have any name
    of_search = names | {"value_fn": jnp.sum, "weights": LOSSES, "level": 3}
    update(0.3, flood(reader, 0.2), **of_search)
    assert of_search.keys() <= seen.keys()
    assert seen["weights"] is LOSSES


def test_numpy_mask_without_losses_is_known_at_trace_time():
    with pytest.raises(ValueError, match="must leave at least one loss"):
        jax.jit(lambda x: flood_mean(x, 0.1, where=np.zeros(3, bool)))(LOSSES)


def test_traced_levels_are_not_validated():
    @jax.jit
    def run(level):
        return flooded(lambda w: w**2, level)(0.5), update(0.3, scale_by_flood(level))

    run(jnp.nan)
