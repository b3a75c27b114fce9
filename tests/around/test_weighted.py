"""Weights around the library: checkpoints in mid-window, collectives, processes.

This file is also a script, one of the processes: `FILE ADDRESS NUMBER RANK`.
"""

import json
import socket
import sys
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from flood_optax import FloodWindow, flood, scale_by_flood
from tests import processes, stores

LEVEL = 0.5
SIZES = (3.0, 0.0, 5.0, 1.0, 16.0, 2.0, 7.0)  # a window of three is open after the 5th
OPTIMIZER = flood(optax.adam(0.1), LEVEL, every_k=3)


class OldWindow(NamedTuple):
    """The fields of a window before there were weights."""

    flood_mini_step: Any
    flood_grad_mean: Any
    flood_value_mean: Any
    flood_skip_state: Any


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


@pytest.mark.parametrize("store", stores.FORMATS)
def test_checkpoint_of_a_window_without_weights_goes_on(store, tmp_path):
    """Its tree is another, so it is refused; restored by its fields it goes on."""
    params = {"w": jnp.array([0.5, -2.0])}
    target = OPTIMIZER.init(params)

    def without_weights(state):
        return state._replace(flood_window=OldWindow(*state.flood_window[:4]))

    old_params, plain = run(params, target, 0, 5, weighted=False)
    path = tmp_path / "kept"
    with pytest.raises(ValueError, match=r"(?s)flood_weight|structure|tree|Dict key"):
        kept(store, tmp_path / "refused", without_weights(plain), target)
    old = kept(store, path, without_weights(plain), without_weights(target))
    assert len(old.flood_window) == 4
    state = old._replace(flood_window=FloodWindow(*old.flood_window))
    got = run(old_params, state, 5, 7, weighted=False)
    want = run(old_params, plain, 5, 7, weighted=False)
    chex.assert_trees_all_equal(got[0], want[0])
    chex.assert_trees_all_equal(got[1].flood_state, want[1].flood_state)


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


# ---- two processes, with 1 and 7 tokens in turn ----

TOKENS = np.array([[1, 7], [16, 2], [3, 5], [0, 9]])  # [micro-batches, processes]
START = np.array([1.0, -0.5])


def tokens_of(i, rank):
    """Losses (w . x - y)^2 of the tokens of one part, padded to 16."""
    rng = np.random.default_rng([i, rank])
    x = rng.normal(size=(16, 2))
    return x, x @ [0.8, -0.3] + rng.normal(size=16) * (0.2 + rank)


def mean_loss(w, x, y, mask):
    total = jnp.sum((x @ w - y) ** 2, where=mask)
    return total / jnp.maximum(mask.sum(), 1)


def train_as_a_process(address, number, rank):
    """Two windows of two micro-batches; prints the parameters after each micro-step."""
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(address, number, rank)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, P("data"))
    optimizer = flood(optax.sgd(0.1), LEVEL, every_k=2, axis_name="data")

    def step(w, state, x, y, mask):
        x, y, mask = x[0], y[0], mask[0]
        local = lax.pcast(w, "data", to="varying")
        value, grad = jax.value_and_grad(mean_loss)(local, x, y, mask)
        count = mask.sum()
        grad = lax.psum(grad * count, "data") / lax.psum(count, "data")
        updates, state = optimizer.update(grad, state, w, value=value, weight=count)
        return optax.apply_updates(w, updates), state

    specs = (P(), P(), P("data"), P("data"), P("data"))
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), P()))
    )
    w = jnp.asarray(START)
    state = optimizer.init(w)
    path = []
    for i in range(len(TOKENS)):
        x, y = tokens_of(i, rank)
        part = x, y, np.arange(16) < TOKENS[i, rank]
        rows = (jax.make_array_from_process_local_data(split, a[None]) for a in part)
        w, state = mapped(w, state, *rows)
        path.append(np.asarray(w.addressable_data(0)).tolist())
    print(json.dumps(path))  # noqa: T201


def large_batches():
    """The same in NumPy: all tokens of a window at once."""
    w, path = START.copy(), []
    for first in (0, 2):
        parts = []
        for i in (first, first + 1):
            for rank in range(2):
                x, y = tokens_of(i, rank)
                parts.append((x[: TOKENS[i, rank]], y[: TOKENS[i, rank]]))
        path.append(w.tolist())
        x, y = (np.concatenate(column) for column in zip(*parts, strict=True))
        error = x @ w - y
        sign = 1.0 if np.mean(error**2) >= LEVEL else -1.0
        w = w - 0.1 * sign * 2 * x.T @ error / len(y)
        path.append(w.tolist())
    return path


def test_two_processes_with_unequal_parts_are_one_large_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        processes.start(__file__, address, 2, rank, devices=1) for rank in (0, 1)
    ]
    for code, out, err in [processes.end(process, 120) for process in started]:
        assert code == 0, err
        path = json.loads(out.splitlines()[-1])
        np.testing.assert_allclose(path, large_batches(), rtol=1e-12)


if __name__ == "__main__":
    where, how_many, which = sys.argv[1:]
    train_as_a_process(where, int(how_many), int(which))
