"""The band, between whose ends the loss swings, against a walk through it in Python."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from flood_optax import FloodState, FloodWarning, Shape, flood, scale_by_flood, shapes
from tests import forms, oracles

LEVEL, BAND = 0.625, 0.125  # the ends are .5 and .75, exact in 16 bits
DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
FIELDS = FloodState._fields


def walk(steps, dtype, *, level=LEVEL, band=BAND, seed=0, spoiled=True):
    """A random walk through the band that often meets its ends, NaN and infinities."""
    rng = np.random.default_rng(seed)
    drift = np.repeat(rng.choice([-1.0, 1.0], steps // 8 + 1), 8)[:steps]
    losses = level + 2.2 * band * np.sin(np.cumsum(0.3 * drift + 0.2)) + 0.02
    kinds = rng.integers(0, 20, steps)
    losses = np.where(kinds < 3, level + band, losses)
    losses = np.where((kinds >= 3) & (kinds < 6), level - band, losses)
    for kind, bad in ((6, np.nan), (7, np.inf), (8, -np.inf)):
        losses = np.where(spoiled & (kinds == kind), bad, losses)
    return losses.astype(dtype)


def course(optimizer, losses, **each):
    """What each step multiplies by and records; `each` has a row for every step."""
    one = jnp.ones([])
    weights = {name: jnp.asarray(x) for name, x in each.items()}

    def step(state, row):
        loss, extra = row
        update, state = optimizer.update(one, state, one, value=loss, **extra)
        return state, (update, *(optax.tree.get(state, name) for name in FIELDS))

    rows = jnp.asarray(losses), weights
    _, found = jax.lax.scan(step, optimizer.init(one), rows)
    return dict(zip(("multiplier", *FIELDS), jax.device_get(found), strict=True))


def assert_course(found, losses, level, band, counts=None):
    """The multipliers, levels, values and counts of Python's walk, exactly."""
    wide = losses.astype(np.float64 if losses.dtype == np.float64 else np.float32)
    ends, multipliers = oracles.strokes(wide, level, band, counts)
    np.testing.assert_array_equal(found["multiplier"], multipliers)
    if counts is None:
        np.testing.assert_array_equal(found["flood_level"], ends.astype(np.float32))
        np.testing.assert_array_equal(found["flood_below"], np.cumsum(wide < ends))
    if losses.dtype != np.float64:
        np.testing.assert_array_equal(found["flood_value"], wide)


def table(rows):
    """A schedule that reads its levels from a table."""
    return lambda step: jnp.take(jnp.asarray(rows), step)


def moving(steps):
    """Levels that rise, fall, are off for a while, and are negative at the end."""
    levels = LEVEL + 0.25 * np.sin(np.arange(steps) / 15)
    levels[steps // 3 : steps // 3 + 20] = -np.inf
    levels[-steps // 4 :] -= 1.5
    return levels.astype(np.float32)


# ---- the course of multipliers ----

EVERY_STEP = [name for name in forms.OPTAX if name not in ("flood_every_k",)]
STEPS = 500


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", EVERY_STEP)
def test_band_course_is_the_walk_through_it_for_every_form_and_dtype(form, dtype):
    losses = walk(STEPS, DTYPES[dtype])
    wide = losses.astype(np.float32)
    for end in (LEVEL - BAND, LEVEL + BAND):
        assert np.sum(wide == end) > 20  # ties
    optimizer = forms.OPTAX[form](optax.identity(), LEVEL, band=BAND)
    found = course(optimizer, losses)
    counts = np.isfinite(wide) if form == "flood_skip" else None
    if counts is None:
        assert_course(found, losses, LEVEL, BAND)
        assert 50 < found["flood_below"][-1] < STEPS - 50
        assert np.unique(found["flood_level"]).tolist() == [0.5, 0.75]
    else:  # what is skipped leaves no trace
        _, multipliers = oracles.strokes(wide, LEVEL, BAND, counts)
        np.testing.assert_array_equal(found["multiplier"], multipliers)


@pytest.mark.usefixtures("x64")
def test_band_course_of_float64_losses_sees_what_float32_does_not():
    """Losses within 1e-9 of an end, and a band narrower than float32 resolves."""
    rng = np.random.default_rng(1)
    losses = walk(STEPS, np.float64) + rng.choice([-1e-9, 0, 1e-9], STEPS)
    assert_course(course(scale_by_flood(LEVEL, band=BAND), losses), losses, LEVEL, BAND)
    losses = walk(STEPS, np.float64, level=1e8, band=2.0)
    found = course(flood(optax.identity(), 1e8, band=2.0), losses)
    ends, multipliers = oracles.strokes(losses, 1e8, 2.0)
    np.testing.assert_array_equal(found["multiplier"], multipliers)
    np.testing.assert_array_equal(
        found["flood_value"] < found["flood_level"], losses < ends
    )
    assert np.float32(1e8 - 2) == np.float32(1e8 + 2)


@pytest.mark.parametrize("form", ["scale_by_flood", "flood"])
def test_band_moves_with_a_schedule_and_falls_silent_where_it_is_off(form):
    levels = moving(STEPS)
    losses = walk(STEPS, np.float32) - np.where(np.arange(STEPS) < 375, 0, 1.5)
    losses = losses.astype(np.float32)
    optimizer = forms.OPTAX[form](optax.identity(), table(levels), band=BAND)
    found = course(optimizer, losses)
    assert_course(found, losses, levels, BAND)
    off = slice(STEPS // 3, STEPS // 3 + 20)
    assert (found["multiplier"][off] == 1).all()
    assert (found["flood_level"][off] == -np.inf).all()
    assert len(np.unique(found["flood_level"][-100:] > levels[-100:])) == 2


def injected(level, band):
    make = optax.inject_hyperparams(scale_by_flood, hyperparam_dtype=jnp.float32)
    return make(level=level, band=band)


BANDS = {
    "array": lambda: scale_by_flood(LEVEL, band=jnp.float32(BAND)),
    "bfloat16": lambda: scale_by_flood(LEVEL, band=jnp.bfloat16(BAND)),
    "numpy": lambda: scale_by_flood(np.float16(LEVEL), band=np.array(BAND)),
    "injected": lambda: injected(LEVEL, BAND),
    "injected_schedule": lambda: injected(LEVEL, lambda step: BAND),
}


@pytest.mark.parametrize("kind", BANDS)
def test_band_of_any_kind_is_the_same_band(kind):
    losses = walk(STEPS, np.float32)
    assert_course(course(BANDS[kind](), losses), losses, LEVEL, BAND)


@pytest.mark.parametrize("band", [1, np.uint8(1), np.int8(1), jnp.uint16(1)], ids=repr)
def test_band_of_integers_keeps_its_sign(band):
    """The negative of an unsigned one is 255: a band that ends far above."""
    losses = walk(STEPS, np.float32, level=3, band=1.0)
    assert_course(course(scale_by_flood(3, band=band), losses), losses, 3, 1)


def test_band_and_level_may_be_traced_and_mapped():
    losses = walk(200, np.float32)
    bands = jnp.array([0.0, 0.03, BAND, 0.2, 0.4])

    def run(level, band):
        return course(scale_by_flood(level, band=band), losses)["multiplier"]

    def wrapped(level, band):
        one = jnp.ones([])
        optimizer = flood(optax.identity(), level, band=band)

        def step(state, loss):
            update, state = optimizer.update(one, state, one, value=loss)
            return state, update

        return jax.lax.scan(step, optimizer.init(one), jnp.asarray(losses))[1]

    mapped = jax.jit(jax.vmap(wrapped, in_axes=(None, 0)))(LEVEL, bands)
    for band, multipliers in zip(np.asarray(bands), mapped, strict=True):
        wanted = oracles.strokes(losses, LEVEL, band)[1]
        np.testing.assert_array_equal(multipliers, wanted)
        np.testing.assert_array_equal(run(LEVEL, float(band)), wanted)
        np.testing.assert_array_equal(jax.jit(wrapped)(LEVEL, band), wanted)
    assert len({tuple(np.nan_to_num(row)) for row in np.asarray(mapped)}) == 5


def test_band_of_a_fifth_of_each_level_leaves_the_one_that_is_off_alone():
    """As in a sweep whose first level is -inf, and so the fifth of it."""
    losses, one = walk(200, np.float32), jnp.ones([])

    @jax.vmap
    def run(level):
        optimizer = flood(optax.identity(), level, band=0.2 * level)

        def step(state, loss):
            update, state = optimizer.update(one, state, one, value=loss)
            return state, update

        return jax.lax.scan(step, optimizer.init(one), jnp.asarray(losses))[1]

    off, on = run(jnp.array([-np.inf, LEVEL]))
    np.testing.assert_array_equal(off, np.ones(200))
    band = np.float32(0.2) * np.float32(LEVEL)
    np.testing.assert_array_equal(on, oracles.strokes(losses, LEVEL, band)[1])


# ---- none, and 0 ----

NONE = {"none": None, "zero": 0.0, "int": 0, "array": jnp.zeros([]), "minus": -0.0}


@pytest.mark.parametrize("none", NONE)
@pytest.mark.parametrize("form", forms.OPTAX)
def test_no_band_and_zero_are_one_program(form, none):
    def program(**options):
        optimizer = forms.OPTAX[form](optax.adam(0.1), LEVEL, **options)
        params = {"w": jnp.ones(3), "b": jnp.ones([], jnp.bfloat16)}
        update = functools.partial(optimizer.update, value=jnp.float32(0.3))
        jaxpr = jax.make_jaxpr(update)(params, optimizer.init(params), params)
        return re.sub("0x[0-9a-f]+", "", str(jaxpr))

    assert program(band=NONE[none]) == program()
    assert program(band=0.1) != program()


@pytest.mark.parametrize(
    "make",
    [
        lambda **band: optax.inject_hyperparams(scale_by_flood)(level=0.5, **band),
        lambda **band: optax.inject_hyperparams(flood, static_args="every_k")(
            optax.sgd(0.1), level=0.5, **band
        ),
    ],
    ids=["scale_by_flood", "flood"],
)
def test_injected_flood_has_a_band_in_its_state_only_if_it_was_given_one(make):
    """A default that is a number would enter checkpoints of injected floods."""
    assert set(make().init(jnp.ones(2)).hyperparams) == {"level"}
    assert set(make(band=0.1).init(jnp.ones(2)).hyperparams) == {"level", "band"}


def test_strict_promotion_takes_a_band_of_another_dtype():
    with jax.numpy_dtype_promotion("strict"):
        bands = (jnp.bfloat16(BAND), np.float16(BAND), BAND, np.uint8(0))
        for level, band in itertools.product((np.float32, np.float16), bands):
            transform = scale_by_flood(level(LEVEL), band=band)
            _, state = transform.update(
                jnp.ones(2), transform.init(jnp.ones(2)), value=jnp.bfloat16(0.5)
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
        params, state = step(params, state, jnp.float32(band), jnp.float32(value))
        seen.append(float(state.flood_state.flood_level))
    assert seen == [0.5, 0.875, 0.6875, 0.625]


steeper = Shape(  # than |r|, the more so the farther away
    lambda r: jnp.abs(r) + r * r / 2,
    lambda r: jnp.where(r >= 0, 1 + r, r - 1),
)


def test_no_gradient_flows_into_the_band():
    def after(band):
        transform = scale_by_flood(LEVEL, band=band, shape=steeper)
        state, total = transform.init(jnp.ones([])), 0.0
        for loss in (0.45, 0.6, 0.9):
            update, state = transform.update(jnp.ones([]), state, value=loss)
            total += update + state.flood_level + state.flood_value
        return total

    assert jax.grad(after)(BAND) == 0
    assert after(BAND) != after(2 * BAND)


RESTING = {
    "pause": shapes.pause(),  # below the band: it cannot climb
    "no_ascent": shapes.asymmetric(0.0),
    "soft": shapes.soft(0.1),  # rests still above the lower end
    "dead_band": shapes.asymmetric(1.0, 0.1),  # at the upper end less that
    "deep": shapes.asymmetric(1.0, 0.5),  # never below it
    "own": Shape(lambda r: r * r / 2, lambda r: r),
    "climbing": Shape(lambda r: -r, lambda r: -jnp.ones_like(r)),  # never sinks
}


@pytest.mark.parametrize("call", ["scale_by_flood", "flood", "injected"])
@pytest.mark.parametrize("rests", RESTING)
def test_band_refuses_a_shape_that_rests_at_an_end(rests, call):
    make = {
        "scale_by_flood": functools.partial(scale_by_flood, 1.0),
        "flood": functools.partial(flood, optax.sgd(0.02), 1.0),
        "injected": lambda **options: optax.inject_hyperparams(
            scale_by_flood, static_args="shape"
        )(1.0, **options).init(jnp.ones(2)),
    }[call]
    call = "scale_by_flood" if call == "injected" else call
    message = f"`{call}(band=...)` must come with a shape that turns the loss around"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(band=0.2, shape=RESTING[rests])
    make(band=0.0, shape=RESTING[rests])  # is none


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
    for level, band in ((0.5, 0.5), (-0.5, 0.6), (0.0, 0.1), (-np.inf, 0.1)):
        make(level, band=band)
    make(lambda step: 0.5, band=0.6)


@pytest.mark.parametrize(
    "level", [3e38, -3e38, lambda step: 3e38], ids=["above", "below", "schedule"]
)
def test_band_whose_end_overflows_is_refused(level):
    """An upper end of +inf would ascend for ever, a lower one of -inf be off."""
    with pytest.raises(ValueError, match=r"must leave both ends finite, got 2e\+38"):
        course(scale_by_flood(level, band=2e38), np.zeros(1))
    scale_by_flood(-np.inf, band=2e38)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("level", "band"),
    [(0.1, 0.1), (-0.125, 0.125), (1e-300, 1e-300), (2e-38, 1.9e-38)],
)
def test_band_of_float64_with_an_end_at_zero_keeps_its_strokes(level, band):
    """A float32 number just below 0 is subnormal, and XLA takes it for 0."""
    ends = np.array([level - band, level + band])
    losses = np.repeat(ends, 3) + np.tile([-1e-50, 0.0, 1e-50], 2)
    losses = np.random.default_rng(0).choice([*losses, -1.0, 1.0], 200)
    assert_multipliers(scale_by_flood(level, band=band), losses, level, band)


@pytest.mark.usefixtures("x64")
def test_band_of_float64_climbs_from_just_below_zero():
    losses = np.array([0.05, -1e-50, 0.15, 0.25])
    found = course(scale_by_flood(0.1, band=0.1), losses)
    np.testing.assert_array_equal(found["multiplier"], [1, -1, -1, 1])


def assert_multipliers(optimizer, losses, level, band):
    _, multipliers = oracles.strokes(losses, level, band)
    assert {*multipliers} == {-1.0, 1.0}
    np.testing.assert_array_equal(course(optimizer, losses)["multiplier"], multipliers)
