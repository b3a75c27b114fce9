"""The recipes of docs/unlearning.md: whole, in micro-batches, and on several devices.

Every one of them is the gradient that NumPy computes from the whole batch. The checks
with devices run in a process with four of them: this file is also its script.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from flood_optax import flood, flood_mean, shapes
from tests import processes

RNG = np.random.default_rng(4)
ROWS, TOKENS, FEATURES = 8, 3, 2
X, Y = RNG.normal(size=(ROWS, TOKENS, FEATURES)), RNG.normal(size=(ROWS, TOKENS))
KEPT, KEPT_Y = RNG.normal(size=(ROWS, FEATURES)), RNG.normal(size=ROWS)
W = np.array([0.4, -0.7])
DATA = tuple(np.float32(a) for a in (X, Y, KEPT, KEPT_Y))
SEQUENCES = ((X @ W - Y) ** 2).mean(1)
TAUS = {  # with sequences on both sides of it
    "mean below": SEQUENCES.mean() * 1.3,
    "mean above": SEQUENCES.mean() * 0.8,
}
REFLECT, SOFT, CLAMP = (1, shapes.reflect()), (1, shapes.soft()), (-1, shapes.pause())
FORMS = {"reflect": REFLECT, "soft": SOFT, "clamp": CLAMP}


def multiplier(form, height):
    if form == "soft":
        return height / np.sqrt(1 + height**2)
    return np.where(height >= 0, 1.0 if form == "reflect" else 0.0, -1.0)


def by_hand(form, over, tau):
    """The gradient of the mean kept loss and of the held part, in NumPy."""
    slopes = (2 * (X @ W - Y)[..., None] * X).mean(1)  # of each sequence
    heights = SEQUENCES.mean() - tau if over == "batch" else SEQUENCES - tau
    if over != "batch":
        assert (heights > 0).any()
        assert (heights < 0).any()
    weights = np.broadcast_to(multiplier(form, heights), ROWS) / ROWS
    kept = (2 * (KEPT @ W - KEPT_Y)[:, None] * KEPT).mean(0)
    return kept + weights @ slopes


def lose(w, x, y):
    """The loss of each token."""
    return (x @ w - y) ** 2


def keep(w, x, y):
    return ((x @ w - y) ** 2).mean()


def objective(w, x, y, kept_x, kept_y, *, form, over, tau, axis_name=None):
    sign, shape = FORMS[form]
    losses = lose(w, x, y)
    held = flood_mean(
        sign * (losses.mean(1) if over == "example" else losses),
        sign * tau,
        over=over,
        shape=shape,
        axis_name=axis_name,
    )
    return keep(w, kept_x, kept_y) + held


def gradient(w, tau, *data, form, over, axis_name=None):
    given = {"form": form, "over": over, "tau": tau, "axis_name": axis_name}
    return jax.grad(objective)(w, *data, **given)


@functools.cache
def compiled(form, over):
    """Of w, tau and the data."""
    return jax.jit(functools.partial(gradient, form=form, over=over))


def assert_is_the_whole_batch(gradient_of, w, data):
    for form in FORMS:
        for over in ("batch", "example", "sequence"):
            for tau in map(float, TAUS.values()):
                expected = by_hand(form, over, tau)
                got = gradient_of(form, over)(w, tau, *data)
                np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


def test_recipe_is_its_formula():
    assert_is_the_whole_batch(compiled, np.float32(W), DATA)


@pytest.mark.parametrize("over", ["sequence", "batch"])
@pytest.mark.parametrize("form", FORMS)
def test_sequences_held_one_by_one_add_up_over_micro_batches_and_means_do_not(
    form, over
):
    tau, w = float(TAUS["mean below"]), np.float32(W)
    optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4)
    update, state, updates = jax.jit(optimizer.update), optimizer.init(w), w
    for i in range(0, ROWS, 2):
        grads = compiled(form, over)(w, tau, *(a[i : i + 2] for a in DATA))
        updates, state = update(grads, state, w)
    expected = -by_hand(form, over, tau)
    close = np.allclose(updates, expected, rtol=2e-5, atol=2e-6)
    assert close == (over == "sequence")


@pytest.mark.parametrize("tau", TAUS.values(), ids=TAUS)
def test_a_window_of_its_own_holds_the_mean_of_all_micro_batches(tau):
    window = flood(optax.identity(), float(tau), every_k=3)
    w = np.float32(W)
    slope = jax.jit(jax.value_and_grad(lambda w, *part: lose(w, *part).mean()))
    kept_slope, state, kept = jax.jit(jax.grad(keep)), window.init(w), np.zeros(2)
    for i, j in ((0, 1), (1, 3), (3, 8)):  # of unequal size
        x, y, kept_x, kept_y = (a[i:j] for a in DATA)
        value, grads = slope(w, x, y)
        held, state = window.update(grads, state, w, value=value, weight=j - i)
        kept += np.asarray(kept_slope(w, kept_x, kept_y)) * (j - i) / ROWS
    expected = by_hand("reflect", "batch", tau)
    np.testing.assert_allclose(held + kept, expected, rtol=2e-5, atol=2e-6)


# In a process with four devices


def on_mesh(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    return mesh, put(np.float32(W)), [put(a, "data") for a in DATA]


def jit_is_the_whole_batch(kind):
    mesh, w, data = on_mesh(kind)
    with jax.set_mesh(mesh):
        assert_is_the_whole_batch(compiled, w, data)


def shard_map_is_the_whole_batch():
    mesh, w, data = on_mesh(AxisType.Auto)

    @functools.cache
    def split(form, over):
        def share(w, tau, *data):
            w = lax.pcast(w, "data", to="varying")
            given = {"form": form, "over": over, "axis_name": "data"}
            return lax.pmean(gradient(w, tau, *data, **given), "data")

        specs = (P(), P(), *[P("data")] * len(data))
        mapped = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(mapped)

    assert_is_the_whole_batch(split, w, data)


CHECKS = {
    "auto mesh": functools.partial(jit_is_the_whole_batch, AxisType.Auto),
    "explicit mesh": functools.partial(jit_is_the_whole_batch, AxisType.Explicit),
    "shard_map with axis_name": shard_map_is_the_whole_batch,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_recipe_on_four_devices_is_the_whole_batch(name):
    processes.assert_held(name, __file__, devices=4)


if __name__ == "__main__":
    processes.report(CHECKS)
