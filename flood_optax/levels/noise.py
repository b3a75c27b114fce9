"""Levels from the noise of the labels, known or estimated."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.bend import nan_where
from flood_optax.checks import (
    NEVER_EVALUATED,
    FloodWarning,
    as_integer,
    as_integers,
    as_real_array,
    check_number,
    check_that,
)
from flood_optax.levels.meshes import replicated, whole
from flood_optax.levels.targets import entropies, probabilities
from flood_optax.precision import wide


def noise_floor(
    noise: ArrayLike,
    num_classes: int | None = None,
    *,
    label_frequencies: ArrayLike | None = None,
) -> jax.Array:
    r"""Returns the least cross-entropy that noisy labels leave reachable.

    The entropy of a label that is flipped at rate :math:`\eta` = ``noise`` evenly to
    one of the c - 1 other classes, :math:`-(1 - \eta)\log(1 - \eta) -
    \eta\log(\eta / (c - 1))`, or of each row of a transition matrix M. No model has a
    lower expected loss on such labels, however good it is; a training loss below it has
    learned flips by heart. Where classes overlap the least loss is higher. For squared
    errors and targets with noise of variance :math:`\sigma^2` it is
    :math:`\sigma^2`.

    The rows of M are by TRUE class, which no label tells. The level of a whole set
    weighs them by how frequent the true classes are: :math:`w = M^{-T} f` for the
    frequencies f = ``label_frequencies`` of the labels as given, negative ones set to 0
    and the sum to 1. If M is singular w is the shortest solution.

    **Only for noise that does not depend on the input.** If wrong labels can be told
    from the input, as those of a weak annotator, a model may rightly learn them, and
    the floor is too high: on digits labelled by a weak linear model (24.7 % wrong)
    flooding at the floor of the true rate lost 9.5 points of accuracy.

    Args:
      noise: the rate, a scalar in [0, 1]; or a transition matrix [c, c] with the
        probabilities of the noisy label in the row of the true class, such as from
        `noise_matrix`.
      num_classes: c, an int >= 2; needed with a rate.
      label_frequencies: with a matrix, how frequent each label is in the training set,
        real floats [c] with sum 1.

    Returns:
      The floor, float32 at least: a scalar for a rate, and for a matrix with
      ``label_frequencies``: the level of the whole set. For a matrix alone [c], by true
      class. No gradient flows into it.

    Raises:
      ValueError: for numbers out of range, shapes that do not fit, rows or frequencies
        without sum 1.

    Warns:
      FloodWarning: if the floors of a matrix are all 0, which is no flooding.

    Examples:
      >>> print(f"{noise_floor(0.2, num_classes=10):.4f}")
      0.9398
      >>> matrix = jnp.array([[1.0, 0.0], [0.25, 0.75]])  # a quarter of class 1 flips
      >>> print([f"{nats:.4f}" for nats in noise_floor(matrix)])
      ['0.0000', '0.5623']
      >>> frequencies = jnp.array([0.4, 0.6])  # of the labels; 0.2, 0.8 of the classes
      >>> print(f"{noise_floor(matrix, label_frequencies=frequencies):.4f}")
      0.4499

    References:
      Toner and Storkey, Label Noise: Correcting the Forward-Correction, 2023,
      https://arxiv.org/abs/2307.13100
    """
    shape = np.shape(noise)
    if shape != ():
        square = len(shape) == 2 and shape[0] == shape[1]
        rule = "be a rate or a transition matrix [c, c], c = num_classes"
        got = f"shape {shape} and num_classes={num_classes}"
        fits = square and num_classes in (None, *shape)
        check_that(fits, "noise_floor(noise)", rule, got)
        matrix = replicated(probabilities(noise, "noise_floor(noise)"))
        floors = entropies(matrix)
        if not isinstance(floors, Tracer) and not (floors > 0).any():
            warnings.warn(
                "`noise_floor(noise)` is a matrix without flips: every floor is 0, "
                "and flooding at 0 is off. From probabilities of examples that the "
                "model was fitted on it always is: take those of `levels.held_out`.",
                FloodWarning,
                stacklevel=2,
            )
        if label_frequencies is None:
            return floors
        return (_true_frequencies(matrix, label_frequencies) * floors).sum()
    call, got = "noise_floor(label_frequencies=...)", "some with a rate"
    without = label_frequencies is None
    check_that(without, call, "come with a transition matrix as `noise`", got)
    c = as_integer("noise_floor(num_classes=...)", num_classes, least=2)
    check_number("noise_floor(noise=...)", noise, "in [0, 1]")
    rate = jax.lax.stop_gradient(wide(noise))
    # Neither log is infinite at the ends, where it is multiplied by 0.
    info = jnp.finfo(rate.dtype)
    log_rate = jnp.log(jnp.maximum(rate, info.tiny))
    log_rest = jnp.log1p(-jnp.minimum(rate, 1 - float(info.eps) / 2))
    return rate * (np.log(c - 1) - log_rate) - (1 - rate) * log_rest


def _true_frequencies(matrix: jax.Array, label_frequencies: ArrayLike) -> jax.Array:
    """How frequent the true classes are: M^T w = f, on the simplex."""
    call = "noise_floor(label_frequencies=...)"
    of, shape = matrix.shape[:1], np.shape(label_frequencies)
    check_that(shape == of, call, f"be of shape {of}, one for each class", shape)
    dtype = getattr(label_frequencies, "dtype", np.dtype(float))
    got = f"counts of dtype {dtype}: divide them by their sum"
    counts = jnp.issubdtype(dtype, jnp.integer)
    check_that(not counts, call, "have sum 1", got, error=TypeError)
    frequencies = replicated(probabilities(label_frequencies, call))
    frequencies = frequencies.astype(matrix.dtype)
    weights = jnp.maximum(jnp.linalg.lstsq(matrix.T, frequencies)[0], 0)
    return weights / weights.sum()


def noise_matrix(probs: ArrayLike, labels: ArrayLike) -> jax.Array:
    r"""Estimates from held-out probabilities how labels were flipped.

    Confident learning: an example is counted as truly of the class j whose probability
    is largest among those that reach their threshold, :math:`t_j`, the mean of
    :math:`p_j` over the examples labelled j. The counts C[k, j] of examples labelled k,
    each row scaled to the number of these examples, estimate the joint distribution;
    divided by its sum over k, it is the transition from true to noisy labels.

    Of equal probabilities the lowest class counts. An example of which no probability
    reaches its threshold counts nowhere; if none labelled k counts, they are taken as
    rightly labelled. A class that no label names is never the true one, and a class
    that is never the true one gets the row of no flips. Where the models err themselves
    flips are overestimated, and with them the floor.

    Args:
      probs: real floats [n, c], rows of probabilities, each by a model that was fitted
        without the example: `held_out`.
      labels: integers [n] in [0, c), as given, noise included; if a traced one is no
        class, all is NaN.

    Returns:
      The transition matrix [c, c], float32 at least: in row j the probabilities of the
      labels that an example of class j gets, with sum 1. For `noise_floor`.

    Examples:
      >>> p = jnp.array([0.9, 0.8, 0.1, 0.2, 0.1])  # of class 0
      >>> labels = jnp.array([0, 0, 1, 1, 0])  # the last one may be a flip
      >>> matrix = noise_matrix(jnp.stack([p, 1 - p], axis=1), labels)
      >>> print([[f"{share:.2f}" for share in row] for row in matrix])
      [['1.00', '0.00'], ['0.33', '0.67']]

    References:
      Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset
      Labels, JAIR 2021, https://arxiv.org/abs/1911.00068
    """
    p = probabilities(probs, "noise_matrix(probs)")
    y = as_integers("noise_matrix(labels)", labels, below=p.shape[-1])
    call, got = "noise_matrix(probs, labels)", f"{p.shape} and {y.shape}"
    fits = p.ndim == 2 and y.shape == p.shape[:1] and y.size
    check_that(fits, call, "be of shapes [n, c] and [n]", got)
    c, y = p.shape[1], y.astype(jnp.int32)
    given = y[:, None] == jnp.arange(c, dtype=jnp.int32)[None]
    # Sums of a masked [n, c], which XLA adds in a tree: a scatter adds one by one, and
    # drifts in float32.
    number_of = given.sum(axis=0)
    outside = number_of.sum() != y.size  # known of traced labels only here
    own = jnp.where(given, p, 0)
    mean = own.sum(axis=0) / jnp.maximum(number_of, 1).astype(p.dtype)
    # Rounded, the mean of equal numbers may exceed them all: then none would count.
    threshold = jnp.where(number_of > 0, jnp.minimum(mean, own.max(axis=0)), jnp.inf)
    confident = p >= threshold[None]
    true = jnp.where(confident, p, -1).argmax(axis=-1)
    counts = jnp.zeros((c, c), jnp.int32)  # exact to 2^31, float32 to 2^24
    one = confident.any(axis=-1).astype(jnp.int32)
    counts = counts.at[y, true].add(one, out_sharding=whole(true, y))
    eye = jnp.eye(c, dtype=p.dtype)
    counts = jnp.where(counts.any(axis=1, keepdims=True), counts.astype(p.dtype), eye)
    number_of = number_of.astype(p.dtype)[:, None]
    joint = counts / counts.sum(axis=1, keepdims=True) * number_of
    total = joint.sum(axis=0)[:, None]
    known = total > 0
    matrix = jnp.where(known, joint.T / jnp.where(known, total, 1), eye)
    return nan_where(outside, matrix)


def noise_rate(
    scores: ArrayLike, labels: ArrayLike, *, confident: float = 0.5
) -> jax.Array:
    r"""Estimates the share of wrong labels from scores of examples that were held out.

    The share of labels that differ from the class of the largest score, among the part
    ``confident`` of the examples whose largest score is furthest above the second. The
    other part is left out because the scores err there themselves; of examples that
    tie for the last place each counts for a part.

    It measures how many labels the features contradict. Of noise that does not depend
    on the input these are nearly all. Of noise that does, as the labels of a weak
    annotator, it finds less (of 26 % on digits .6 %), which is the safe side: a level
    too low costs less than one too high.

    Args:
      scores: real floats [n, c], larger for likelier classes, each by a model that was
        fitted without the example: `leave_one_out`, `held_out`.
      labels: integers [n] in [0, c), as given.
      confident: which part of the examples is asked, in (0, 1].

    Returns:
      The share of wrong labels, a scalar in [0, 1], float32 at least, for
      `noise_floor`; NaN if a traced score is NaN, or a traced label no class.

    Raises:
      ValueError: for scores that are NaN, and shapes and numbers that do not fit.
      TypeError: for scores that are no real floats, and labels that are no integers.

    Examples:
      >>> scores = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.95, 0.05]])
      >>> labels = jnp.array([0, 1, 1, 1])  # the third is unclear, the last is wrong
      >>> print(f"{noise_rate(scores, labels, confident=0.75):.4f}")
      0.3333
    """
    p = replicated(wide(as_real_array(scores, "noise_rate(scores)")))
    call, got = "noise_rate(scores, labels)", f"{p.shape} and {np.shape(labels)}"
    fits = p.ndim == 2 and p.shape[1] > 1 and np.shape(labels) == p.shape[:1] and p.size
    check_that(fits, call, "be of shapes [n, c] and [n], c at least 2", got)
    y = as_integers("noise_rate(labels)", labels, below=p.shape[1])
    y = replicated(y.astype(jnp.int32))
    check_number("noise_rate(confident=...)", confident, "in (0, 1]")
    outside = ((y < 0) | (y >= p.shape[1])).any()
    missing = jnp.isnan(p).any()
    known = isinstance(missing, Tracer) or not missing
    check_that(known, "noise_rate(scores)", "not be NaN", f"some: {NEVER_EVALUATED}")
    asked = math.ceil(confident * len(y))
    first, second = jax.lax.top_k(p, 2)[0].T
    margin = first - second
    last = jnp.sort(margin)[len(y) - asked]
    surer, tied = margin > last, margin == last
    left = (asked - surer.sum()).astype(p.dtype) / tied.sum().astype(p.dtype)
    counts = jnp.where(surer, 1, jnp.where(tied, left, 0))
    wrong = p.argmax(axis=1).astype(jnp.int32) != y
    share = jnp.where(wrong, counts, 0).sum() / asked
    return nan_where(missing | outside, share)
