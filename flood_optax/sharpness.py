"""How sharp a minimum is: gradient norm, Hessian trace, top eigenvalue.

All three see the Hessian only through its products with vectors, never whole, and take
the raw loss: of a flooded one the signs below the level would be turned round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from flood_optax.checks import as_integer, check_key
from flood_optax.curvature import (
    dot,
    gradient_of,
    hessian_products,
    loss_of_params,
    magnitude,
    norm,
    random_like,
)
from flood_optax.devices import zeros_like

__all__ = ["gradient_norm", "hessian_trace", "top_eigenvalue"]


def gradient_norm(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> jax.Array:
    r"""Computes the Euclidean norm of the gradient over all leaves.

    :math:`|\nabla L| = (\sum_k (\partial L / \partial\theta_k)^2)^{1/2}` with L =
    ``loss_fn`` and :math:`\theta` = ``params``. Squares are summed in float32 at least.
    A NaN in the gradient gives NaN. At a stationary point the value is 0; use
    `flood_optax.penalty.objective` to differentiate it, since the norm has no
    derivative there.

    Args:
      loss_fn: called as ``loss_fn(params, *args, **kwargs)``; returns the raw loss, a
        scalar of a real float dtype, or (loss, aux) with ``has_aux``.
      params: any tree of arrays of real floats, of 16 bits at least.
      *args: handed on to ``loss_fn``.
      has_aux: whether ``loss_fn`` returns (loss, aux).
      **kwargs: handed on to ``loss_fn``.

    Returns:
      A scalar, float32 at least.

    Examples:
      >>> import jax.numpy as jnp
      >>> def loss_fn(params):
      ...     return 3.0 * params["w"] + 2.0 * params["b"] ** 2
      >>> print(gradient_norm(loss_fn, {"w": jnp.array(5.0), "b": jnp.array(1.0)}))
      5.0
    """
    call = "sharpness.gradient_norm"
    loss = loss_of_params(call, loss_fn, params, has_aux, *args, **kwargs)
    return norm(gradient_of(loss, params))


def hessian_trace(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    key: jax.Array,
    num_samples: int,
    has_aux: bool = False,
    **kwargs: Any,
) -> tuple[jax.Array, jax.Array]:
    r"""Estimates the trace of the Hessian by random probes (Hutchinson).

    :math:`\mathrm{tr} H = E[v^\top H v]` for v with independent entries of :math:`\pm
    1`, averaged over ``num_samples`` draws. The estimate is unbiased; off the diagonal
    it has variance :math:`2\sum_{i \ne j} H_{ij}^2` per draw, so it is exact for a
    diagonal Hessian. One draw costs about two gradients; one is in memory at a time.

    Args:
      loss_fn, args, has_aux, kwargs: as in `gradient_norm`.
      params: as there, at least one number.
      key: a random key; the same key gives the same estimate.
      num_samples: number of draws, at least 2; static under jit.

    Returns:
      The estimate and its standard error (sample standard deviation of the draws over
      the square root of their number), two scalars, float32 at least.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> def loss_fn(w):
      ...     return jnp.sum(jnp.array([1.0, 2.5]) * w**2) / 2
      >>> estimate, error = hessian_trace(
      ...     loss_fn, jnp.ones(2), key=jax.random.key(0), num_samples=4
      ... )
      >>> print(estimate, error)
      3.5 0.0

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines, Communications in Statistics, 1990.
    """
    call = "sharpness.hessian_trace"
    num_samples = as_integer(f"{call}(num_samples=...)", num_samples, least=2)
    check_key(f"{call}(key=...)", key)
    loss = loss_of_params(call, loss_fn, params, has_aux, *args, **kwargs)
    product, start = hessian_products(call, loss, params)

    def draw(key: jax.Array) -> jax.Array:
        v = random_like(jax.random.rademacher, key, start)
        return dot(v, product(v))

    keys = jax.random.split(key, num_samples)
    draws = jax.lax.map(draw, keys)
    unit = magnitude(draws)
    error = unit * (draws / unit).std(ddof=1) / num_samples**0.5
    return draws.mean(), error


def top_eigenvalue(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    key: jax.Array,
    num_iterations: int,
    has_aux: bool = False,
    **kwargs: Any,
) -> tuple[jax.Array, optax.Params]:
    r"""Computes the Hessian's eigenvalue of largest magnitude, and its vector.

    Lanczos iteration with full reorthogonalisation: after k = ``num_iterations``
    products the Hessian H is known exactly on the Krylov space of a random start, and
    the eigenvalue of that k x k tridiagonal matrix is returned. A negative eigenvalue
    is found as surely as a positive one. Its magnitude is never over-estimated beyond
    rounding, and with k at least the number of parameters it is exact. Memory is k + 1
    times the parameters.

    Args:
      loss_fn, args, has_aux, kwargs: as in `gradient_norm`.
      params: as there, at least one number.
      key: a random key for the start; the same key gives the same result.
      num_iterations: number of Hessian products, at least 1 (10 to 50 are usual, more
        than the number of parameters are not made); static under jit.

    Returns:
      The eigenvalue, a scalar, float32 at least, and its vector of norm 1, a tree like
      ``params`` in structure, shapes and dtypes; its sign is arbitrary.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> def loss_fn(w):
      ...     return w[0] ** 2 - 2.0 * w[1] ** 2 + 0.5 * w[2] ** 2
      >>> eigenvalue, vector = top_eigenvalue(
      ...     loss_fn, jnp.ones(3), key=jax.random.key(0), num_iterations=3
      ... )
      >>> print(f"{eigenvalue:.3f}", jnp.abs(vector).round(3))
      -4.000 [0. 1. 0.]

    References:
      Golub and Van Loan, Matrix Computations, 4th ed., section 10.3.
    """
    call = "sharpness.top_eigenvalue"
    num_iterations = as_integer(f"{call}(num_iterations=...)", num_iterations, least=1)
    check_key(f"{call}(key=...)", key)
    loss = loss_of_params(call, loss_fn, params, has_aux, *args, **kwargs)
    product, start = hessian_products(call, loss, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(start))
    basis, tridiagonal = _lanczos(product, start, key, min(num_iterations, size))
    unit = magnitude(tridiagonal)  # the solver squares
    eigenvalues, vectors = jnp.linalg.eigh(tridiagonal / unit)
    top = jnp.argmax(jnp.abs(eigenvalues))
    vector = _combined(vectors[:, top], basis)
    return unit * eigenvalues[top], optax.tree.cast_like(vector, params)


def _lanczos(
    product: Callable[[optax.Updates], optax.Updates],
    start: optax.Params,
    key: jax.Array,
    num_iterations: int,
) -> tuple[optax.Updates, jax.Array]:
    """An orthonormal Krylov basis of a random start, and the Hessian in it [k, k].

    The basis is a tree like `start` with a leading axis of k rows.
    """
    dtype = jax.tree.leaves(start)[0].dtype
    tiny = np.finfo(dtype).tiny

    def orthonormal(v: optax.Updates, basis: optax.Updates) -> optax.Updates:
        for _ in range(2):  # once leaves what rounding brings back; twice is enough
            v = _without(basis, v)
            length = jnp.maximum(norm(v), tiny)
            v = jax.tree.map(lambda x, length=length: x / length, v)
        return v

    def step(
        carry: tuple[optax.Updates, optax.Updates], i: jax.Array
    ) -> tuple[tuple[optax.Updates, optax.Updates], tuple[jax.Array, jax.Array]]:
        basis, v = carry
        image = product(v)
        # Where the Krylov space is exhausted this is rounding, or 0: by then a random
        # start has found every eigenvalue, and such a row brings none that is larger.
        rest = _without(basis, image)
        following = orthonormal(rest, basis)
        # after the last product there is no row left, and nothing is added
        basis = _with_row(basis, i + 1, following)
        return (basis, following), (dot(v, image), norm(rest))

    rows = jnp.zeros(num_iterations, dtype)
    empty = jax.tree.map(lambda x: _column(rows, x) + zeros_like(x), start)
    first = orthonormal(random_like(jax.random.normal, key, start), empty)
    carry = _with_row(empty, 0, first), first
    numbers = jnp.arange(num_iterations)
    (basis, _), (diagonal, off_diagonal) = jax.lax.scan(step, carry, numbers)
    side = jnp.diag(off_diagonal[:-1], 1)
    return basis, jnp.diag(diagonal) + side + side.T


# Sums of products, where one array would have matmuls: of arrays on explicit axes JAX
# contracts none that are split.


def _without(basis: optax.Updates, v: optax.Updates) -> optax.Updates:
    """What is left of v beside the rows of the basis."""

    def parts(b: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(b * x, axis=tuple(range(1, b.ndim)))

    factors = jnp.asarray(sum(jax.tree.leaves(jax.tree.map(parts, basis, v))))
    return jax.tree.map(jnp.subtract, v, _combined(factors, basis))


def _combined(factors: jax.Array, basis: optax.Updates) -> optax.Updates:
    """The rows of the basis, times these factors, added up."""
    return jax.tree.map(lambda b: jnp.sum(_column(factors, b[0]) * b, axis=0), basis)


def _with_row(basis: optax.Updates, i: ArrayLike, v: optax.Updates) -> optax.Updates:
    """The basis with v in row i, which is zero before."""
    rows = jnp.arange(len(jax.tree.leaves(basis)[0])) == i
    return jax.tree.map(lambda b, x: b + _column(rows, x).astype(x.dtype) * x, basis, v)


def _column(rows: jax.Array, x: jax.Array) -> jax.Array:
    """One number per row, to be multiplied with rows like x."""
    return rows.reshape(-1, *(1 for _ in x.shape))
