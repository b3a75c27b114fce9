"""Levels for losses of other kinds: the table of docs/choosing-b.md, by definition.

The oracle is the least mean loss that any prediction can have, found by NumPy from the
distribution of the noisy target.
"""

import math
import pathlib
import statistics

import numpy as np

from flood_optax import levels
from tests.claims.test_docs import blocks

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "choosing-b.md"

MATRIX = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.05, 0.05, 0.9]])
CLASSES = np.array([0.5, 0.2, 0.3])  # how frequent each true class is


def least_cross_entropy(target):
    """Over a fine grid of predictions for three classes."""
    steps = np.arange(1, 400) / 400
    a, b = np.meshgrid(steps, steps, indexing="ij")
    p = np.stack([a, b, 1 - a - b])[:, a + b < 1 - 1e-9]
    return (-np.log(p) * target[:, None]).sum(0).min()


def test_level_of_smoothed_labels_is_the_least_loss_on_smoothed_noisy_labels():
    eps, c = 0.1, 3
    given = CLASSES @ MATRIX  # the frequencies of the labels
    smooth = lambda p: (1 - eps) * p + eps / c
    level = levels.noise_floor(smooth(MATRIX), label_frequencies=smooth(given))
    least = CLASSES @ [least_cross_entropy(row) for row in smooth(MATRIX)]
    np.testing.assert_allclose(level, least, rtol=2e-4)
    wrong = levels.noise_floor(smooth(MATRIX), label_frequencies=given)
    assert abs(wrong / least - 1) > 2e-3, "the frequencies are smoothed too"


def test_level_of_each_label_is_the_least_mean_loss_of_the_examples_that_have_it():
    """A census of a million labels, by the page's code and one by one."""
    given = CLASSES @ MATRIX
    (code,) = [text for text in blocks(PAGE.read_text()) if "by_label =" in text]
    imports = next(blocks(PAGE.read_text()))
    exec(imports + code, names := {})
    np.testing.assert_allclose(names["frequencies"], given, rtol=1e-6)
    np.testing.assert_allclose(names["matrix"], MATRIX, rtol=1e-6)
    counts = np.rint(1e6 * CLASSES[:, None] * MATRIX).astype(int)
    true, label = (np.repeat(i.ravel(), counts.ravel()) for i in np.indices((3, 3)))
    predicted = counts / counts.sum(1, keepdims=True)  # nobody knows more of an example
    losses = -np.log(predicted[true, label])
    for j in range(3):
        np.testing.assert_allclose(
            names["by_label"][j], losses[label == j].mean(), rtol=1e-5
        )
    by_class = np.asarray(levels.noise_floor(MATRIX))
    assert abs(by_class / names["by_label"] - 1).max() > 0.5, "not those of the classes"


def test_level_of_several_binary_outputs_is_the_mean_of_their_floors():
    shares = 0.1, 0.3
    p = np.arange(1, 10_000) / 10_000
    least = [(-(1 - e) * np.log(p) - e * np.log(1 - p)).min() for e in shares]
    floors = [levels.noise_floor(e, 2) for e in shares]
    np.testing.assert_allclose(np.mean(floors), np.mean(least), rtol=1e-4)


def test_levels_of_noisy_targets_are_the_least_losses_of_a_constant():
    sigma = 0.7
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    noise = np.array([statistics.NormalDist(0, sigma).inv_cdf(q) for q in quantiles])
    shift = np.linspace(-0.2, 0.2, 41)[:, None]
    np.testing.assert_allclose(
        ((noise - shift) ** 2).mean(1).min(), sigma**2, rtol=1e-3
    )
    np.testing.assert_allclose(abs(noise - shift).mean(1).min(), 0.8 * sigma, rtol=4e-3)
    width = np.linspace(0.5, 0.9, 81)[:, None]
    likelihood = np.log(width) + 0.5 * np.log(2 * np.pi) + noise**2 / (2 * width**2)
    expected = 0.5 * math.log(2 * math.pi * math.e * sigma**2)
    np.testing.assert_allclose(likelihood.mean(1).min(), expected, rtol=1e-3)
