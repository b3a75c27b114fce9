"""How sharp a minimum is: gradient norm, Hessian trace, top eigenvalue.

All three see the Hessian only through its products with vectors, never whole.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from flood_optax.checks import scalar_loss


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
      loss_fn: called as ``loss_fn(params, *args, **kwargs)``; returns a scalar loss of
        a real float dtype, or (loss, aux) with ``has_aux``.
      params: any tree of real floating-point arrays.
      *args: handed on to ``loss_fn``.
      has_aux: whether ``loss_fn`` returns (loss, aux).
      **kwargs: handed on to ``loss_fn``.

    Returns:
      A scalar, float32 at least.

    Raises:
      TypeError: if a leaf of ``params`` or the loss is not a real float, or the loss a
        tuple without ``has_aux``.
      ValueError: if the loss is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> def loss_fn(params):
      ...     return 3.0 * params["w"] + 2.0 * params["b"] ** 2
      >>> print(gradient_norm(loss_fn, {"w": jnp.array(5.0), "b": jnp.array(1.0)}))
      5.0
    """
    call = "sharpness.gradient_norm"
    loss = loss_of_params(
        call, loss_fn, params, has_aux=has_aux, args=args, kwargs=kwargs
    )
    return optax.tree.norm(jax.tree.map(wide, gradient_of(loss, params)))


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
      loss_fn: called as ``loss_fn(params, *args, **kwargs)``; returns a scalar loss of
        a real float dtype, or (loss, aux) with ``has_aux``.
      params: any tree of real floating-point arrays.
      *args: handed on to ``loss_fn``.
      key: a random key; the same key gives the same estimate.
      num_samples: number of draws, at least 2; static under jit.
      has_aux: whether ``loss_fn`` returns (loss, aux).
      **kwargs: handed on to ``loss_fn``.

    Returns:
      The estimate and its standard error (sample standard deviation of the draws over
      the square root of their number), two scalars, float32 at least.

    Raises:
      TypeError: if a leaf of ``params`` or the loss is not a real float, the loss a
        tuple without ``has_aux``, or ``num_samples`` not an int.
      ValueError: if the loss is not a scalar, ``params`` is empty or ``num_samples``
        less than 2.

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
    _check_count(f"{call}(num_samples=...)", num_samples, minimum=2)
    loss = loss_of_params(
        call, loss_fn, params, has_aux=has_aux, args=args, kwargs=kwargs
    )
    product, start, _ = _flat_hessian(call, loss, params)

    def draw(key: jax.Array) -> jax.Array:
        v = jax.random.rademacher(key, start.shape, start.dtype)
        return v @ product(v)

    keys = jax.random.split(key, num_samples)
    draws = cast(jax.Array, jax.lax.map(draw, keys))
    return draws.mean(), draws.std(ddof=1) / num_samples**0.5


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
      loss_fn: called as ``loss_fn(params, *args, **kwargs)``; returns a scalar loss of
        a real float dtype, or (loss, aux) with ``has_aux``.
      params: any tree of real floating-point arrays.
      *args: handed on to ``loss_fn``.
      key: a random key for the start; the same key gives the same result.
      num_iterations: number of Hessian products, at least 1 (10 to 50 are usual, more
        than the number of parameters are not made); static under jit.
      has_aux: whether ``loss_fn`` returns (loss, aux).
      **kwargs: handed on to ``loss_fn``.

    Returns:
      The eigenvalue, a scalar, float32 at least, and its vector of norm 1, a tree like
      ``params`` in structure, shapes and dtypes; its sign is arbitrary.

    Raises:
      TypeError: if a leaf of ``params`` or the loss is not a real float, the loss a
        tuple without ``has_aux``, or ``num_iterations`` not an int.
      ValueError: if the loss is not a scalar, ``params`` is empty or
        ``num_iterations`` less than 1.

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
    _check_count(f"{call}(num_iterations=...)", num_iterations, minimum=1)
    loss = loss_of_params(
        call, loss_fn, params, has_aux=has_aux, args=args, kwargs=kwargs
    )
    product, start, unravel = _flat_hessian(call, loss, params)
    basis, tridiagonal = _lanczos(product, start, key, min(num_iterations, start.size))
    eigenvalues, vectors = cast(Callable[[Any], Any], jnp.linalg.eigh)(tridiagonal)
    top = jnp.argmax(jnp.abs(eigenvalues))
    return eigenvalues[top], unravel(basis.T @ vectors[:, top])


def loss_of_params(
    call: str,
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *,
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[[optax.Params], tuple[jax.Array, Any]]:
    """The function params -> (loss, aux), its other arguments bound and all checked."""
    if not callable(loss_fn):
        raise TypeError(
            f"`{call}(loss_fn)` must be callable, got {type(loss_fn).__name__}."
        )
    leaves = cast(list[tuple[Any, Any]], jax.tree.leaves_with_path(params))
    for path, leaf in leaves:
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`{call}(params)` must hold real floats only, got dtype {dtype} at "
                f"params{jax.tree_util.keystr(path)}: close over what is not trained."
            )

    def loss(params: optax.Params) -> tuple[jax.Array, Any]:
        result: Any = loss_fn(params, *args, **kwargs)
        kind, aux = type(result).__name__, None
        parts = len(cast(tuple[Any, ...], result)) if isinstance(result, tuple) else 1
        if has_aux and parts != 2:
            raise TypeError(
                f"`{call}(has_aux=True)` needs loss_fn to return (loss, aux), "
                f"got {kind}."
            )
        if isinstance(result, tuple) and not has_aux:
            raise TypeError(
                f"`{call}(loss_fn)` returned a tuple: pass `has_aux=True` if it is "
                "(loss, aux)."
            )
        if has_aux:
            result, aux = cast(tuple[Any, Any], result)
        remedy = "Reduce it first, say by `jnp.mean`."
        return scalar_loss(result, f"{call}(loss_fn)'s loss", remedy), aux

    return loss


def gradient_of(
    loss: Callable[[optax.Params], tuple[jax.Array, Any]], params: optax.Params
) -> optax.Updates:
    """The gradient of such a function."""
    return cast(Any, jax.grad(loss, has_aux=True)(params)[0])


def wide(leaf: Any) -> jax.Array:
    """The leaf in float32 at least."""
    double = jnp.result_type(leaf) == jnp.float64
    return jnp.asarray(leaf, jnp.float64 if double else jnp.float32)


def _flat_hessian(
    call: str, loss: Callable[[optax.Params], tuple[jax.Array, Any]], params: Any
) -> tuple[Callable[[jax.Array], jax.Array], jax.Array, Callable[[jax.Array], Any]]:
    """Hessian-vector products and the parameters as one vector, and the way back."""
    flat, unravel = ravel_pytree(jax.tree.map(wide, params))
    if not flat.size:
        raise ValueError(f"`{call}(params)` must hold at least one number, got none.")

    def narrow(flat: jax.Array) -> Any:
        return optax.tree.cast_like(unravel(flat), params)

    def loss_of(flat: jax.Array) -> jax.Array:
        return loss(narrow(flat))[0]

    def product(v: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(loss_of), (flat,), (v,))[1]

    return product, flat, narrow


def _lanczos(
    product: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    key: jax.Array,
    num_iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """An orthonormal Krylov basis [k, n] of a random start, and H in it [k, k]."""
    keys = jax.random.split(key, num_iterations + 1)
    tiny, rounding = np.finfo(start.dtype).tiny, 10 * np.finfo(start.dtype).eps

    def random(i: ArrayLike) -> jax.Array:
        return jax.random.normal(keys[i], start.shape, start.dtype)

    def orthonormal(v: jax.Array, basis: jax.Array) -> jax.Array:
        for _ in range(2):
            v -= basis.T @ (basis @ v)
            v /= jnp.maximum(optax.tree.norm(v), tiny)
        return v

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        basis, diagonal, off_diagonal = carry
        image = product(basis[i])
        rest = image - basis.T @ (basis @ image)
        beta = optax.tree.norm(rest)
        # An exhausted Krylov space: go on from a fresh vector orthogonal to it.
        exhausted = beta <= rounding * optax.tree.norm(image)
        following = orthonormal(jnp.where(exhausted, random(i + 1), rest), basis)
        return (
            basis.at[i + 1].set(following, mode="drop"),
            diagonal.at[i].set(basis[i] @ image),
            off_diagonal.at[i].set(jnp.where(exhausted, jnp.zeros_like(beta), beta)),
        )

    basis = jnp.zeros((num_iterations, start.size), start.dtype)
    basis = basis.at[0].set(orthonormal(random(0), basis))
    zeros = jnp.zeros(num_iterations, start.dtype)
    start_carry = (basis, zeros, zeros)
    basis, diagonal, off_diagonal = cast(
        tuple[jax.Array, ...],
        jax.lax.fori_loop(0, num_iterations, step, start_carry),
    )
    side = jnp.diag(off_diagonal[:-1], 1)
    return basis, jnp.diag(diagonal) + side + side.T


def _check_count(call: str, count: Any, minimum: int) -> None:
    try:
        if isinstance(count, bool):
            raise TypeError
        number = operator.index(count)
    except TypeError:
        raise TypeError(f"`{call}` must be a static int, got {count!r}.") from None
    if number < minimum:
        raise ValueError(f"`{call}` must be at least {minimum}, got {number}.")
