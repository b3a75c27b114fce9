"""Weights around the library: checkpoints in mid-window, and one collective."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from flood_optax import flood, scale_by_flood
from tests import stores

LEVEL = 0.5
SIZES = (3.0, 0.0, 5.0, 1.0, 16.0, 2.0, 7.0)  # a window of three is open after the 5th
OPTIMIZER = flood(optax.adam(0.1), LEVEL, every_k=3)


def run(params, state, first, last, *, weighted=True):
    for i in range(first, last):
        grads = {"w": jnp.array([0.3, -1.0]) * (i + 1) - params["w"]}
        value = jnp.float32(np.nan if weighted and SIZES[i] == 0 else 0.2 + 0.1 * i)
        extra = {"weight": jnp.float32(SIZES[i])} if weighted else {}
        updates, state = OPTIMIZER.update(grads, state, params, value=value, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def kept(store, path, tree, target):
    """The tree, saved and restored."""
    save, restore = stores.FORMATS[store]
    save(path, tree)
    return restore(path, target)


@pytest.mark.parametrize("store", stores.FORMATS)
def test_weighted_window_goes_on_from_its_middle_bit_for_bit(store, tmp_path):
    params = {"w": jnp.array([0.5, -2.0])}
    target = params, OPTIMIZER.init(params)
    whole = run(*target, 0, len(SIZES))
    middle = run(*target, 0, 5)
    assert middle[1].flood_window.flood_mini_step == 2
    assert middle[1].flood_window.flood_weight == 17.0
    restored = kept(store, tmp_path / "kept", middle, target)
    chex.assert_trees_all_equal(run(*restored, 5, len(SIZES)), whole)


# ---- one collective, with and without weight ----

FORMS = {
    "scale_by_flood": scale_by_flood(LEVEL, axis_name="data"),
    "flood": flood(optax.sgd(1.0), LEVEL, axis_name="data"),
    "window": flood(optax.sgd(1.0), LEVEL, axis_name="data", every_k=3),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_update_sends_one_collective(form, weighted):
    optimizer = FORMS[form]

    def step(state, value, weight):
        extra = {"weight": weight[0]} if weighted else {}
        return optimizer.update(
            jnp.ones(3), state, jnp.ones(3), value=value[0], **extra
        )

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = (P(), P("data"), P("data"))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
    state = optimizer.init(jnp.ones(3))
    text = jax.jit(mapped).lower(state, jnp.ones(1), jnp.ones(1)).as_text()
    assert text.count("stablehlo.all_reduce") == 1
    kind = "tensor<2xf32>" if weighted else "tensor<f32>"
    assert f"({kind}) -> {kind}" in text
