"""The data are the published ones; labels are flipped at an exact rate."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from sklearn import datasets

from benchmarks import data


def in_order(x, y):
    """The examples as rows, whatever order they came in."""
    rows = np.column_stack([x, y])
    return rows[np.lexsort(rows.T)]


def test_digits_are_split_without_loss_or_repetition():
    pixels, labels = datasets.load_digits(return_X_y=True)
    split = data.digits(train=700, validation=300, seed=3)
    x = np.concatenate([split.train_x, split.validation_x, split.test_x])
    y = np.concatenate([split.train_y, split.validation_y, split.test_y])
    assert [len(part) for part in split[::2]] == [700, 300, 797]
    np.testing.assert_array_equal(in_order(16 * x, y), in_order(pixels, labels))
    assert split.train_x.dtype == np.float32
    assert split.train_y.dtype == np.int32
    with pytest.raises(ValueError, match="must leave examples of the 1797, got 1797"):
        data.digits(train=1797)


def test_digits_flips_an_exact_share_keyed_by_the_seed():
    clean = data.digits(train=600, validation=101, seed=1)
    noisy = data.digits(train=600, validation=101, noise=0.2, seed=1)
    np.testing.assert_array_equal(clean.train_x, noisy.train_x)
    assert (clean.train_y != noisy.train_y).sum() == 120
    assert (clean.validation_y != noisy.validation_y).sum() == 20  # floor(20.2)
    np.testing.assert_array_equal(clean.test_y, noisy.test_y)
    again = data.digits(train=600, validation=101, noise=0.2, seed=1)
    np.testing.assert_array_equal(noisy.train_y, again.train_y)
    other = data.digits(train=600, validation=101, noise=0.2, seed=2)
    assert (other.train_y != noisy.train_y).any()


def flipped(seed, labels):
    return data.flip(np.random.default_rng(seed), labels, 0.29, 5)


def test_flips_are_exact_where_the_product_rounds_down_and_even():
    assert 0.29 * 100 < 29
    labels = np.arange(100, dtype=np.int32) % 5
    every = np.stack([flipped(seed, labels) for seed in range(60)])
    assert every.dtype == labels.dtype
    np.testing.assert_array_equal(labels, np.arange(100) % 5)  # as they were
    changed = every != labels
    assert set(changed.sum(1)) == {29}
    moved = np.bincount(((every - labels) % 5)[changed], minlength=5)
    mean = 60 * 29 / 4  # of four shifts; five standard deviations of a binomial
    assert moved[0] == 0
    assert np.abs(moved[1:] - mean).max() < 5 * mean**0.5
    assert np.abs(changed.mean(0) - 0.29).max() < 5 * (0.29 * 0.71 / 60) ** 0.5
