"""User code that a type checker must accept, with the types that it must find."""

from typing import assert_type

import jax
import jax.numpy as jnp
import optax

from flood_optax import (
    FloodInfo,
    average_params,
    averaged,
    flood,
    flood_loss,
    flood_mean,
    flooded,
    scale_by_flood,
)
from flood_optax.objective import relax_loss

Params = dict[str, jax.Array]
PARAMS: Params = {"w": jnp.ones(3)}
X = jnp.ones((4, 3))


def loss_fn(params: Params, x: jax.Array, *, train: bool = True) -> jax.Array:
    return jnp.mean((x @ params["w"]) ** 2) if train else jnp.zeros(())


def with_aux(params: Params, x: jax.Array) -> tuple[jax.Array, dict[str, int]]:
    return loss_fn(params, x), {"rows": len(x)}


def chosen(*, has_aux: bool) -> object:
    return flooded(with_aux, jnp.float32(0.1), has_aux=has_aux, axis_name=("a", "b"))


def never_called() -> None:
    assert_type(flooded(loss_fn, 0.1)(PARAMS, X, train=False), jax.Array)
    value, info = flooded(loss_fn, 0.1, return_info=True)(PARAMS, x=X)
    assert_type(value, jax.Array)
    assert_type(info, FloodInfo[None])
    assert_type(info.multiplier, jax.Array)

    value, aux = flooded(with_aux, 0.1, has_aux=True)(PARAMS, X)
    assert_type(aux, dict[str, int])
    value, told = flooded(with_aux, 0.1, has_aux=True, return_info=True)(PARAMS, X)
    assert_type(told, FloodInfo[dict[str, int]])
    assert_type(told.aux["rows"], int)

    assert_type(flood_loss(X, 0.1), jax.Array)
    mean = flood_mean(X, jnp.ones(4), over="sequence", where=X > 0)
    assert_type(mean, jax.Array)
    relaxed = relax_loss(X, jnp.zeros(4, int), 0.1, epoch=0, axis_name="data")
    assert_type(relaxed, jax.Array)

    optimizer = optax.chain(scale_by_flood(0.1, band=0.02), optax.adam(1e-3))
    window = flood(optax.chain(optimizer, average_params(0.99)), 0.1, every_k=4)
    state = window.init(PARAMS)
    window.update(PARAMS, state, PARAMS, value=value, weight=3.0, flush=True)
    alone = scale_by_flood(0.1)
    alone.update(PARAMS, alone.init(PARAMS), PARAMS, value=0.3, weight=2.0)
    averaged(state, PARAMS)
