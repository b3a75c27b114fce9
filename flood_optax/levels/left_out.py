"""Scores of examples that were left out, in closed form: kernel ridge regression."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.checks import as_integer, as_integers, check_that, is_real
from flood_optax.levels.blocks import numbered

WIDTHS = (0.1, 0.25, 0.5, 1.0)  # of the kernel, in root median distances
RIDGES = np.logspace(-3, 0, 7)


def leave_one_out(
    features: ArrayLike, labels: ArrayLike, num_classes: int, *, groups: Any = None
) -> jax.Array:
    r"""Returns class scores of each example by a model that was fitted without it.

    Kernel ridge regression on one-hot labels Y: with the kernel :math:`K_{ij} =
    \exp(-|x_i - x_j|^2 / (w^2 m))`, m the median of the squared distances, and
    :math:`G = (K + \lambda I)^{-1}` the scores without example i are :math:`y_i - (G
    Y)_i / G_{ii}`, exactly what a model gives that is fitted on the others. The width w
    (.1, .25, .5, 1) and the ridge :math:`\lambda` (.001 to 1) are those of the least
    squared leave-one-out error. Nothing is trained, and no validation set is needed.

    The largest score is the prediction; `noise_rate` takes the scores, and so does
    everything that compares a label with what the other examples say. They are no
    probabilities: they need not be positive, nor have sum 1.

    **Features** are used as they are: standardise columns of different units, as by
    ``(x - x.mean(0)) / x.std(0)``. Those of a pretrained net do; those of a net that
    was trained on these labels do not, since it has learned the wrong ones too.

    **Copies** of an example tell its label. Rows that are equal are left out together.
    Of augmented copies, sentences of one document or frames of one video say so by
    ``groups``.

    Computed by NumPy in float64, from one eigendecomposition for each width: time grows
    as n cubed, memory as n squared. On one core 1,000 examples take .6 seconds, 2,000
    4 and 4,000 40, these with .9 GB. Of more, take a random subset.

    Args:
      features: real numbers [n, d], n >= 2 c.
      labels: integers [n] in [0, c), as given, noise included; at least two classes.
      num_classes: c, an int >= 2. The score of a class that no label names is 0.
      groups: which examples belong together, [n] of any hashable values or integers;
        None groups equal rows.

    Returns:
      Scores [n, c], float32 at least: near 1 for the class that the others suggest,
      near 0 for the rest.

    Raises:
      ValueError: for shapes and labels that do not fit, features that are NaN, infinite
        or all equal, labels of one class, and a single group.
      TypeError: for complex features, labels that are no integers, and tracers.

    Examples:
      >>> x = jnp.array([[0.0], [0.1], [0.2], [0.3], [2.0], [2.1], [2.2], [2.3]])
      >>> labels = jnp.array([0, 0, 1, 0, 1, 1, 1, 1])  # the third one looks wrong
      >>> scores = leave_one_out(x, labels, num_classes=2)
      >>> print(scores.argmax(axis=1))
      [0 0 0 0 1 1 1 1]

    References:
      Rifkin and Lippert, Notes on Regularized Least Squares, 2007, section 4.
    """
    x, y = _checked(features, labels, num_classes)
    n = len(y)
    _, row = np.unique(x, axis=0, return_inverse=True)
    if groups is None:
        group = row.reshape(n)
    else:
        group, _ = numbered("leave_one_out(groups=...)", groups, n)
    got = "equal ones" if groups is None else "one group in `groups`"
    call = "leave_one_out(features)"
    check_that(group.max() > 0, call, "have rows that differ", got)
    return jnp.asarray(_scores(x, np.eye(num_classes)[y], row.reshape(n), group))


def _checked(
    features: ArrayLike, labels: ArrayLike, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The features in float64 and the labels, of which a model can be made."""
    call = "leave_one_out(features)"
    got = "a tracer: call it before training, outside of `jax.jit`"
    for name, given in (("features", features), ("labels", labels)):
        known = not isinstance(given, Tracer)
        check_that(known, f"leave_one_out({name})", "be known", got, error=TypeError)
    c = as_integer("leave_one_out(num_classes=...)", num_classes, least=2)
    x = np.asarray(features)
    got = f"dtype {x.dtype}"
    check_that(is_real(x.dtype), call, "be real numbers", got, error=TypeError)
    remedy = "[:, None]" if x.ndim == 1 else ".reshape(len(features), -1)"
    got = f"{x.shape}: pass `features{remedy}`"
    check_that(x.ndim == 2, call, "be of shape [n, d]", got)
    y = np.asarray(as_integers("leave_one_out(labels)", labels, below=c))
    both, got = "leave_one_out(features, labels)", f"{x.shape} and {y.shape}"
    check_that(y.shape == x.shape[:1], both, "be of shapes [n, d] and [n]", got)
    rule = f"have at least two examples for each of the {c} classes, and a feature"
    check_that(len(y) >= 2 * c and x.size, call, rule, f"shape {x.shape}")
    x = x.astype(np.float64)
    bad = int((~np.isfinite(x)).any(axis=1).sum())
    got = f"NaN or infinity in {bad} of {len(x)} rows"
    check_that(not bad, call, "be finite", got)
    call, rule = "leave_one_out(labels)", "name two classes at least"
    check_that(len({*y.tolist()}) > 1, call, rule, f"{y[0]} alone")
    return x, y


def _scores(
    x: np.ndarray, one_hot: np.ndarray, row: np.ndarray, group: np.ndarray
) -> np.ndarray:
    """The scores of the width and ridge of the least squared leave-one-out error."""
    x = np.ldexp(
        x, -np.frexp(abs(x).max())[1]
    )  # its squares neither overflow nor vanish
    x = x - x.mean(axis=0)  # so that little cancels in the distances
    squares = (x**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0)
    distances[row[:, None] == row] = 0
    median = np.median(distances[distances > 0])
    _, sizes = np.unique(group, return_counts=True)
    together = [np.flatnonzero(group == k) for k in np.flatnonzero(sizes > 1)]
    found, least = one_hot, np.inf
    for width in WIDTHS:
        values, vectors = np.linalg.eigh(np.exp(-distances / (width**2 * median)))
        in_basis = vectors.T @ one_hot
        for ridge in RIDGES:
            inverse = 1 / (values + ridge)
            solved = vectors @ (inverse[:, None] * in_basis)
            errors = solved / (vectors**2 @ inverse)[:, None]
            for members in together:  # the block of the inverse, for its diagonal
                own = vectors[members]
                block = own * inverse @ own.T
                errors[members] = np.linalg.solve(block, solved[members])
            error = (errors**2).sum()
            if error < least:
                found, least = one_hot - errors, error
    return found
