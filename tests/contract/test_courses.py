"""Every optax form, with a band and without, weighted and not, over an axis and not.

The oracle walks through the losses, one by one, in NumPy.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from flood_optax import flood, scale_by_flood, shapes
from tests import forms, oracles
from tests.marks import slow_but

LEVEL, BAND, STEPS = 0.625, 0.125, 400
DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
BANDS = {"plain": None, "band": BAND}


# in thirty-seconds: means of four, of windows and of what weighs 1, 2 or 4 are exact
LOSSES = forms.walk(LEVEL, BAND, STEPS, parts=32).astype(np.float32)
WEIGHTS = np.float32([1, 2, 4, 2, 0, 0, 1, 4] * (STEPS // 8))
# what four devices see more of the loss, and count; one counts nothing in every second
MORE = np.float32([-0.5, -0.125, 0.25, 0.375])[:, None]
COUNT = np.float32([[3, 1], [0, 4], [3, 1], [2, 2]]) / 8
COUNTS = np.tile(COUNT, STEPS // 2) * WEIGHTS


@functools.cache
def courses(form, axis):
    """Of every dtype and band, weighted and not: one program."""

    def run(losses, weights):
        found = {}
        for dtype, band, weigh in itertools.product(DTYPES, BANDS, (False, True)):
            optimizer = forms.OPTAX[form](
                optax.identity(), LEVEL, band=BANDS[band], axis_name=axis
            )
            each = {"value": losses.astype(DTYPES[dtype])}
            if weigh:  # where it is 0, the loss is NaN
                each["value"] = jnp.where(weights == 0, jnp.nan, each["value"])
                each |= {"weight": weights}
            found[f"{dtype} {band} {weigh}"] = forms.course(optimizer, **each)
        return found

    if axis is None:
        return jax.device_get(jax.jit(run)(LOSSES, WEIGHTS))
    found = jax.device_get(
        jax.jit(jax.vmap(run, axis_name=axis))(LOSSES + MORE, COUNTS)
    )
    for of_devices in jax.tree.leaves(found):
        np.testing.assert_array_equal(of_devices, of_devices[:1].repeat(4, 0))
    return jax.tree.map(lambda x: x[0], found)


EVERY_TIME = ("scale_by_flood", "flood_every_k")  # a transformation, and windows


@pytest.mark.parametrize("weigh", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, "data"])
@pytest.mark.parametrize("form", slow_but(EVERY_TIME, forms.OPTAX))
def test_course_is_that_of_numpy(form, axis, dtype, band, weigh):
    found = courses(form, axis)[f"{dtype} {band} {weigh}"]
    width = BANDS[band] or 0.0
    weights = WEIGHTS if weigh else np.ones(STEPS)
    skipped = form == "flood_skip"
    size = 2 if form == "flood_every_k" else 1
    given = {"weights": weights, "skip": skipped, "band": width}
    wanted, _ = oracles.windows(np.ones(STEPS), LOSSES, size, LEVEL, **given)
    np.testing.assert_array_equal(np.sign(found["multiplier"]), wanted)
    below, steps = np.sum(wanted < 0), np.sum(wanted != 0)
    assert (found["flood_below"][-1], found["flood_step"][-1]) == (below, steps)
    assert 0.1 * steps < below < 0.9 * steps
    if form == "flood_every_k":
        return
    np.testing.assert_array_equal(found["multiplier"], wanted)
    counted = (weights > 0) & (np.isfinite(LOSSES) if skipped else True)
    ends, _ = oracles.strokes(LOSSES, LEVEL, width, counted)
    np.testing.assert_array_equal(found["flood_level"][counted], ends[counted])
    np.testing.assert_array_equal(found["flood_value"][counted], LOSSES[counted])
    for end in {LEVEL - width, LEVEL + width}:
        assert np.sum(end == LOSSES) > 10  # ties


SIZES = np.resize([3, 1, 2, 4, 2], 170)
WINDOWS = {
    "four": (4, {"every_k": 4}),
    "flushed": (SIZES, {"every_k": 5}),
    "skipping": (2, {"every_k": 2, "should_skip_update_fn": optax.skip_not_finite}),
}


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("kind", WINDOWS)
def test_course_of_windows_is_that_of_numpy(kind, band):
    sizes, options = WINDOWS[kind]
    width = BANDS[band] or 0.0
    optimizer = flood(optax.identity(), LEVEL, band=BANDS[band], **options)
    each = {"value": LOSSES}
    if kind == "flushed":
        each["flush"] = np.isin(1 + np.arange(STEPS), np.cumsum(sizes))
    found = jax.jit(lambda each: forms.course(optimizer, **each))(each)["multiplier"]
    given = {"skip": kind == "skipping", "band": width}
    with np.errstate(invalid="ignore"):  # infinities of both signs in one window
        wanted, _ = oracles.windows(np.ones(STEPS), LOSSES, sizes, LEVEL, **given)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert np.sum(wanted < 0) > 20 < np.sum(wanted > 0)
    # a direction for each micro-batch goes elsewhere
    apart = oracles.strokes(LOSSES, LEVEL, width)[1]
    assert np.sum(apart < 0) != np.sum(wanted < 0)


TURNING = {
    "reflect": (shapes.reflect(), oracles.reflect),
    "asymmetric": (shapes.asymmetric(0.5), oracles.asymmetric(0.5, 0.0)),
    "own": (
        forms.STEEPER,
        lambda r: (abs(r) + r**2 / 2, np.where(r >= 0, 1 + r, r - 1)),
    ),
}


@pytest.mark.parametrize("shape", TURNING)
def test_band_bends_every_shape_that_turns_around_at_its_ends(shape):
    made, by_numpy = TURNING[shape]
    losses = LOSSES[np.isfinite(LOSSES)]
    optimizer = scale_by_flood(LEVEL, band=BAND, shape=made)
    found = jax.jit(lambda x: forms.course(optimizer, value=x))(losses)
    ends, _ = oracles.strokes(losses, LEVEL, BAND)
    slopes = by_numpy(np.float64(losses) - ends)[1]
    np.testing.assert_allclose(found["multiplier"], slopes, rtol=1e-5, atol=1e-6)
