"""A loss as a function of its parameters: gradient, norms, Hessian products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from flood_optax.checks import (
    as_loss_and_aux,
    as_scalar_loss,
    check_raw,
    check_that,
    is_float,
)
from flood_optax.devices import split_like
from flood_optax.precision import wide

LossOfParams = Callable[[optax.Params], tuple[jax.Array, Any]]


def loss_of_params(
    call: str,
    loss_fn: Callable[..., Any],
    params: optax.Params,
    has_aux: bool,
    /,  # kwargs, which are those of loss_fn, may have any name
    *args: Any,
    **kwargs: Any,
) -> LossOfParams:
    """The function params -> (loss, aux), its other arguments bound and all checked."""
    check_raw(f"{call}(loss_fn)", loss_fn)
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        rule = "hold real floats only, of 16 bits at least"
        place = f"dtype {dtype} at params{jax.tree_util.keystr(path)}"
        got = f"{place}: close over what is not trained"
        fits = is_float(dtype)
        check_that(fits, f"{call}(params)", rule, got, error=TypeError)

    def loss(params: optax.Params) -> tuple[jax.Array, Any]:
        result = loss_fn(params, *args, **kwargs)
        value, aux = as_loss_and_aux(call, result, has_aux=has_aux)
        remedy = "Reduce it first, say by `jnp.mean`."
        return as_scalar_loss(value, f"{call}(loss_fn)'s loss", remedy), aux

    return loss


def gradient_of(loss: LossOfParams, params: optax.Params) -> optax.Updates:
    """The gradient of such a function."""
    return jax.grad(loss, has_aux=True)(params)[0]


def hessian_products(
    call: str, loss: LossOfParams, params: optax.Params
) -> tuple[Callable[[optax.Updates], optax.Updates], optax.Params]:
    """Hessian-vector products, and the parameters in the dtype that all vectors have.

    Vectors are trees like the parameters, each leaf split over devices as they are.
    """
    leaves = [wide(leaf) for leaf in jax.tree.leaves(params)]
    some = sum(leaf.size for leaf in leaves)
    check_that(some, f"{call}(params)", "hold at least one number", "none")
    dtype = jnp.result_type(*leaves)
    start = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), params)

    def loss_of(point: optax.Params) -> jax.Array:
        return loss(optax.tree.cast_like(point, params))[0]

    def product(vector: optax.Updates) -> optax.Updates:
        return jax.jvp(jax.grad(loss_of), (start,), (vector,))[1]

    return product, start


def random_like(
    sample: Callable[..., jax.Array], key: jax.Array, tree: optax.Params
) -> optax.Updates:
    """A random vector, whose numbers do not depend on how the tree is cut up."""
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([leaf.size for leaf in leaves]).tolist()
    flat = sample(key, (ends[-1],), jnp.result_type(*leaves))
    drawn = [
        split_like(flat[end - leaf.size : end].reshape(leaf.shape), leaf)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return structure.unflatten(drawn)


def dot(a: optax.Updates, b: optax.Updates) -> jax.Array:
    """The inner product of two trees, float32 at least."""
    # no vdot: it wants the leaves flat, and explicit axes cannot always be merged
    products = jax.tree.map(lambda x, y: jnp.sum(wide(x) * wide(y)), a, b)
    return jnp.asarray(optax.tree.sum(products))


def norm(tree: optax.Updates) -> jax.Array:
    """The Euclidean norm over all leaves, float32 at least."""
    unit = magnitude(tree)
    return unit * optax.tree.norm(jax.tree.map(lambda x: wide(x) / unit, tree))


def magnitude(tree: optax.Updates) -> jax.Array:
    """The largest absolute number in the tree; 1 where that is no unit to divide by."""
    # Divided by it first, squares neither vanish nor overflow: in float32 they would
    # below 1e-19 and above 1e19. It is a constant to every derivative, since what is
    # divided by it is multiplied by it again.
    leaves = [jnp.max(jnp.abs(wide(x)), initial=0) for x in jax.tree.leaves(tree)]
    largest = lax.stop_gradient(jnp.max(jnp.stack(leaves))) if leaves else jnp.ones([])
    usable = (largest > 0) & jnp.isfinite(largest)
    return jnp.where(usable, largest, jnp.ones_like(largest))
