"""Levels from the noise of the labels, known or estimated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlog1py
from jax.typing import ArrayLike

from flood_optax.bend import wide
from flood_optax.checks import integer, integers, number
from flood_optax.levels.targets import entropy_floor, probabilities


def noise_floor(noise: ArrayLike, num_classes: int | None = None) -> jax.Array:
    r"""Returns the least cross-entropy that noisy labels leave reachable.

    The entropy of a label that is flipped at rate :math:`\eta` = ``noise`` evenly to
    one of the c - 1 other classes, :math:`-(1 - \eta)\log(1 - \eta) -
    \eta\log(\eta / (c - 1))`, or of each row of a transition matrix. No model has a
    lower expected loss on such labels, however good it is; a training loss below it has
    learned flips by heart. Where classes overlap the least loss is higher. For squared
    errors and targets with noise of variance :math:`\sigma^2` it is
    :math:`\sigma^2`.

    Args:
      noise: the rate, a scalar in [0, 1]; or a transition matrix [c, c] with the
        probabilities of the noisy label in the row of the true class, such as from
        `noise_matrix`.
      num_classes: c, an int >= 2; needed with a rate.

    Returns:
      The floor, float32 at least: a scalar for a rate, [c] for a matrix, by true class:
      the level of a batch is their mean weighted by the frequency of the classes. No
      gradient flows into it.

    Examples:
      >>> print(f"{noise_floor(0.2, num_classes=10):.4f}")
      0.9398
      >>> floors = noise_floor(jnp.array([[1.0, 0.0], [0.25, 0.75]]))
      >>> print([f"{nats:.4f}" for nats in floors])
      ['0.0000', '0.5623']

    References:
      Toner and Storkey, Label Noise: Correcting the Forward-Correction, 2023,
      https://arxiv.org/abs/2307.13100
    """
    shape = np.shape(noise)
    if shape != ():
        if len(shape) != 2 or shape[0] != shape[1] or num_classes not in (None, *shape):
            raise ValueError(
                "`noise_floor(noise)` must be a rate or a transition matrix [c, c], c "
                f"= num_classes, got shape {shape} and num_classes={num_classes}."
            )
        return entropy_floor(probabilities(noise, "noise_floor(noise)"))
    if num_classes is None:
        raise ValueError("`noise_floor(noise)` with a rate needs `num_classes`.")
    c = integer("noise_floor(num_classes=...)", num_classes, least=2)
    number("noise_floor(noise=...)", noise, "in [0, 1]", lambda rate: 0 <= rate <= 1)
    rate = jax.lax.stop_gradient(wide(noise))
    # A processor may take the smallest numbers for zero, of which log is infinite.
    log_rate = jnp.log(jnp.maximum(rate, jnp.finfo(rate.dtype).tiny))
    return rate * (np.log(c - 1) - log_rate) - xlog1py(1 - rate, -rate)


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
      labels: integers [n] in [0, c), as given, noise included.

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
    y = integers("noise_matrix(labels)", labels, below=p.shape[-1])
    if p.ndim != 2 or y.shape != p.shape[:1] or y.size == 0:
        raise ValueError(
            "`noise_matrix(probs, labels)` must be of shapes [n, c] and [n], got "
            f"{p.shape} and {y.shape}."
        )
    n, c = p.shape
    own = p[jnp.arange(n), y]
    number_of = jnp.zeros(c, p.dtype).at[y].add(1)
    highest = jnp.full(c, -jnp.inf, p.dtype).at[y].max(own)
    mean = jnp.zeros(c, p.dtype).at[y].add(own) / jnp.maximum(number_of, 1)
    # Rounded, the mean of equal numbers may exceed them all: then none would count.
    threshold = jnp.where(number_of > 0, jnp.minimum(mean, highest), jnp.inf)
    confident = p >= threshold
    true = jnp.where(confident, p, -1).argmax(axis=-1)
    counts = jnp.zeros((c, c), p.dtype).at[y, true].add(confident.any(axis=-1))
    none = counts.sum(axis=1) == 0
    counts = jnp.where(none[:, None], jnp.eye(c, dtype=p.dtype), counts)
    joint = counts / counts.sum(axis=1, keepdims=True) * number_of[:, None]
    total = joint.sum(axis=0)[:, None]
    known = total > 0
    return jnp.where(known, joint.T / jnp.where(known, total, 1), jnp.eye(c))
