"""User code with mistakes: a type checker must find the one in each marked line."""

import jax
import jax.numpy as jnp

from flood_optax import flood_mean, flooded, scale_by_flood
from flood_optax.objective import relax_loss

PARAMS = {"w": jnp.ones(3)}
X = jnp.ones((4, 3))


def loss_fn(params: dict[str, jax.Array], x: jax.Array, *, train: bool) -> jax.Array:
    return jnp.mean((x @ params["w"]) ** 2) if train else jnp.zeros(())


def with_aux(params: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, int]]:
    return jnp.sum(params["w"]), {"rows": 3}


def never_called() -> None:
    flooded(loss_fn, 0.1)(PARAMS, X, trian=True)  # wrong: a misspelt argument
    flooded(loss_fn, 0.1)(PARAMS, train=True)  # wrong: one is missing
    flooded(loss_fn, 0.1)("params", X, train=True)  # wrong: its type

    _, info = flooded(loss_fn, 0.1, return_info=True)(PARAMS, X, train=True)
    str(info.multplier)  # wrong: a misspelt field
    str(info.aux["rows"])  # wrong: there is no aux
    _, aux = flooded(with_aux, 0.1, has_aux=True)(PARAMS)
    str(aux["rows"].shape)  # wrong: an int has no shape
    _, told = flooded(with_aux, 0.1, has_aux=True, return_info=True)(PARAMS)
    str(told.aux.keys().shape)  # wrong: nor have the keys

    flooded(loss_fn, 0.1, axis="data")  # wrong: it is axis_name
    flood_mean(X, 0.1, over="class")  # wrong: no such partition
    flood_mean(X, 0.1, mask=X > 0)  # wrong: it is where
    relax_loss(X, jnp.zeros(4, int), 0.1)  # wrong: the epoch is missing
    scale_by_flood(0.1, every_k=2)  # wrong: an argument of flood
