"""Scores of left-out examples against refitted models, and the flips they find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import datasets
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression

from flood_optax import levels
from tests.marks import slow_but


def refitted(x, y, c, group):
    """The scores of n models of scikit-learn for every width and ridge; the best."""
    n, one_hot = len(y), np.eye(c)[y]
    d = ((x[:, None] - x[None]) ** 2).sum(-1)
    median = np.median(d[d > 0])
    best = None
    for width in (0.1, 0.25, 0.5, 1.0):
        for ridge in 10.0 ** np.linspace(-3, 0, 7):
            scores = np.empty((n, c))
            for k in np.unique(group):
                out = group == k
                model = KernelRidge(
                    alpha=ridge, kernel="rbf", gamma=1 / (width**2 * median)
                )
                model.fit(x[~out], one_hot[~out])
                scores[out] = model.predict(x[out])
            error = ((scores - one_hot) ** 2).sum()
            if best is None or error < best[0]:
                best = error, scores
    return best[1]


def blobs(seed, n=24, c=3, d=4):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, n)
    x = 2 * rng.normal(size=(c, d))[y] + rng.normal(size=(n, d))
    return x + 1000, np.where(rng.random(n) < 0.2, (y + 1) % c, y)  # far from 0


@pytest.mark.parametrize("seed", range(2))
def test_leave_one_out_equals_models_refitted_without_each_example(seed):
    x, y = blobs(seed)
    found = levels.leave_one_out(x, y, 3)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, refitted(x, y, 3, np.arange(24)), atol=1e-5)


def test_leave_one_out_leaves_groups_and_equal_rows_out_together():
    x, y = blobs(7)
    groups = np.array([0, 1, 2, 3, 4, 5] * 2 + [*range(6, 18)])
    expected = refitted(x, y, 3, groups)
    found = levels.leave_one_out(x, y, 3, groups=[f"record {g}" for g in groups])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alone = levels.leave_one_out(x, y, 3)
    assert abs(alone - found).max() > 1e-3
    # Copies of a row with its label: the group of equal rows, and the same verdicts.
    twice = np.repeat(np.arange(24), 2)
    copies = levels.leave_one_out(x[twice], y[twice], 3)
    expected = refitted(x[twice], y[twice], 3, twice)
    np.testing.assert_allclose(copies, expected, atol=1e-5)
    np.testing.assert_array_equal(copies[::2].argmax(1), alone.argmax(1))


SPREAD = {  # in points: three standard deviations of one draw
    "digits": (300, 0.2, 9.0),
    "wine": (60, 0.2, 21.0),
    "breast_cancer": (150, 0.2, 12.0),
    "gaussians": (200, 0.3, 13.0),
}


@pytest.mark.parametrize("data", slow_but(("digits", "gaussians"), SPREAD))
def test_noise_rate_finds_known_flips(data):
    n, flips, spread = SPREAD[data]
    rng = np.random.default_rng(1)
    if data == "gaussians":
        y = np.arange(n) % 2
        x = rng.normal(size=(n, 10)) + y[:, None]
    else:
        x, y = getattr(datasets, f"load_{data}")(return_X_y=True)
        some = rng.permutation(len(x))[:n]
        x, y = ((x - x.mean(0)) / (x.std(0) + 1e-9))[some], y[some]
    c = y.max() + 1
    for rate in (0.0, flips):
        wrong = rng.permutation(n)[: round(rate * n)]
        given = y.copy()
        given[wrong] = (y[wrong] + rng.integers(1, c, len(wrong))) % c
        scores = levels.leave_one_out(x, given, c)
        found = float(levels.noise_rate(scores, given))
        assert 100 * abs(found - rate) < (3 if rate == 0 else spread)


def test_noise_rate_finds_less_of_noise_that_depends_on_the_input():
    # A weak linear annotator: what it gets wrong can be told from the image.
    x, true = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, true = x[order] / 16, true[order]
    annotator = LogisticRegression(max_iter=200).fit(x[:40], true[:40])
    x, true = x[40:440], true[40:440]
    given = annotator.predict(x)
    wrong = (given != true).mean()
    found = levels.noise_rate(levels.leave_one_out(x, given, 10), given)
    assert wrong > 0.2
    assert found < wrong / 2
    even = np.random.default_rng(1).permutation(len(x))[: round(wrong * len(x))]
    flipped = true.copy()
    flipped[even] = (flipped[even] + 1 + even % 9) % 10  # as many, whatever the image
    found = levels.noise_rate(levels.leave_one_out(x, flipped, 10), flipped)
    assert abs(found - wrong) < 0.08


def rate_by_hand(scores, y, confident):
    """Over all orders of ties, by example."""
    n = len(y)
    asked = int(np.ceil(confident * n))
    ranked = np.sort(scores, axis=1)
    margin = ranked[:, -1] - ranked[:, -2]
    wrong = scores.argmax(axis=1) != y
    drawn = []
    for seed in range(400):
        order = np.random.default_rng(seed).permutation(n)
        best = order[np.argsort(-margin[order], kind="stable")][:asked]
        drawn.append(wrong[best].mean())
    return np.mean(drawn), np.std(drawn) / 20


@pytest.mark.parametrize("confident", [0.01, 0.5])
def test_noise_rate_equals_a_count_by_hand_ties_included(confident):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, (41, 3)).astype(np.float32) / 4  # many ties
    y = rng.integers(0, 3, 41)
    run = functools.partial(levels.noise_rate, confident=confident)
    expected, error = rate_by_hand(scores, y, confident)
    assert abs(run(scores, y) - expected) <= 4 * error + 1e-6
    order = rng.permutation(41)
    np.testing.assert_allclose(run(scores[order], y[order]), run(scores, y), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(run)(scores, y), run(scores, y), rtol=1e-6)
    half = jax.jit(run)(jnp.asarray(scores, jnp.bfloat16), jnp.asarray(y, jnp.uint8))
    np.testing.assert_allclose(half, run(scores, y), rtol=1e-6)
    assert half.dtype == jnp.float32
    assert np.isnan(jax.jit(run)(jnp.asarray(scores).at[3, 1].set(jnp.nan), y))


X, Y = blobs(0)


@pytest.mark.parametrize("most", slow_but([0.8], [1 / 3, 0.8]))
def test_features_that_tell_nothing_give_the_rate_of_guessing(most):
    rng = np.random.default_rng(0)
    shares = [most, (1 - most) / 2, (1 - most) / 2]
    rates = []
    for _ in range(20):
        x, y = rng.normal(size=(90, 5)), rng.choice(3, 90, p=shares)
        rates.append(levels.noise_rate(levels.leave_one_out(x, y, 3), y))
    error = np.std(rates) / np.sqrt(20)
    assert abs(np.mean(rates) - (1 - most)) < 4 * error < 0.08


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scores_do_not_depend_on_the_unit_of_the_features(scale):
    expected = levels.leave_one_out(X, Y, 3)
    np.testing.assert_allclose(levels.leave_one_out(X * scale, Y, 3), expected, 1e-5)


def test_remedies_of_the_shape_of_features_work():
    images = np.arange(24.0 * 6).reshape(24, 3, 2) % 7
    flat = levels.leave_one_out(images.reshape(len(images), -1), Y, 3)
    assert flat.shape == levels.leave_one_out(X[:, 0][:, None], Y, 3).shape == (24, 3)
    pixels = (images.reshape(24, -1)).astype(np.uint8)  # integers are numbers too
    np.testing.assert_allclose(levels.leave_one_out(pixels, Y, 3), flat, atol=1e-6)
    numbered = np.unique(np.array(["a", "b", "c"])[Y], return_inverse=True)[1]
    np.testing.assert_array_equal(numbered, Y)
    absent = levels.leave_one_out(X, Y, 5)  # no label is 3 or 4
    np.testing.assert_array_equal(absent[:, 3:], 0)
