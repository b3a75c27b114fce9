"""The band, between whose ends the loss swings: of any kind, traced, and refused.

Its course in every form and dtype is in test_courses.py.
"""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import FloodWarning, Shape, flood, scale_by_flood, shapes
from tests import forms, oracles

LEVEL, BAND, STEPS = 0.625, 0.125, 400  # the ends are .5 and .75


def walk(level=LEVEL, band=BAND, dtype=np.float32):
    level = np.where(np.isfinite(level), level, LEVEL)
    return forms.walk(level, band, STEPS).astype(dtype)


def moving():
    """Levels that rise, fall, are off for a while, and are negative at the end."""
    levels = LEVEL + 0.25 * np.sin(np.arange(STEPS) / 15)
    levels[STEPS // 3 : STEPS // 3 + 20] = -np.inf
    levels[-STEPS // 4 :] -= 1.5
    return levels.astype(np.float32)


MOVING = moving()


def schedule(step):
    return jnp.take(jnp.asarray(MOVING), step)


def course(optimizer, losses):
    return jax.device_get(jax.jit(lambda x: forms.course(optimizer, value=x))(losses))


def injected(level, band):
    make = optax.inject_hyperparams(scale_by_flood, hyperparam_dtype=jnp.float32)
    return make(level=level, band=band)


INTEGERS = (1, np.uint8(1), np.int8(1), jnp.uint16(1))  # -1 of an unsigned one is 255
KINDS = {
    "array": (LEVEL, BAND, lambda: scale_by_flood(LEVEL, band=jnp.float32(BAND))),
    "bfloat16": (LEVEL, BAND, lambda: scale_by_flood(LEVEL, band=jnp.bfloat16(BAND))),
    "numpy": (
        *(LEVEL, BAND),
        lambda: scale_by_flood(np.float16(LEVEL), band=np.array(BAND)),
    ),
    "injected": (LEVEL, BAND, lambda: injected(LEVEL, BAND)),
    "injected schedule": (LEVEL, BAND, lambda: injected(LEVEL, lambda step: BAND)),
    "schedule": (MOVING, BAND, lambda: scale_by_flood(schedule, band=BAND)),
    "schedule of a wrapper": (
        *(MOVING, BAND),
        lambda: flood(optax.identity(), schedule, band=BAND),
    ),
    **{
        repr(one): (3, 1, lambda one=one: scale_by_flood(3, band=one))
        for one in INTEGERS
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_band_of_any_kind_is_the_walk_through_it(kind):
    level, band, make = KINDS[kind]
    losses = walk(level, band)
    found = course(make(), losses)
    ends, multipliers = oracles.strokes(losses, level, band)
    np.testing.assert_array_equal(found["multiplier"], multipliers)
    np.testing.assert_array_equal(found["flood_level"], ends)
    np.testing.assert_array_equal(found["flood_value"], losses)
    np.testing.assert_array_equal(found["flood_below"], np.cumsum(losses < ends))
    assert len(np.unique(ends > level)) == 2
    off = ends == -np.inf
    assert off.sum() == (20 if level is MOVING else 0)
    assert (found["multiplier"][off] == 1).all()


def test_band_and_level_may_be_traced_and_mapped():
    """The last is a fifth of a level that is off, as in a sweep: no end, no NaN."""
    losses = walk()
    levels = np.float32([LEVEL] * 5 + [-np.inf])
    bands = np.float32([0.0, 0.03, BAND, 0.2, 0.4, 0.2 * -np.inf])

    def multipliers(level, band):
        optimizer = flood(optax.identity(), level, band=band)
        return forms.course(optimizer, value=jnp.asarray(losses))["multiplier"]

    mapped = jax.jit(jax.vmap(multipliers))(levels, bands)
    traced = jax.jit(multipliers)
    for level, band, found in zip(levels, bands, np.asarray(mapped), strict=True):
        wanted = np.ones(STEPS)
        if level != -np.inf:
            wanted = oracles.strokes(losses, level, band)[1]
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(traced(level, band), wanted)
    assert len({tuple(np.nan_to_num(row)) for row in np.asarray(mapped)}) == 6


# ---- float64 ----

ZERO_ENDS = [(0.1, 0.1), (-0.125, 0.125), (1e-300, 1e-300), (2e-38, 1.9e-38)]


def wide_losses(level, band):
    """Losses that float32 takes for an end, or for 0: it has no number so small."""
    rng = np.random.default_rng(1)
    if (level, band) not in ZERO_ENDS:
        near = rng.choice([-1e-9, 0, 1e-9], STEPS) * level
        return walk(level, band, np.float64) + near
    ends = np.array([level - band, level + band])
    near = np.repeat(ends, 3) + np.tile([-1e-50, 0.0, 1e-50], 2)
    first = [level / 2, ends[0] - 1e-50, level * 1.5, level * 2.5]  # up from below 0
    return np.concatenate([first, rng.choice([*near, -1.0, 1.0], 200)])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("level", "band"), [(LEVEL, BAND), (1e8, 2.0), *ZERO_ENDS])
def test_band_of_float64_losses_sees_what_float32_does_not(level, band):
    losses = wide_losses(level, band)
    for make in (scale_by_flood, functools.partial(flood, optax.identity())):
        found = course(make(level, band=band), losses)
        ends, multipliers = oracles.strokes(losses, level, band)
        np.testing.assert_array_equal(found["multiplier"], multipliers)
        below = found["flood_value"] < found["flood_level"]
        if level in (LEVEL, 1e8):  # what is logged is on the right side of its end
            np.testing.assert_array_equal(below, losses < ends)
        np.testing.assert_array_equal(found["flood_below"], np.cumsum(losses < ends))
        assert {-1.0, 1.0} <= {*multipliers}
    assert np.float32(1e8 - 2) == np.float32(1e8 + 2)


# ---- none, and 0 ----

NONE = {"none": None, "zero": 0.0, "int": 0, "array": jnp.zeros([]), "minus": -0.0}


@functools.cache
def program(form, **options):
    optimizer = forms.OPTAX[form](optax.adam(0.1), LEVEL, **options)
    params = {"w": jnp.ones(3), "b": jnp.ones([], jnp.bfloat16)}
    update = functools.partial(optimizer.update, value=np.float32(0.3))
    jaxpr = jax.make_jaxpr(update)(params, optimizer.init(params), params)
    return re.sub("0x[0-9a-f]+", "", str(jaxpr))


@pytest.mark.parametrize("none", NONE)
@pytest.mark.parametrize("form", forms.OPTAX)
def test_no_band_and_zero_are_one_program(form, none):
    assert program.__wrapped__(form, band=NONE[none]) == program(form)
    assert program(form, band=0.1) != program(form)


INJECTED = {
    "scale_by_flood": optax.inject_hyperparams(scale_by_flood),
    "flood": functools.partial(
        optax.inject_hyperparams(flood, static_args="every_k"), optax.sgd(0.1)
    ),
}


@pytest.mark.parametrize("form", INJECTED)
def test_injected_flood_has_a_band_in_its_state_only_if_it_was_given_one(form):
    """A default that is a number would enter checkpoints of injected floods."""
    for given in ({"level": 0.5}, {"level": 0.5, "band": 0.1}):
        state = INJECTED[form](**given).init(jnp.ones(2))
        assert state.hyperparams.keys() == given.keys()


def test_strict_promotion_takes_a_band_of_another_dtype():
    with jax.numpy_dtype_promotion("strict"):
        bands = (jnp.bfloat16(BAND), np.float16(BAND), BAND, np.uint8(0))
        for level, band in itertools.product((np.float32, np.float16), bands):
            transform = scale_by_flood(level(LEVEL), band=band)
            _, state = transform.update(
                np.ones(2, "f4"), transform.init(np.ones(2)), value=jnp.bfloat16(0.5)
            )
            assert state.flood_level == LEVEL - float(band)


# ---- trainings ----


def test_band_that_changes_its_value_is_not_traced_again_and_may_be_donated():
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, band, value):
        optimizer = flood(optax.adam(0.1), LEVEL, band=band)
        updates, state = optimizer.update(params, state, params, value=value)
        return optax.apply_updates(params, updates), state

    chex.clear_trace_counter()
    params = {"w": jnp.array([1.0, -2.0])}
    state, seen = flood(optax.adam(0.1), LEVEL).init(params), []
    for band, value in [(0.125, 0.45), (0.25, 0.8), (0.0625, 0.7), (0.0, 0.6)]:
        params, state = step(params, state, np.float32(band), np.float32(value))
        seen.append(float(state.flood_state.flood_level))
    assert seen == [0.5, 0.875, 0.6875, 0.625]


def test_band_changed_in_mid_run_goes_on_in_its_direction():
    optimizer = injected(LEVEL, BAND)
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    state, seen = optimizer.init(jnp.ones([])), []
    for loss, band in [
        (0.45, 0.125),  # below .5: up
        (0.74, 0.125),
        (0.74, 0.05),  # the upper end is now .675: down
        (0.58, 0.05),
        (0.58, 0.03),  # below .595: up
        (0.63, 0.25),
        (0.87, 0.25),
        (0.87, 0.0),  # no band: down
        (0.62, 0.0),
        (0.62, 0.125),  # up since the last step was
        (0.76, 0.125),
    ]:
        state.hyperparams["band"] = jnp.float32(band)
        updates, state = update(np.float32(1), state, value=np.float32(loss))
        seen.append(float(updates))
    assert seen == [-1, -1, 1, 1, -1, -1, -1, 1, -1, -1, 1]


def test_no_gradient_flows_into_the_band():
    def after(band):
        transform = scale_by_flood(LEVEL, band=band, shape=forms.STEEPER)
        found = forms.course(transform, value=jnp.array([0.45, 0.6, 0.9]))
        return sum(found[x].sum() for x in ("multiplier", "flood_level", "flood_value"))

    value, slope = jax.jit(jax.vmap(jax.value_and_grad(after)))(
        np.float32([BAND, 2 * BAND])
    )
    assert not slope.any()
    assert value[0] != value[1]


RESTING = {
    "pause": shapes.pause(),  # below the band: it cannot climb
    "no_ascent": shapes.asymmetric(0.0),
    "soft": shapes.soft(0.1),  # rests still above the lower end
    "dead_band": shapes.asymmetric(1.0, 0.1),  # at the upper end less that
    "deep": shapes.asymmetric(1.0, 0.5),  # never below it
    "own": Shape(lambda r: r * r / 2, lambda r: r),
    "soft_descent": Shape(  # rests just above the lower end
        lambda r: jnp.where(r >= 0, r * r / 2, -r),
        lambda r: jnp.where(r >= 0, r, -1.0),
    ),
    "climbing": Shape(lambda r: -r, lambda r: -jnp.ones_like(r)),  # never sinks
}
CALLS = {
    "scale_by_flood": functools.partial(scale_by_flood, 1.0),
    "flood": functools.partial(flood, optax.sgd(0.02), 1.0),
    "injected": lambda **options: optax.inject_hyperparams(
        scale_by_flood, static_args="shape"
    )(1.0, **options).init(jnp.ones(2)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rests", RESTING)
def test_band_refuses_a_shape_that_rests_at_an_end(rests, call):
    name = "scale_by_flood" if call == "injected" else call
    message = f"`{name}(band=...)` must come with a shape that turns the loss around"
    with pytest.raises(ValueError, match=re.escape(message)):
        CALLS[call](band=0.2, shape=RESTING[rests])
    CALLS[call](band=0.0, shape=RESTING[rests])  # is none


def test_band_cannot_know_whether_a_shape_of_traced_numbers_turns_around():
    @jax.jit
    def update(ascent):
        transform = scale_by_flood(1.0, band=0.2, shape=shapes.asymmetric(ascent))
        return transform.update(ascent, transform.init(ascent), value=0.3)[0]

    assert update(0.5) == -0.25


@pytest.mark.parametrize(
    "make", [scale_by_flood, functools.partial(flood, optax.sgd(1))]
)
def test_band_wider_than_a_positive_level_is_warned_of(make):
    with pytest.warns(FloodWarning, match="got 0.6 above 0.5: a loss that") as caught:
        make(0.5, band=0.6)
    assert caught[0].filename == __file__
    for level, band in ((0.5, 0.5), (-0.5, 0.6), (0.0, 0.1), (-np.inf, 2e38)):
        make(level, band=band)
    make(lambda step: 0.5, band=0.6)
