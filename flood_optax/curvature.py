"""A loss as a function of its parameters: gradient, norms, Hessian products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from flood_optax.bend import wide
from flood_optax.checks import function, loss_and_aux, scalar_loss

LossOfParams = Callable[[optax.Params], tuple[jax.Array, Any]]


def loss_of_params(
    call: str,
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *,
    has_aux: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> LossOfParams:
    """The function params -> (loss, aux), its other arguments bound and all checked."""
    function(f"{call}(loss_fn)", loss_fn)
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            raise TypeError(
                f"`{call}(params)` must hold real floats only, of 16 bits at least, "
                f"got dtype {dtype} at params{jax.tree_util.keystr(path)}: close over "
                "what is not trained."
            )

    def loss(params: optax.Params) -> tuple[jax.Array, Any]:
        result = loss_fn(params, *args, **kwargs)
        value, aux = loss_and_aux(call, result, has_aux=has_aux)
        remedy = "Reduce it first, say by `jnp.mean`."
        return scalar_loss(value, f"{call}(loss_fn)'s loss", remedy), aux

    return loss


def gradient_of(loss: LossOfParams, params: optax.Params) -> optax.Updates:
    """The gradient of such a function."""
    return jax.grad(loss, has_aux=True)(params)[0]


def flat_hessian(
    call: str, loss: LossOfParams, params: optax.Params
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
