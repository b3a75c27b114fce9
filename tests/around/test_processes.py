"""Real processes joined by jax.distributed train as one process on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import distributed

pytestmark = pytest.mark.slow  # each case starts processes

STEPS = distributed.STEPS


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    """What each process ends with, by form."""
    return distributed.launch(request.param, STEPS)


@functools.cache
def large_batch():
    """The JAX one-liner on the whole batch, with momentum by hand: ends and losses."""
    batch = [jnp.asarray(a) for a in distributed.dataset()]

    def flooded(params):
        loss = distributed.loss_fn(params, *batch)
        return jnp.abs(loss - distributed.LEVEL) + distributed.LEVEL, loss

    @jax.jit
    def step(params, trace):
        (_, loss), grads = jax.value_and_grad(flooded, has_aux=True)(params)
        decayed = jax.tree.map(lambda t: distributed.MOMENTUM * t, trace)
        trace = jax.tree.map(jnp.add, grads, decayed)
        rate = distributed.LEARNING_RATE
        return jax.tree.map(lambda p, t: p - rate * t, params, trace), trace, loss

    params = jax.tree.map(jnp.asarray, distributed.initial_params())
    trace, losses = jax.tree.map(jnp.zeros_like, params), []
    for _ in range(STEPS):
        params, trace, loss = step(params, trace)
        losses.append(float(loss))
    return jax.device_get(params), np.array(losses)


@pytest.mark.parametrize("form", distributed.FORMS)
def test_processes_end_where_one_device_ends(ranks, form):
    params, losses = large_batch()
    below = losses < distributed.LEVEL
    assert 5 < below.sum() < STEPS - 5
    assert np.abs(losses - distributed.LEVEL).min() > 1e-4  # far from rounding
    for rank in ranks:
        np.testing.assert_allclose(rank[form]["losses"], losses, rtol=1e-5)
        for name, leaf in params.items():
            np.testing.assert_allclose(rank[form][name], leaf, rtol=1e-5, atol=5e-6)
            np.testing.assert_array_equal(rank[form][name], ranks[0][form][name])


def test_processes_have_other_losses_of_their_own(ranks):
    """So a process-local compare would have sent them apart: the test can fail."""
    _, losses = large_batch()
    local = np.stack([rank["optax form"]["local_losses"] for rank in ranks])
    np.testing.assert_allclose(local.mean(0), losses, rtol=1e-5)
    uphill = local < distributed.LEVEL
    assert np.sum(uphill.any(0) & ~uphill.all(0)) > 10
