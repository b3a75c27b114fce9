"""Bad input: each message once, at the earliest moment. The text is API."""

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
    shapes,
)

GRADS = jnp.array([1.0, 2.0])
LOSSES = jnp.array([0.1, 0.4, 0.2])


def update(value, transform=None, **extra_args):
    transform = transform or scale_by_flood(0.5)
    return transform.update(
        GRADS, transform.init(GRADS), GRADS, value=value, **extra_args
    )


def segments(**changes):
    arguments = {"segment_ids": jnp.array([0, 1, 1]), "num_segments": 2} | changes
    return flood_mean(LOSSES, 0.1, over="segment", **arguments)


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


CASES = {
    "value_missing": (
        lambda: update(None),
        ValueError,
        "`scale_by_flood().update(value=...)` needs the current loss, got None: pass "
        "`optimizer.update(grads, state, params, value=loss)`. "
        "`optax.chain(optax.MultiSteps(...))`, `optax.lookahead` and flax's own "
        "`TrainState.apply_gradients` drop extra arguments; where the loss cannot be "
        "passed, flood the loss instead: `flood_optax.flooded(loss_fn, level)`.",
    ),
    "value_vector": (
        lambda: update(jnp.ones(1)),
        ValueError,
        "`scale_by_flood().update(value=...)` must be a scalar, got shape (1,). "
        "Pass the mean over the batch",
    ),
    "value_tuple": (
        lambda: update((jnp.ones([]), "aux")),
        TypeError,
        "`scale_by_flood().update(value=...)` must be the loss alone, got a tuple of "
        "2: pass the loss without aux",
    ),
    "value_integer": (
        lambda: update(jnp.int32(1)),
        TypeError,
        "`scale_by_flood().update(value=...)` must be of a real float dtype, got int32",
    ),
    "value_complex": (
        lambda: update(jnp.array(1j)),
        TypeError,
        "must be of a real float dtype, got complex64",
    ),
    "value_text": (
        lambda: update("0.3"),
        TypeError,
        "must be an array of real floats, got str.",
    ),
    "value_function": (
        lambda: update(jnp.sum),
        TypeError,
        "must be an array of real floats, got function. Call it, and pass the result "
        "of `sum(...)`.",
    ),
    "value_dict": (
        lambda: update({"actor": 0.3, "critic": 0.4}),
        TypeError,
        "must be an array of real floats, got dict. One optimizer floods one loss: "
        "docs/traps.md, Two losses.",
    ),
    "value_positional": (
        lambda: scale_by_flood(0.5).update(
            GRADS, scale_by_flood(0.5).init(GRADS), jnp.float32(0.3)
        ),
        ValueError,
        "got None, and a scalar, perhaps the loss, in the place of params: pass "
        "`optimizer.update(grads, state, params, value=loss)`.",
    ),
    "axis_unmapped": (
        lambda: update(0.3, scale_by_flood(0.5, axis_name="data")),
        ValueError,
        "`scale_by_flood()` with axis_name='data' must be called inside "
        "`jax.shard_map` or `jax.pmap` over that axis, got none that is mapped here. "
        "Under `jax.jit` with sharded data leave axis_name out.",
    ),
    "axes_unmapped": (
        lambda: update(
            0.3, flood(optax.sgd(0.1), 0.5, axis_name=("a", "b")), weight=2.0
        ),
        ValueError,
        "`flood(inner)` with axis_name=('a', 'b') must be called inside",
    ),
    "level_schedule_of_a_loss": (
        lambda: flood_loss(LOSSES, lambda step: 0.1),
        TypeError,
        "got a schedule: call it with the step and pass the result.",
    ),
    "loss_vector": (
        lambda: update(None, loss=jnp.ones(2)),
        ValueError,
        "`scale_by_flood().update(loss=...)` must be a scalar, got shape (2,).",
    ),
    "weight_negative": (
        lambda: update(0.3, weight=-2.0),
        ValueError,
        "`scale_by_flood().update(weight=...)` must be non-negative and finite, got",
    ),
    "weight_nan": (
        lambda: update(0.3, flood(optax.sgd(0.1), 0.5), weight=np.nan),
        ValueError,
        "`flood(inner).update(weight=...)` must be non-negative and finite, got nan.",
    ),
    "weight_mask": (
        lambda: update(0.3, weight=jnp.ones(3)),
        ValueError,
        "`scale_by_flood().update(weight=...)` must be a scalar, got shape (3,).",
    ),
    "weight_bool": (
        lambda: update(0.3, weight=True),
        TypeError,
        "`scale_by_flood().update(weight=...)` must be a real number, got True",
    ),
    "flush_number": (
        lambda: update(0.3, flood(optax.sgd(0.1), 0.5, every_k=2), flush=1),
        TypeError,
        "`flood(inner).update(flush=...)` must be a boolean scalar, got 1.",
    ),
    "flush_text": (
        lambda: update(0.3, flood(optax.sgd(0.1), 0.5), flush="yes"),
        TypeError,
        "`flood(inner).update(flush=...)` must be a boolean scalar, got 'yes'.",
    ),
    "flush_none": (
        lambda: update(0.3, flood(optax.sgd(0.1), 0.5, every_k=2), flush=None),
        TypeError,
        "`flood(inner).update(flush=...)` must be a boolean scalar, got None.",
    ),
    "accumulator_integer": (
        lambda: flood(optax.sgd(0.1), 0.5, every_k=2, accumulator_dtype=jnp.int32),
        TypeError,
        "`flood(accumulator_dtype=...)` must be a real float dtype of 16 bits at "
        "least, or None for float32 at least, got ",
    ),
    "accumulator_text": (
        lambda: flood(optax.sgd(0.1), 0.5, accumulator_dtype="half a float"),
        TypeError,
        "least, or None for float32 at least, got 'half a float'.",
    ),
    "flush_vector": (
        lambda: update(0.3, flood(optax.sgd(0.1), 0.5), flush=jnp.array([True])),
        TypeError,
        "`flood(inner).update(flush=...)` must be a boolean scalar, got",
    ),
    "shape_uncalled": (
        lambda: flood(optax.sgd(0.1), 0.5, shape=shapes.soft),
        TypeError,
        "`flood(shape=...)` must be a `flood_optax.Shape`, got the function soft: "
        "call it: soft()",
    ),
    "shape_uncalled_in_a_chain": (
        lambda: scale_by_flood(0.5, shape=shapes.pause),
        TypeError,
        "`scale_by_flood(shape=...)` must be a `flood_optax.Shape`, got the function",
    ),
    "weighted_value_fn": (
        lambda: update(
            0.3,
            flood(optax.sgd(0.1), 0.5, axis_name="devices"),
            value_fn=jnp.sum,
            weight=2.0,
        ),
        ValueError,
        "`flood(axis_name=...)` cannot weigh `value_fn` by `weight`, got both.",
    ),
    "value_fn": (
        lambda: update(0.3, value_fn=jnp.sum),
        ValueError,
        "`scale_by_flood` must not stand in front of an optimizer that evaluates the "
        "loss itself, got `value_fn`",
    ),
    "flood_value_missing": (
        lambda: update(None, flood(optax.sgd(0.1), 0.5)),
        ValueError,
        "`flood(inner).update(value=...)` needs the current loss, got None",
    ),
    "schedule_vector": (
        lambda: update(0.3, scale_by_flood(lambda step: jnp.ones(3) * step)),
        ValueError,
        "`scale_by_flood(level=...)` must be a scalar where one loss is flooded, "
        "got shape (3,).",
    ),
    "schedule_nan": (
        lambda: update(0.3, scale_by_flood(lambda _: np.nan)),
        ValueError,
        "`scale_by_flood(level=...)` must not be NaN, got nan.",
    ),
    "loss_integer": (
        lambda: flood_loss(jnp.arange(3), 0.5),
        TypeError,
        "`flood_loss(loss)` must be of a real float dtype, got int32.",
    ),
    "loss_list": (
        lambda: flood_loss([0.1, 0.2], 0.5),
        TypeError,
        "`flood_loss(loss)` must be an array of real floats, got list.",
    ),
    "level_larger_than_loss": (
        lambda: flood_loss(jnp.float32(0.5), jnp.ones(3)),
        ValueError,
        "`flood_loss(level=...)` must broadcast to the shape () of the losses, "
        "got shape (3,).",
    ),
    "level_unfit": (
        lambda: flood_mean(LOSSES, jnp.ones(2), over="example"),
        ValueError,
        "`flood_mean(level=...)` must broadcast to the shape (3,) of the losses, "
        "got shape (2,).",
    ),
    "flooded_vector": (
        lambda: flooded(lambda: LOSSES, 0.5)(),
        ValueError,
        "`flooded(loss_fn)'s loss` must be a scalar, got shape (3,). "
        "`flood_mean(losses, level)` says over what to average.",
    ),
    "flooded_one": (
        lambda: flooded(lambda: LOSSES[:1], 0.5)(),
        ValueError,
        "must be a scalar, got shape (1,).",
    ),
    "flooded_tuple": (
        lambda: flooded(lambda: (1.0, 2), 0.5)(),
        TypeError,
        "`flooded(loss_fn)` returned a tuple of 2: pass `has_aux=True` if it is "
        "(loss, aux)",
    ),
    "flooded_no_aux": (
        lambda: flooded(lambda: 1.0, 0.5, has_aux=True)(),
        TypeError,
        "`flooded(loss_fn, has_aux=True)` needs loss_fn to return (loss, aux), "
        "got float.",
    ),
    "flooded_integer": (
        lambda: flooded(lambda: jnp.int32(3), 0.5)(),
        TypeError,
        "must be of a real float dtype, got int32.",
    ),
    "flooded_number": (
        lambda: flooded(0.5, 0.5),
        TypeError,
        "`flooded(loss_fn)` must be callable, got float: flood a number with "
        "`flood_loss` or `flood_mean`.",
    ),
    "flooded_schedule": (
        lambda: flooded(jnp.sum, lambda step: 0.1),
        TypeError,
        "`flooded(level=...)` must be a number or an array, got a schedule: call it "
        "with the step and pass the result.",
    ),
    "over": (
        lambda: flood_mean(LOSSES, 0.1, over="class"),
        ValueError,
        '`flood_mean(over=...)` must be "batch", "example", "segment" or "sequence", '
        "got 'class'.",
    ),
    "segment_ids_missing": (
        lambda: segments(segment_ids=None),
        ValueError,
        '`flood_mean(over="segment")` needs `segment_ids`, got None.',
    ),
    "num_segments_missing": (
        lambda: segments(num_segments=None),
        ValueError,
        '`flood_mean(over="segment")` needs `num_segments`, a static int, got None.',
    ),
    "num_segments_float": (
        lambda: segments(num_segments=2.0),
        TypeError,
        "`flood_mean(num_segments=...)` must be a static int, got 2.0.",
    ),
    "num_segments_zero": (
        lambda: segments(num_segments=0),
        ValueError,
        "`flood_mean(num_segments=...)` must be at least 1, got 0.",
    ),
    "segment_ids_float": (
        lambda: segments(segment_ids=LOSSES),
        TypeError,
        "`flood_mean(segment_ids=...)` must be integers, got float32.",
    ),
    "segment_ids_shape": (
        lambda: segments(segment_ids=jnp.array([0, 1])),
        ValueError,
        "`flood_mean(segment_ids=...)` must have the shape (3,) of the losses, "
        "got (2,).",
    ),
    "segment_ids_out_of_range": (
        lambda: segments(segment_ids=np.array([0, 1, 2])),
        ValueError,
        "`flood_mean(segment_ids=...)` must lie in [0, 2), got 0 to 2.",
    ),
    "segment_ids_misplaced": (
        lambda: flood_mean(LOSSES, 0.1, segment_ids=jnp.array([0, 1, 1])),
        ValueError,
        '`flood_mean(segment_ids=..., num_segments=...)` need over="segment", '
        "got over='batch'.",
    ),
    "batch_empty": (
        lambda: flood_mean(jnp.zeros((0, 3)), 0.1),
        ValueError,
        "`flood_mean(losses)` must not be empty, got shape (0, 3)",
    ),
    "mask_all_false": (
        lambda: flood_mean(LOSSES, 0.1, where=np.zeros(3, bool)),
        ValueError,
        "`flood_mean(where=...)` must leave at least one loss",
    ),
    "mask_float": (
        lambda: flood_mean(LOSSES, 0.1, where=jnp.ones(3)),
        TypeError,
        "`flood_mean(where=...)` must be boolean, got float32.",
    ),
    "mask_shape": (
        lambda: flood_mean(LOSSES, 0.1, where=jnp.array(True)),
        ValueError,
        "`flood_mean(where=...)` must have the shape (3,) of the losses, got ().",
    ),
    "inner_multi_steps": (
        lambda: flood(optax.MultiSteps(optax.sgd(0.1), 2), 0.5),
        TypeError,
        "`flood(inner)` must be the optimizer itself, got MultiSteps, which would "
        "flood each micro-batch: use `flood(optimizer, level, every_k=k)`.",
    ),
    "inner_number": (
        lambda: flood(0.1, 0.5),
        TypeError,
        "`flood(inner)` must be an optax.GradientTransformation, got float.",
    ),
    "every_k_zero": (
        lambda: flood(optax.sgd(0.1), 0.5, every_k=0),
        ValueError,
        "`flood(every_k=...)` must be at least 1, got 0.",
    ),
    "every_k_float": (
        lambda: flood(optax.sgd(0.1), 0.5, every_k=2.0),
        TypeError,
        "`flood(every_k=...)` must be a static int, got 2.0. Under "
        '`optax.inject_hyperparams` pass `static_args="every_k"`',
    ),
    "every_k_schedule_float": (
        lambda: update(0.3, flood(optax.sgd(0.1), 0.5, every_k=lambda step: 2.0)),
        TypeError,
        "`flood(every_k=schedule)` must return an integer scalar, got shape () of "
        "dtype float32.",
    ),
    "value_fn_with_windows": (
        lambda: update(0.3, flood(optax.sgd(0.1), 0.5, every_k=2), value_fn=jnp.sum),
        ValueError,
        "cannot use `value_fn`, which belongs to one micro-batch",
    ),
    "skip_no_bool": (
        lambda: flood(
            optax.sgd(0.1), 0.5, should_skip_update_fn=lambda u, n, p: (1.0, ())
        ).init(GRADS),
        ValueError,
        "`flood(should_skip_update_fn=...)` must return a boolean scalar first, got "
        "shape () of dtype float32.",
    ),
    "soft_scale_zero": (
        lambda: shapes.soft(0.0),
        ValueError,
        "`soft(scale=...)` must be positive and finite, got 0.0.",
    ),
    "soft_scale_text": (
        lambda: shapes.soft("1"),
        TypeError,
        "`soft(scale=...)` must be a real number, got '1' of type str.",
    ),
    "ascent_negative": (
        lambda: shapes.asymmetric(ascent=-1.0),
        ValueError,
        "`asymmetric(ascent=...)` must be non-negative and finite, got -1.0.",
    ),
    "dead_band_nan": (
        lambda: shapes.asymmetric(dead_band=np.nan),
        ValueError,
        "`asymmetric(dead_band=...)` must be non-negative and finite, got nan.",
    ),
    "warmup_negative": (
        lambda: levels.warmup(0.1, -1),
        ValueError,
        "`warmup(start_step=...)` must be at least 0, got -1.",
    ),
    "warmup_float": (
        lambda: levels.warmup(0.1, 1.5),
        TypeError,
        "`warmup(start_step=...)` must be a static int, got 1.5.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_its_message(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


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


@pytest.mark.parametrize("case", ["value_missing", "value_vector", "flooded_vector"])
def test_shape_errors_are_raised_at_trace_time(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        jax.jit(lambda _: call())(0.0)


def test_numpy_mask_without_losses_is_known_at_trace_time():
    with pytest.raises(ValueError, match="must leave at least one loss"):
        jax.jit(lambda x: flood_mean(x, 0.1, where=np.zeros(3, bool)))(LOSSES)


def test_traced_levels_are_not_validated():
    @jax.jit
    def run(level):
        return flooded(lambda w: w**2, level)(0.5), update(0.3, scale_by_flood(level))

    run(jnp.nan)
