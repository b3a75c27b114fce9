"""Images are redrawn for each key; what is measured of a run is what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import images, pixels, training as shared
from benchmarks.images import training


def test_expected_calibration_error_equals_the_sum_over_bins():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (500, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 500)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    got = shared.expected_calibration_error(jnp.asarray(logits), labels, 15)
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_images_are_redrawn_for_each_key_and_flipped_exactly():
    loaded = pixels.load("digits", None, images.SIZES)
    (x, y), (validation_x, validation_y), (test_x, test_y) = pixels.draw(
        loaded, 0.1, jax.random.key(0)
    )
    assert [len(x), len(validation_x), len(test_x)] == [200, 50, 1547]
    np.testing.assert_array_equal(test_y, loaded.test_y)
    pool = {row.tobytes(): label for row, label in zip(*loaded[:2], strict=True)}

    def flips(x, y):
        rows = np.round(255 * np.asarray(x)).astype(np.uint8)
        truth = [pool[row.tobytes()] for row in rows]
        return int((np.array(truth) != np.asarray(y)).sum())

    assert flips(x, y) == 20
    assert flips(validation_x, validation_y) == 5
    (other, _), _, _ = pixels.draw(loaded, 0.1, jax.random.key(1))
    assert (np.asarray(other) != np.asarray(x)).any()


@pytest.mark.slow  # compiles the study's network
def test_images_flatness_before_is_that_of_plain_training_at_the_level():
    protocol = dataclasses.replace(training.SMOKE, epochs=3)
    train = jax.jit(
        training.trainer(pixels.load("digits", None, images.SIZES), 0.1, protocol)
    )
    plain = train(jnp.float32(0.0), jax.random.key(0))
    flooded = train(jnp.float32(2.2), jax.random.key(0))
    assert not bool(plain["entered"])
    assert bool(flooded["entered"])
    assert float(plain["share_below"].sum()) == 0.0
    assert float(flooded["share_below"].sum()) > 0.0
    # At a level above every loss flooding starts at once: before is the start, and so
    # it is where flooding never starts.
    at_once = train(jnp.float32(9.0), jax.random.key(0))
    np.testing.assert_allclose(
        at_once["flatness_before"], plain["flatness_before"], rtol=1e-5
    )
    assert (flooded["flatness_before"] != plain["flatness_before"]).all()
