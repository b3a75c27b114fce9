"""The recipes of docs/unlearning.md: whole, in micro-batches, and on several devices.

Every one of them is the gradient that NumPy computes from the whole batch. The checks
with devices run in a process with four of them: this file is also its script.
"""

import functools

import jax
import jax.numpy as jnp
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


def cases():
    for form in FORMS:
        for over in ("batch", "example", "sequence"):
            for tau in TAUS.values():
                yield {"form": form, "over": over, "tau": float(tau)}


def assert_is_the_whole_batch(gradient):
    for case in cases():
        expected = by_hand(**case)
        np.testing.assert_allclose(gradient(case), expected, rtol=2e-5, atol=2e-6)


def test_recipe_is_its_formula():
    w = jnp.float32(W)
    assert_is_the_whole_batch(
        lambda case: jax.grad(functools.partial(objective, **case))(w, *DATA)
    )


@pytest.mark.parametrize("form", FORMS)
def test_sequences_held_one_by_one_add_up_over_micro_batches(form):
    case = {"form": form, "over": "sequence", "tau": float(TAUS["mean below"])}
    # with the mean of each micro-batch, which is not that of the batch, they do not
    for over, right in (("sequence", True), ("batch", False)):
        optimizer = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=4)
        w = jnp.float32(W)
        state, updates = optimizer.init(w), w
        for i in range(0, ROWS, 2):
            part = [a[i : i + 2] for a in DATA]
            grads = jax.grad(functools.partial(objective, **(case | {"over": over})))(
                w, *part
            )
            updates, state = optimizer.update(grads, state, w)
        expected = -by_hand(**(case | {"over": over}))
        assert np.allclose(updates, expected, rtol=2e-5, atol=2e-6) == right


@pytest.mark.parametrize("tau", TAUS.values(), ids=TAUS)
def test_a_window_of_its_own_holds_the_mean_of_all_micro_batches(tau):
    window = flood(optax.identity(), float(tau), every_k=3)
    w = jnp.float32(W)
    state, held, kept = window.init(w), w, jnp.zeros(2)
    for i, j in ((0, 1), (1, 3), (3, 8)):  # of unequal size
        x, y, kept_x, kept_y = (a[i:j] for a in DATA)
        value, grads = jax.value_and_grad(lambda w, *part: lose(w, *part).mean())(
            w, x, y
        )
        held, state = window.update(grads, state, w, value=value, weight=j - i)
        kept += jax.grad(keep)(w, kept_x, kept_y) * (j - i) / ROWS
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
        assert_is_the_whole_batch(
            lambda case: jax.jit(jax.grad(functools.partial(objective, **case)))(
                w, *data
            )
        )


def auto_mesh():
    jit_is_the_whole_batch(AxisType.Auto)


def explicit_mesh():
    jit_is_the_whole_batch(AxisType.Explicit)


def shard_map_with_axis_name():
    mesh, w, data = on_mesh(AxisType.Auto)

    def gradient(case):
        def share(w, *data):
            w = lax.pcast(w, "data", to="varying")
            part = functools.partial(objective, **case, axis_name="data")
            return lax.pmean(jax.grad(part)(w, *data), "data")

        specs = (P(), *[P("data")] * len(data))
        split = jax.shard_map(share, mesh=mesh, in_specs=specs, out_specs=P())
        return jax.jit(split)(w, *data)

    assert_is_the_whole_batch(gradient)


CHECKS = {
    check.__name__: check
    for check in (auto_mesh, explicit_mesh, shard_map_with_axis_name)
}


@pytest.mark.parametrize("name", CHECKS)
def test_recipe_on_four_devices_is_the_whole_batch(name):
    processes.assert_held(name, __file__, devices=4)


if __name__ == "__main__":
    processes.report(CHECKS)
