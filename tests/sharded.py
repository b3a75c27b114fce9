"""One problem split over devices: its oracle, every form of it, meshes, checks.

The oracle is the whole batch in NumPy, in float64. A file of checks is also a script:
pytest starts it once per number of forced host devices.
"""

import functools
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from flood_optax import flood
from tests import forms, oracles, processes

ROWS, FEATURES = 16, 8
LEARNING_RATE = 0.5


class Checks:
    """The checks of one file, by number of devices, then by name."""

    def __init__(self):
        self.by_devices = {4: {}, 8: {}}
        self.rare = {}

    def always(self, function):
        """Registers a check that runs with 4 and with 8 devices."""
        for checks in self.by_devices.values():
            checks[function.__name__] = function
        return function

    def once(self, function):
        """Registers a check to which the number of devices is the same."""
        self.by_devices[4][function.__name__] = function
        return function

    def rarely(self, function):
        """Registers one for the slow tests alone, which have a process of their own."""
        self.rare[function.__name__] = function
        return function

    def each(self, register, function, **cases):
        """Registers one check for each of the cases: the rest of a name, arguments."""
        for case, arguments in cases.items():
            check = functools.partial(function, *arguments)
            check.__name__ = f"{function.__name__}_{case}"
            register(check)

    def assert_held(self, name, script, devices):
        group = ["rare"] if name in self.rare else []
        processes.assert_held(name, script, *group, devices=devices)

    def parametrize(self):
        """One test for each check and number of devices."""
        cases = [
            pytest.param(name, n, marks=[pytest.mark.slow] if n > 4 else [])
            for n, checks in self.by_devices.items()
            for name in checks
        ]
        cases += [pytest.param(name, 4, marks=pytest.mark.slow) for name in self.rare]
        return pytest.mark.parametrize(("name", "devices"), cases)

    def report(self):
        """What the script does, in a process with so many devices."""
        warnings.filterwarnings("ignore", ".*pmap.*", DeprecationWarning)
        rare = sys.argv[1:] == ["rare"]
        processes.report(self.rare if rare else self.by_devices[jax.device_count()])


# ---- the problem and its oracle ----


def batch():
    """Rows whose errors grow, so some shards lie below any level and some above."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    y = (x @ np.linspace(-1, 2, FEATURES) + np.linspace(0, 3, ROWS)).astype(np.float32)
    return x, y


def parameters():
    w = np.linspace(-1, 2.1, FEATURES, dtype=np.float32)
    return {"w": jnp.asarray(w), "b": jnp.float32(0.25)}


def losses_fn(params, x, y):
    return (x @ params["w"] + params["b"] - y) ** 2


def loss_fn(params, x, y):
    return losses_fn(params, x, y).mean()


def numpy_losses(x, y):
    """Losses per row, and their gradients per row, in float64."""
    params = parameters()
    w, b = np.asarray(params["w"], np.float64), float(params["b"])
    x, y = x.astype(np.float64), y.astype(np.float64)
    r = x @ w + b - y
    return r**2, {"w": 2 * r[:, None] * x, "b": 2 * r}


def numpy_gradient(level):
    """The flooded mean, and its gradient."""
    losses, slopes = numpy_losses(*batch())
    value, by_loss = oracles.mean(losses, level)
    return value, {name: by_loss @ slope for name, slope in slopes.items()}


MEAN = float(numpy_losses(*batch())[0].mean())
LEVELS = {
    "above": np.float32(0.8 * MEAN),
    "below": np.float32(1.2 * MEAN),
    "off": np.float32(-np.inf),
}


def assert_close(got, expected, rtol=3e-6, name=""):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        atol = rtol * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


def expected_updates(level):
    return jax.tree.map(lambda g: -LEARNING_RATE * g, numpy_gradient(level)[1])


# ---- every form at once ----


def optimizers(level, axis_name=None, inner=None):
    """Each optax form that steps at once, with SGD behind it."""
    inner = optax.sgd(LEARNING_RATE) if inner is None else inner
    every = forms.optimizers(inner, level, axis_name=axis_name)
    return {name: made for name, made in every.items() if name != "flood_every_k"}


def varying(tree, axes="data"):
    """Parameters whose gradient JAX leaves to the caller to average."""
    if not axes:
        return tree
    if hasattr(lax, "pcast"):
        return lax.pcast(tree, axes, to="varying")
    return jax.tree.map(lambda a: lax.pvary(a, axes), tree)  # before jax 0.8


def global_mean(tree, axis_name="data"):
    return lax.pmean(tree, axis_name) if axis_name else tree


def every_form(params, level, batch, halves, *, axis_name=None, spread=varying):
    """The updates of the optax forms; value and gradient of the loss forms.

    `halves` holds the rows of `batch` as two micro-batches: one window is the batch.
    """
    whole = functools.partial(global_mean, axis_name=axis_name)
    local = spread(params, axis_name)
    value_and_grad = jax.value_and_grad(loss_fn)
    value, grads = value_and_grad(local, *batch)
    results = {}
    for name, optimizer in optimizers(level, axis_name).items():
        state = optimizer.init(params)
        results[name] = optimizer.update(whole(grads), state, params, value=value)
    sgd = optax.sgd(LEARNING_RATE)
    optimizer = flood(sgd, level, every_k=2, axis_name=axis_name)
    updates, state = None, optimizer.init(params)
    for i in range(2):
        value, grads = value_and_grad(local, *(a[i] for a in halves))
        updates, state = optimizer.update(whole(grads), state, params, value=value)
    results["window"] = updates, state
    for name, objective in forms.objectives(
        losses_fn, level, axis_name=axis_name
    ).items():
        value, grads = jax.value_and_grad(objective)(local, *batch)
        results[name] = (
            (value, whole(grads)) if axis_name is None else (whole(value), whole(grads))
        )
    return results


def assert_large_batch(results, level):
    """Compares with NumPy's large batch; the optax forms also by their state."""
    value, gradient = numpy_gradient(level)
    assert len(results) == 6
    for name in ("chain", "flood", "flood_skip", "window"):
        updates, state = results.pop(name)
        assert_close(updates, jax.tree.map(lambda g: -LEARNING_RATE * g, gradient))
        seen = optax.tree.get(state, "flood_value")
        np.testing.assert_allclose(seen, MEAN, rtol=1e-6)
        assert optax.tree.get(state, "flood_below") == (level > MEAN), name
        assert optax.tree.get(state, "flood_step") == 1, name
    for result in results.values():
        assert_close(result, (value, gradient))


# ---- meshes ----


def mesh_of(*names, kind=AxisType.Auto):
    sizes = (jax.device_count() // 2, 2) if len(names) == 2 else (jax.device_count(),)
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names))


def put(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def batch_and_halves(mesh, names="data"):
    """The batch and its two halves on the mesh, with their specs."""
    arrays = batch(), tuple(a.reshape(2, -1, *a.shape[1:]) for a in batch())
    specs = P(names), P(None, names)
    return tuple(put(mesh, a, s) for a, s in zip(arrays, specs, strict=True)), specs


def mapped(function, mesh, in_specs, *, check_vma):
    return jax.jit(
        jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=check_vma
        )
    )


def rows_on(mesh):
    return batch_and_halves(mesh)[0][0]


COLLECTIVE = re.compile(
    r"= (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|collective-permute"
    r"|all-to-all)(?:-start)?\("
)


def collectives(step, *arguments):
    """Kind and result types of every collective in the compiled program."""
    text = jax.jit(step).lower(*arguments).compile().as_text()
    shape = re.compile(r"\w+\[[\d,]*\]")
    return [(m[2], sorted(shape.findall(m[1]))) for m in COLLECTIVE.finditer(text)]
