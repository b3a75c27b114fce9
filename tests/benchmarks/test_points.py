"""The synthetic problems are those of the paper."""

import jax
import numpy as np
import pytest
from scipy import stats

from benchmarks import points


def test_two_gaussians_have_unit_covariance_and_the_bayes_accuracy_of_the_paper():
    x, y = map(np.asarray, points.two_gaussians(jax.random.key(0), 10_000))
    assert x.shape == (20_000, 10)
    np.testing.assert_array_equal(y, np.repeat([0, 1], 10_000))
    for label in (0, 1):
        mine = x[y == label]
        np.testing.assert_allclose(mine.mean(0), label, atol=0.05)  # 5 sd of a mean
        np.testing.assert_allclose(np.cov(mine.T), np.eye(10), atol=0.07)
    bayes = np.mean((x.sum(1) > 5) == y)  # Phi(sqrt(10) / 2) = 0.9431
    assert bayes == pytest.approx(0.9431, abs=0.008)


def test_spiral_is_the_one_of_the_paper():
    x, y = map(np.asarray, points.spiral(jax.random.key(0), 100))
    t = np.linspace(0, 4 * np.pi, 100)
    plus = np.column_stack([t * np.cos(t), t * np.sin(t)])
    minus = np.column_stack([(t + np.pi) * np.cos(t), (t + np.pi) * np.sin(t)])
    np.testing.assert_allclose(x, np.concatenate([plus, minus]), atol=2e-5)
    np.testing.assert_allclose(x[99], [4 * np.pi, 0], atol=2e-5)
    np.testing.assert_allclose(x[100], [np.pi, 0], atol=2e-5)
    np.testing.assert_array_equal(y, np.repeat([0, 1], 100))


def test_sinusoid_fills_the_disc_of_radius_two_evenly():
    x, y = map(np.asarray, points.sinusoid(jax.random.key(0), 20_000))
    squared = (x.astype(np.float64) ** 2).sum(1) / 4
    assert squared.max() <= 1 + 1e-6
    # The squared radius of a uniform point of the disc is uniform (Kolmogorov, 0.1%).
    assert stats.kstest(squared, "uniform").statistic < 1.95 / 20_000**0.5
    angle = (np.arctan2(x[:, 1], x[:, 0]) + np.pi) / (2 * np.pi)
    assert stats.kstest(angle, "uniform").statistic < 1.95 / 20_000**0.5
    side = 1.5 * x[:, 0].astype(np.float64) + np.sin(1.5 * x[:, 1].astype(np.float64))
    clear = abs(side) > 1e-5
    np.testing.assert_array_equal((y == 1)[clear], (side > 0)[clear])
