"""Averaged weights: the recipes of docs/averaging.md, by the code of the page.

This file is also a script: what holds on several devices.
"""

import functools
import pathlib
import types

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


@functools.cache
def page():
    """What the page defines, without its runs, for a network of one layer."""
    names = {"__name__": "strokes"}
    for block in blocks(PAGE.read_text()):
        if "import" in block or "\ndef " in block:
            exec(compile(block, str(PAGE), "exec"), names)
    names["logits"] = lambda params, x: x @ params[0]
    return types.SimpleNamespace(**names)


# The recommended lines, in every loop: one layer on the digits of the page, and NumPy

STEPS = 40


@functools.cache
def start():
    """Weights near the level, so that strokes begin at once."""
    x, y = np.float64(page().x[:300]), page().y[:300]
    ridge = x.T @ x + 3 * np.eye(64)
    return np.float32(6 * np.linalg.solve(ridge, x.T @ (np.eye(10)[y] - 0.1)))


@functools.cache
def batches():
    return [batch for number in range(STEPS // 10) for batch in page().epoch(number)]


@functools.cache
def by_hand():
    """The weights after each step: flooding in a band and Adam, in float64."""
    w, rises, visited, ends = np.float64(start()), False, [], []
    moment, square, level = 0.0, 0.0, page().level
    for step, (rows, y) in enumerate(batches(), 1):
        x = np.float64(rows)
        scores = x @ w
        normaliser = np.log(np.exp(scores).sum(1))
        loss = np.mean(normaliser - scores[np.arange(len(y)), y])
        ends.append(level + level / 5 if rises else level - level / 5)
        rises = loss < ends[-1]
        slope = np.exp(scores - normaliser[:, None]) - np.eye(10)[y]
        gradient = (-1 if rises else 1) * x.T @ slope / len(y)
        moment = 0.9 * moment + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        unbiased = np.sqrt(square / (1 - 0.999**step))
        w = w - 2e-3 * moment / (1 - 0.9**step) / (unbiased + 1e-8)
        visited.append(w)
    assert 1 < np.count_nonzero(np.diff(ends)) < STEPS / 2, "some strokes of some steps"
    return np.stack(visited)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def assert_by_hand(last, average, since=0):
    assert_close(last, by_hand()[-1])
    assert_close(average, oracles.average(by_hand()[since:], 0.99))


def went_on(step, params, state, many):
    for batch in many:
        params, state = step(params, state, *batch)
    return params, state


def in_a_loop():
    params = [jnp.asarray(start())]
    state = page().optimizer.init(params)
    params, state = went_on(page().train_step, params, state, batches())
    return params[0], averaged(state, params)[0]


def in_a_train_state():
    params = [jnp.asarray(start())]
    state = TrainState.create(apply_fn=None, params=params, tx=page().optimizer)

    @jax.jit
    def step(state, x, y):
        value, grads = jax.value_and_grad(page().loss_fn)(state.params, x, y)
        return state.apply_gradients(grads=grads, value=value)

    for batch in batches():
        state = step(state, *batch)
    return state.params[0], averaged(state.opt_state, state.params)[0]


def in_nnx_in_windows():
    """Three micro-batches for a batch; the average is a model of its own."""
    model = nnx.Linear(64, 10, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = start()
    trainer = nnx.Optimizer(model, page().windows, wrt=nnx.Param)
    for x, y in batches():
        for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
            page().nnx_step(model, trainer, x[part], y[part])
    average = page().averaged_model(model, trainer)
    return model.kernel[...], average.kernel[...]


def after_a_run_without_an_average():
    """The first twenty steps, whose checkpoint has none."""
    level = page().level
    without = optax.chain(scale_by_flood(level, band=level / 5), optax.adam(2e-3))

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(page().loss_fn)(params, x, y)
        updates, state = without.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = [jnp.asarray(start())]
    params, restored = went_on(step, params, without.init(params), batches()[:20])
    state = (*restored, average_params(0.99).init(params))
    params, state = went_on(page().train_step, params, state, batches()[20:])
    return params[0], averaged(state, params)[0], 20


LOOPS = (
    *(in_a_loop, in_a_train_state, in_nnx_in_windows),
    after_a_run_without_an_average,
)


@pytest.mark.parametrize("loop", LOOPS)
def test_recommended_lines_equal_numpy(loop):
    assert_by_hand(*loop())


def average_on_three_devices_is_that_on_one():
    """The step of the page in `shard_map`, with the average inside of the wrapper."""
    level, inner = page().level, page().inner
    spread = flood(inner, level, band=level / 5, axis_name="data")

    def step(params, state, x, y):
        local = lax.pcast(params, "data", to="varying")
        value, grads = jax.value_and_grad(page().loss_fn)(local, x, y)
        grads = lax.pmean(grads, "data")
        updates, state = spread.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    mesh = jax.sharding.Mesh(jax.devices()[:3], ("data",))
    specs = (P(), P(), P("data"), P("data"))
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P()))
    params = [jnp.asarray(start())]
    params, state = went_on(step, params, spread.init(params), batches())
    (average,) = averaged(state, params)
    assert average.sharding.is_fully_replicated
    assert_by_hand(params[0], average)


@pytest.mark.slow
def test_average_on_several_devices():
    name = average_on_three_devices_is_that_on_one.__name__
    processes.assert_held(name, __file__, devices=3)


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


def expected_statistics(kernels, parts):
    """NumPy's mean and variance of each layer, each example of the parts alike."""
    seen = [[], []]
    for part in parts:
        x = np.float64(part)
        for layer, kernel in zip(seen, kernels, strict=True):
            x = x @ np.float64(kernel)
            mean, var = x.mean(0), x.var(0)
            layer.append((mean, var))
            x = np.maximum((x - mean) / np.sqrt(var + 1e-5), 0)
    counts = [len(part) for part in parts]
    return [np.average(layer, axis=0, weights=counts) for layer in seen]


def assert_statistics(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


PARTS = {"one batch": [200], "three batches": [90, 90, 20]}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", PARTS.values(), ids=PARTS)
def test_reestimated_statistics_are_those_of_the_activations(sizes):
    parts = np.split(page().x[: sum(sizes)], np.cumsum(sizes)[:-1])
    net = Net()
    variables = jax.jit(net.init, static_argnums=2)(
        jax.random.key(0), page().x[:2], False
    )
    spoiled = jax.tree.map(lambda a: np.asarray(a) + 3, variables["batch_stats"])
    got = page().reestimated(net, variables["params"], spoiled, parts)
    kernels = [variables["params"][f"Dense_{i}"]["kernel"] for i in range(2)]
    for i, expected in enumerate(expected_statistics(kernels, parts)):
        layer = got[f"BatchNorm_{i}"]
        assert_statistics([layer["mean"], layer["var"]], expected)

    rngs, widths = nnx.Rngs(0), ((64, 32), (32, 16))
    linears = [nnx.Linear(m, n, use_bias=False, rngs=rngs) for m, n in widths]
    norms = [nnx.BatchNorm(n, rngs=rngs) for _, n in widths]
    model = nnx.Sequential(linears[0], norms[0], nnx.relu, linears[1], norms[1])
    model.eval()
    page().reestimate(model, parts)
    kernels = [linear.kernel[...] for linear in linears]
    for norm, expected in zip(norms, expected_statistics(kernels, parts), strict=True):
        assert_statistics([norm.mean[...], norm.var[...]], expected)
        assert (norm.momentum, norm.use_running_average) == (0.99, True), "as before"


@pytest.mark.slow
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
    check = average_on_three_devices_is_that_on_one
    processes.report({check.__name__: check})
