"""What a band does to the drift along the level set: docs/theory.md, longer strokes.

The formulas are held against recursions in NumPy with given signs.
"""

import math

import numpy as np
import pytest

from benchmarks.strokes.formulas import Rule

HEAVY_BALLS = {
    "SGD": Rule(),
    "heavy ball 0.5": Rule(0.5),
    "heavy ball 0.9": Rule(0.9),
    "Nesterov 0.9": Rule(0.9, nesterov=True),
}


def ways(rule, steps, strokes=400):
    """Signs of strokes of so many steps, and the way gone before each; eta = 1."""
    signs = np.tile(np.repeat([1.0, -1.0], steps), strokes)
    velocity, way, seen = 0.0, 0.0, []
    for sign in signs:
        seen.append(way)
        velocity = rule.momentum * velocity + sign
        way += rule.momentum * velocity + sign if rule.nesterov else velocity
    late = slice(len(signs) // 2, None)  # the first strokes start from rest
    return signs[late], np.array(seen)[late]


@pytest.mark.parametrize("rule", HEAVY_BALLS.values(), ids=HEAVY_BALLS)
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_ratio_is_what_signs_of_that_period_make(rule, steps):
    """Second order: the force s H a adds up to h mean(s a) H g a step."""
    signs, way = ways(rule, steps)
    drift_a_step = np.mean(signs * way) / (1 - rule.momentum)
    np.testing.assert_allclose(rule.ratio(steps), -2 * drift_a_step, rtol=1e-9)
    swing = (way.max() - way.min()) * (1 - rule.momentum)
    if not rule.momentum:
        assert swing == steps - rule.lost(steps)
    turns = way[::steps]  # where the sign changes
    length = abs(turns[1] - turns[0]) * (1 - rule.momentum)
    np.testing.assert_allclose(length, steps - rule.lost(steps), rtol=1e-9)


@pytest.mark.parametrize("rule", HEAVY_BALLS.values(), ids=HEAVY_BALLS)
def test_ratio_rises_with_the_stroke_to_its_limit(rule):
    m = rule.momentum
    lengths = (1, 3, 10, 30, 100, 1000, 100_000)
    ratios = np.array([rule.ratio(n) for n in lengths])
    if m:
        assert (np.diff(ratios) > 0).all()
    limit = (1 - m + 2 * m**2 if rule.nesterov else 1 + m) / (1 - m) ** 3
    np.testing.assert_allclose([ratios[-1], rule.limit], limit, rtol=5e-4)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_velocity_overshoots_the_end_of_the_band_by_its_memory(momentum):
    """By h |g|^2 (m / (1 - m) - ln 2 / ln(1 / m)): near m = 1, .31 / (1 - m) steps."""
    velocity, way, farthest = 1.0, 0.0, 0.0  # in steps of the formed velocity
    for _ in range(2000):
        velocity = momentum * velocity - (1 - momentum)
        way += velocity
        farthest = max(farthest, way)
    due = momentum / (1 - momentum) - math.log(2) / math.log(1 / momentum)
    assert abs(farthest - due) < 0.05  # it turns between two steps
    assert abs(due * (1 - momentum) - (1 - math.log(2))) < 1.2 * (1 - momentum)
