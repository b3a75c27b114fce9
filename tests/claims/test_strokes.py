"""Averaged weights: the recipes of docs/strokes.md, by the code of the page.

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
from flax import nnx

from flood_optax import scale_by_flood
from tests import processes
from tests.claims.test_docs import blocks

cross_entropy = optax.softmax_cross_entropy_with_integer_labels

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "strokes.md"


# The recipes


@functools.cache
def page():
    """What the page defines, without its runs."""
    names: dict[str, Any] = {"__name__": "strokes"}
    for block in blocks(PAGE.read_text()):
        if "import" in block or "\ndef " in block or "\nclass " in block:
            exec(compile(block.partition("\nbest = ")[0], str(PAGE), "exec"), names)
    return types.SimpleNamespace(**names)


def expected_average(visited, decay):
    """The average by its definition, in float64; `visited` begins with the first."""
    total = jax.tree.map(lambda p: np.asarray(p, np.float64), visited[0])
    for params in visited[1:]:
        total = jax.tree.map(
            lambda a, p: decay * a + (1 - decay) * np.asarray(p, np.float64),
            total,
            params,
        )
    return total


def assert_close(got, expected, atol=1e-6):
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=atol)


def batches(count):
    return list(page().epoch(0))[:count]


def test_average_is_that_of_the_weights_after_each_step():
    state = page().start(1)
    visited = [state["params"]]
    for batch in batches(8):
        state = page().train_step(state, *batch)
        visited.append(state["params"])
    assert_close(state["average"], expected_average(visited, 0.99))


@pytest.mark.parametrize("copied", [True, False])
def test_an_average_that_is_the_first_weights_cannot_be_donated(copied):
    state, (batch,) = page().start(0), batches(1)
    step = jax.jit(page().train_step, donate_argnums=0)
    if copied:
        assert jnp.isfinite(step(state, *batch)["average"][0]).all()
        return
    with pytest.raises(ValueError, match="donate the same buffer twice"):
        step(state | {"average": state["params"]}, *batch)


def test_average_over_windows_is_that_over_large_batches():
    large, small = page().start(0), page().start(0)
    small["opt_state"] = page().windows.init(small["params"])
    each_micro_step, micro_batches = small["average"], batches(9)
    for i in range(0, 9, 3):
        whole = [np.concatenate(c) for c in zip(*micro_batches[i : i + 3], strict=True)]
        large = page().train_step(large, *whole)
        for batch in micro_batches[i : i + 3]:
            small = page().micro_step(small, *batch)
            each_micro_step = optax.incremental_update(
                small["params"], each_micro_step, 1 - page().DECAY
            )
    assert_close(small["average"], large["average"], atol=1e-5)
    # what is wrong with the other one: it has moved three times as far
    start = page().start(0)["average"]
    moved = [a[0] - start[0] for a in (each_micro_step, small["average"])]
    ratio = optax.tree.norm(moved[0]) / optax.tree.norm(moved[1])
    assert 1.5 < ratio < 3.0


def test_average_moves_where_a_window_emits_and_nowhere_else():
    """At a flush it does; at the end of a window that counts nothing it does not."""
    windows, params = page().windows, page().init(jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, params)
    for weight, flush, emits in [(1.0, False, 0), (0.0, False, 0), (1.0, True, 1)]:
        state = windows.init(params)
        for _ in range(1 if flush else 2):
            _, state = windows.update(
                grads, state, params, value=2.0, weight=weight, flush=flush
            )
        assert optax.tree.get(state, "flood_step") == emits
    _, state = windows.update(
        grads, windows.init(params), params, value=1.0, weight=0.0
    )
    for _ in range(2):
        _, state = windows.update(grads, state, params, value=1.0, weight=0.0)
    assert optax.tree.get(state, "flood_step") == 0


def average_on_four_devices_is_that_on_one():
    ours = page()
    alone, spread = ours.start(0), ours.start(0)
    spread["opt_state"] = ours.spread.init(spread["params"])
    step = ours.on(jax.devices()[:4])
    for start in (0, 32, 64):
        rows = slice(start, start + 32)
        alone = ours.train_step(alone, ours.x[rows], ours.y[rows])
        spread = step(spread, ours.x[rows], ours.y[rows])
    assert all(leaf.sharding.is_fully_replicated for leaf in spread["average"])
    assert_close(spread["average"], alone["average"], atol=1e-5)


def test_average_of_the_varying_copy_is_refused():
    ours = page()

    def wrong_step(state, x, y):
        stepped = ours.device_step(state, x, y)
        local = jax.lax.pcast(stepped["params"], "data", to="varying")
        average = optax.incremental_update(local, state["average"], 0.01)
        return stepped | {"average": average}

    names = vars(ours) | {"device_step": wrong_step}
    on = types.FunctionType(ours.on.__code__, names)
    state = ours.start(0) | {"opt_state": ours.spread.init(ours.start(0)["params"])}
    with pytest.raises(ValueError, match="which require replication"):
        on(jax.devices()[:1])(state, ours.x[:32], ours.y[:32])


def test_average_on_several_devices():
    name = average_on_four_devices_is_that_on_one.__name__
    processes.assert_held(name, __file__, devices=4)


def test_train_state_of_the_page_gives_the_same_average():
    ours = page()
    state = ours.start(0)
    params = state["params"]
    other = ours.AveragedState.create(
        apply_fn=ours.logits,
        params=params,
        tx=ours.optimizer,
        average=jax.tree.map(jnp.copy, params),
    )
    for batch in batches(4):
        state = ours.train_step(state, *batch)
        value, grads = jax.value_and_grad(ours.loss_fn)(other.params, *batch)
        other = other.apply_gradients(grads=grads, value=value)
    assert isinstance(other, ours.AveragedState)
    assert other.step == 4
    assert_close(other.average, state["average"], atol=1e-5)


def test_average_of_an_nnx_model_is_that_of_its_weights():
    ours = page()
    model = nnx.clone(ours.model)
    trainer = nnx.Optimizer(model, ours.optimizer, wrt=nnx.Param)
    average = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    visited = [nnx.to_pure_dict(average)]
    kept = nnx.EMA(model, 0.99, only=nnx.Param) if hasattr(nnx, "EMA") else None
    for batch in batches(4):
        average = ours.nnx_step(model, trainer, average, *batch)
        visited.append(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        if kept is not None:
            kept.update(model)
    expected = expected_average(visited, 0.99)
    assert_close(nnx.to_pure_dict(average), expected)
    if kept is not None:
        assert_close(nnx.state(kept.apply_to(model), nnx.Param), average)
        everything = nnx.EMA(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), 0.99)
        assert {"mean", "var"} < set(nnx.to_pure_dict(everything.params))


# Batch statistics


class Normed(nnx.Module):
    """The network of the page, in NNX."""

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
    net = ours.Net()
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
    net = ours.Net(momentum=0.9)
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

    params, stats = variables["params"], variables["batch_stats"]
    state = params, optimizer.init(params), stats, params, stats
    for number in range(50):
        for batch in ours.epoch(number):
            state = step(state, *batch)
    params, _, stats, average, mean_stats = state

    @jax.jit
    def test_loss_and_accuracy(params, stats):
        given = {"params": params, "batch_stats": stats}
        out = net.apply(given, ours.x[300:], train=False)
        right = (out.argmax(-1) == ours.y[300:]).mean()
        return cross_entropy(out, ours.y[300:]).mean(), 100 * right

    own = ours.reestimated(net, average, stats, np.split(ours.x[:300], 10))
    wrong, right = (test_loss_and_accuracy(average, s) for s in (stats, own))
    assert right[0] < wrong[0] - 0.05, "seen: .65 and .80"
    last = test_loss_and_accuracy(params, stats)
    assert right[0] < last[0] - 0.05, (
        "seen: .65 and .73: the average is the better model"
    )
    assert right[1] > last[1] + 1, "seen: 87.5 and 85.0 %"
    mean = test_loss_and_accuracy(average, mean_stats)
    assert right[0] < mean[0], "seen: .65 and .68"
    assert wrong[0] > last[0], (
        "seen: .80 and .73: not to be seen without the right ones"
    )


if __name__ == "__main__":
    check = average_on_four_devices_is_that_on_one
    processes.report({check.__name__: check})
