"""Averaged weights: the recipes of docs/averaging.md, by the code of the page.

This file is also a script: what holds on several devices.
"""

import functools
import itertools
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from flood_optax import average_params, averaged, flood, scale_by_flood
from flood_optax.flax import TrainState
from tests import oracles, processes
from tests.claims.test_docs import blocks

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "averaging.md"


# The recommended lines, in every loop, against NumPy

B, RATE, STEPS = 0.3, 0.05, 40
START = np.float32([0.5, -1.0, 0.25])


def rows(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    noise = 0.4 * rng.normal(size=16)
    return x, np.float32(x @ [1.0, -2.0, 0.5] + noise)


def by_hand():
    """Flooding in a band, Adam and the mean of the weights, in float64."""
    w, rises, visited, ends = START.astype(float), False, [], []
    moment = square = np.zeros(3)
    for step in range(1, STEPS + 1):
        x, y = (a.astype(float) for a in rows(step))
        residual = x @ w - y
        ends.append(B + B / 5 if rises else B - B / 5)
        rises = np.mean(residual**2) < ends[-1]
        gradient = (-1 if rises else 1) * 2 * x.T @ residual / len(y)
        moment = 0.9 * moment + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        unbiased = np.sqrt(square / (1 - 0.999**step))
        w = w - RATE * moment / (1 - 0.9**step) / (unbiased + 1e-8)
        visited.append(w)
    assert 1 < np.count_nonzero(np.diff(ends)) < STEPS / 2, "some strokes of some steps"
    return w, oracles.average(visited, 0.9)


def optimizer():
    return optax.chain(
        scale_by_flood(B, band=B / 5), optax.adam(RATE), average_params(0.9)
    )


def loss_fn(params, x, y):
    return jnp.mean((x @ params["w"] - y) ** 2)


def plain_loop():
    params, tx = {"w": jnp.asarray(START)}, optimizer()
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        params, state = step(params, state, *rows(i + 1))
    return params["w"], averaged(state, params)["w"]


def accumulation():
    inner = optax.chain(optax.adam(RATE), average_params(0.9))
    tx = flood(inner, B, band=B / 5, every_k=2)
    params = {"w": jnp.asarray(START)}
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    for i in range(STEPS):
        x, y = rows(i + 1)
        for half in (slice(8), slice(8, 16)):
            params, state = step(params, state, x[half], y[half])
    return params["w"], averaged(state, params)["w"]


def train_state():
    params = {"w": jnp.asarray(START)}
    state = TrainState.create(apply_fn=None, params=params, tx=optimizer())

    @jax.jit
    def step(state, x, y):
        value, grads = jax.value_and_grad(loss_fn)(state.params, x, y)
        return state.apply_gradients(grads=grads, value=value)

    for i in range(STEPS):
        state = step(state, *rows(i + 1))
    return state.params["w"], averaged(state.opt_state, state.params)["w"]


def nnx_loop():
    model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = START[:, None]
    trainer = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model, trainer, x, y):
        def loss_fn(model):
            return jnp.mean((model(x)[:, 0] - y) ** 2)

        value, grads = nnx.value_and_grad(loss_fn)(model)
        trainer.update(model, grads, value=value)

    for i in range(STEPS):
        step(model, trainer, *rows(i + 1))
    average = averaged(trainer.opt_state, nnx.state(model, nnx.Param))
    return model.kernel[:, 0], average.kernel[:, 0]


@pytest.mark.parametrize("loop", [plain_loop, accumulation, train_state, nnx_loop])
def test_recommended_lines_equal_numpy_in(loop):
    last, average = by_hand()
    got_last, got_average = loop()
    np.testing.assert_allclose(got_last, last, rtol=2e-5)
    np.testing.assert_allclose(got_average, average, rtol=2e-5)


# The recipes of the page


@functools.cache
def page():
    """What the page defines, without its runs."""
    names: dict[str, Any] = {"__name__": "strokes"}
    for block in blocks(PAGE.read_text()):
        if "import" in block or "\ndef " in block or "\nclass " in block:
            exec(compile(block.partition("\nbest = ")[0], str(PAGE), "exec"), names)
    return types.SimpleNamespace(**names)


def assert_close(got, expected, atol=1e-6):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol)


def batches(count):
    return list(page().epoch(0))[:count]


def trained(step, optimizer, batches):
    """The parameters after each update, and the state."""
    params = page().init(jax.random.key(1))
    state, visited = optimizer.init(params), []
    for batch in batches:
        params, state = step(params, state, *batch)
        visited.append(params)
    return state, visited


def mean_of(visited):
    return jax.tree.map(lambda *each: oracles.average(each, 0.99), *visited)


def test_average_of_the_page_is_that_of_the_weights_after_each_step():
    state, visited = trained(page().train_step, page().optimizer, batches(8))
    assert_close(averaged(state, visited[-1]), mean_of(visited))


def test_average_over_windows_is_that_over_large_batches():
    ours, micro_batches = page(), batches(9)
    large = [
        [np.concatenate(part) for part in zip(*micro_batches[i : i + 3], strict=True)]
        for i in range(0, 9, 3)
    ]
    state, visited = trained(ours.train_step, ours.optimizer, large)

    @jax.jit
    def micro_step(params, state, x, y):
        value, grads = jax.value_and_grad(ours.loss_fn)(params, x, y)
        updates, state = ours.windows.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    small, seen = trained(micro_step, ours.windows, micro_batches)
    assert_close(averaged(small, seen[-1]), mean_of(visited), atol=1e-5)
    assert_close(averaged(small, seen[-1]), averaged(state, visited[-1]), atol=1e-5)


def test_average_is_that_of_the_recipes_by_hand():
    """A share of the new weights at each step; in windows at their ends alone."""
    ours, decay = page(), 0.6
    inner = optax.chain(optax.adam(2e-3), average_params(decay))
    every = {1: optax.chain(scale_by_flood(ours.level), inner)}
    every[3] = flood(inner, ours.level, every_k=3)
    for k, optimizer in every.items():

        @jax.jit
        def step(run, batch, optimizer=optimizer):
            params, state, average = run
            value, grads = jax.value_and_grad(ours.loss_fn)(params, *batch)
            before = optax.tree.get(state, "flood_step")
            updates, state = optimizer.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            after = optax.tree.get(state, "flood_step")
            share = 1 / jnp.minimum(after.astype(jnp.float32), 1 / (1 - decay))
            share = jnp.where(after > before, share, 0.0)
            return params, state, optax.incremental_update(params, average, share)

        params = ours.init(jax.random.key(1))
        run = params, optimizer.init(params), params
        for batch in batches(10) + list(ours.epoch(1)):
            run = step(run, batch)
        params, state, average = run
        assert optax.tree.get(state, "flood_average_step") == 20 // k
        pairs = zip(averaged(state, params), average, strict=True)
        assert max(jnp.abs(a - b).max() for a, b in pairs) < 1e-7


def test_a_run_without_an_average_goes_on_with_one():
    ours, many = page(), batches(6)
    without = optax.chain(
        scale_by_flood(ours.level, band=ours.level / 5), optax.adam(2e-3)
    )
    params, state = ours.init(jax.random.key(1)), None
    state = without.init(params)
    for x, y in many[:3]:
        value, grads = jax.value_and_grad(ours.loss_fn)(params, x, y)
        updates, state = without.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
    state, visited = (*state, average_params(0.99).init(params)), []
    for batch in many[3:]:
        params, state = ours.train_step(params, state, *batch)
        visited.append(params)
    assert_close(averaged(state, params), mean_of(visited))
    assert_close(params, trained(ours.train_step, ours.optimizer, many)[1][-1])


def on(devices):
    """The step of the page in `shard_map`, with the average inside of the wrapper."""
    ours = page()
    spread = flood(ours.inner, ours.level, band=ours.level / 5, axis_name="data")

    def step(params, state, x, y):
        local = lax.pcast(params, "data", to="varying")
        value, grads = jax.value_and_grad(ours.loss_fn)(local, x, y)
        grads = lax.pmean(grads, "data")
        updates, state = spread.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    mesh = jax.sharding.Mesh(devices, ("data",))
    specs = (P(), P(), P("data"), P("data"))
    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
    ), spread


def average_on_four_devices_is_that_on_one():
    ours, parts = page(), [slice(start, start + 32) for start in (0, 32, 64)]
    rows = [(ours.x[part], ours.y[part]) for part in parts]
    alone, visited = trained(ours.train_step, ours.optimizer, rows)
    state, seen = trained(*on(jax.devices()[:4]), rows)
    average = averaged(state, seen[-1])
    assert all(leaf.sharding.is_fully_replicated for leaf in average)
    assert_close(average, averaged(alone, visited[-1]), atol=1e-5)


def test_average_on_several_devices():
    name = average_on_four_devices_is_that_on_one.__name__
    processes.assert_held(name, __file__, devices=4)


def test_model_of_the_averaged_weights_leaves_the_trained_one_alone():
    ours = page()
    model = nnx.clone(ours.model)
    trainer = nnx.Optimizer(model, ours.optimizer, wrt=nnx.Param)
    visited = []
    for batch in batches(4):
        ours.nnx_step(model, trainer, *batch)
        visited.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    average = ours.averaged_model(model, trainer)
    assert_close(nnx.to_pure_dict(nnx.state(average, nnx.Param)), mean_of(visited))
    assert_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), visited[-1])


# Batch statistics


class Net(linen.Module):
    """Two normalised layers, the momentum a field."""

    momentum: float = 0.99

    @linen.compact
    def __call__(self, x, train):
        for width in (64, 64):
            x = linen.Dense(width, use_bias=False)(x)
            x = linen.BatchNorm(not train, momentum=self.momentum)(x)
            x = linen.relu(x)
        return linen.Dense(10)(x)


class Normed(nnx.Module):
    """The same in NNX."""

    def __init__(self, sizes, rngs):
        pairs = itertools.pairwise(sizes)
        self.linears = nnx.List(
            [nnx.Linear(m, n, use_bias=False, rngs=rngs) for m, n in pairs]
        )
        self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in sizes[1:]])

    def __call__(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = nnx.relu(norm(linear(x)))
        return x


def activations(kernels, x):
    """NumPy's inputs of each normalisation of one batch, in float64."""
    seen = []
    for kernel in kernels:
        x = x @ np.asarray(kernel, np.float64)
        seen.append(x)
        x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 0)
    return seen


def expected_statistics(kernels, parts):
    """Mean and variance of each layer, each example of the parts counted alike."""
    share = np.array([len(part) for part in parts]) / sum(map(len, parts))
    layers = zip(*(activations(kernels, part) for part in parts), strict=True)
    return [
        tuple(
            sum(s * a for s, a in zip(share, of_parts, strict=True))
            for of_parts in ([z.mean(0) for z in layer], [z.var(0) for z in layer])
        )
        for layer in layers
    ]


PARTS = {"one batch": [200], "three batches": [90, 90, 20]}


@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
def test_reestimated_statistics_are_those_of_the_activations(sizes):
    ours = page()
    parts = np.split(ours.x[: sum(sizes)], np.cumsum(sizes)[:-1])
    net = Net()
    variables = net.init(jax.random.key(0), ours.x[:2], train=False)
    spoiled = jax.tree.map(lambda a: a + 3, variables["batch_stats"])
    got = ours.reestimated(net, variables["params"], spoiled, parts)
    kernels = [variables["params"][f"Dense_{i}"]["kernel"] for i in range(2)]
    for i, (mean, var) in enumerate(expected_statistics(kernels, parts)):
        layer = got[f"BatchNorm_{i}"]
        np.testing.assert_allclose(layer["mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer["var"], var, rtol=1e-4, atol=1e-5)

    model = Normed((64, 32, 16), nnx.Rngs(0))
    model.eval()
    ours.reestimate(model, parts)
    kernels = [linear.kernel[...] for linear in model.linears]
    expected = expected_statistics(kernels, parts)
    for norm, (mean, var) in zip(model.norms, expected, strict=True):
        np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.var[...], var, rtol=1e-4, atol=1e-5)
        assert (norm.momentum, norm.use_running_average) == (0.99, True), "as before"


def test_averaged_weights_with_the_statistics_of_the_last_ones_are_wrong():
    ours = page()
    net = Net(momentum=0.9)
    variables = net.init(jax.random.key(0), ours.x[:2], train=False)
    optimizer = optax.chain(
        scale_by_flood(ours.level, band=ours.level / 5), optax.adam(1e-2)
    )

    @jax.jit
    def step(state, x, y):
        params, opt_state, stats, average, mean_stats = state

        def loss_fn(params):
            given = {"params": params, "batch_stats": stats}
            out, seen = net.apply(given, x, train=True, mutable=["batch_stats"])
            return cross_entropy(out, y).mean(), seen["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params, value=value)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.01)
        mean_stats = optax.incremental_update(stats, mean_stats, 0.01)
        return params, opt_state, stats, average, mean_stats

    @jax.jit
    def test_loss_and_accuracy(params, stats):
        given = {"params": params, "batch_stats": stats}
        out = net.apply(given, ours.x[300:], train=False)
        right = (out.argmax(-1) == ours.y[300:]).mean()
        return jnp.stack([cross_entropy(out, ours.y[300:]).mean(), 100 * right])

    params, stats = variables["params"], variables["batch_stats"]
    state, last = (params, optimizer.init(params), stats, params, stats), []
    for number in range(50):
        for batch in ours.epoch(number):
            state = step(state, *batch)
        last.append(test_loss_and_accuracy(state[0], state[2]))
    _, _, stats, average, mean_stats = state
    last = np.mean(last[-20:], axis=0)  # one end alone is any point of a stroke

    own = ours.reestimated(net, average, stats, np.split(ours.x[:300], 10))
    wrong, right = (test_loss_and_accuracy(average, s) for s in (stats, own))
    mean = test_loss_and_accuracy(average, mean_stats)
    assert right[0] < wrong[0] - 0.05, "seen: .67 and .83"
    assert right[0] < last[0] - 0.05, "seen: .67 and .80: the average is better"
    assert right[1] > last[1] + 1, "seen: 87.7 and 79.8 %"
    assert right[0] < mean[0], "seen: .67 and .70"
    assert wrong[0] > last[0] - 0.05, "seen: .83 and .80: it looks no better"


if __name__ == "__main__":
    check = average_on_four_devices_is_that_on_one
    processes.report({check.__name__: check})
