"""How far sub-batches agree on where to go."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flood_optax.checks import check_that


def gradient_accordance(grads_a: Any, grads_b: Any) -> jax.Array:
    r"""Returns how far a step on one batch also lowers the loss on another.

    The cosine :math:`\langle g_a, g_b\rangle / (|g_a||g_b|)` of two whole gradient
    trees: the step :math:`-\eta g_a` changes the loss of batch b by
    :math:`-\eta\langle g_a, g_b\rangle` to first order. 0 where a gradient is zero, NaN
    where one is not finite; squares neither overflow nor underflow.

    Args:
      grads_a: a tree of arrays; leaves that are None, integer or float0 do not count.
      grads_b: a tree of the same structure and shapes.

    Returns:
      A scalar in [-1, 1] to rounding, float32 at least.

    Examples:
      >>> a = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
      >>> b = {"w": jnp.array([-1.0, 2.0]), "b": jnp.array(2.0)}
      >>> print(f"{gradient_accordance(a, b):.4f}")
      0.3333

    References:
      Liu et al., Flooding-X, ACL 2022.
    """
    shapes = [jax.tree.map(np.shape, grads) for grads in (grads_a, grads_b)]
    a, b = _unit(grads_a), _unit(grads_b)
    same = jax.tree.flatten(shapes[0]) == jax.tree.flatten(shapes[1])
    call, got = "gradient_accordance(grads_a, grads_b)", "{} and {}".format(*shapes)
    rule = "be trees of floats of one structure and shapes"
    check_that(same and len(a) == len(b) > 0, call, rule, got)
    norms = jnp.sqrt(_inner(a, a) * _inner(b, b))
    return _inner(a, b) / jnp.where(norms == 0, 1, norms)


def _unit(tree: Any) -> list[jax.Array]:
    """The float leaves, float32 at least, divided by the largest entry of all."""
    leaves = [
        jnp.asarray(x, np.promote_types(jnp.result_type(x), np.float32))
        for x in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    largest = jnp.stack([0, *(abs(x).max(initial=0) for x in leaves)]).max()
    return [x / jnp.where(largest == 0, 1, largest) for x in leaves]


def _inner(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    products = ((jnp.conj(x) * y).real.sum() for x, y in zip(a, b, strict=True))
    return jnp.stack(list(products)).sum()
