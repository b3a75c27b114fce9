"""Batches split over devices: every form gives the gradient of one large batch.

This file is also a script: pytest starts it once per number of forced host devices, it
runs every check there and prints a line of JSON for each, {name: null or traceback}.
The oracle is the whole batch in NumPy, in float64.
"""

import functools
import json
import os
import re
import subprocess
import sys
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from flood_optax import flood, flood_mean, flooded, scale_by_flood, shapes

ROWS, FEATURES, CLASSES = 16, 8, 3
LEARNING_RATE = 0.5
CHECKS = {4: {}, 8: {}}  # by number of devices, then by name


def check(function):
    """Registers a check that runs with 4 and with 8 devices."""
    for checks in CHECKS.values():
        checks[function.__name__] = function
    return function


def check_once(function):
    """Registers a check to which the number of devices is the same."""
    CHECKS[4][function.__name__] = function
    return function


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


def numpy_gradient(level, where=slice(None), groups=None):
    """Sum over the groups of n_k/n sign(mean_k - b_k) d mean_k: value and gradient."""
    x, y = (a[where] for a in batch())
    losses, slopes = numpy_losses(x, y)
    groups = np.zeros(len(x), int) if groups is None else groups[where]
    value, grad = 0.0, {"w": np.zeros(FEATURES), "b": 0.0}
    for k in np.unique(groups):
        rows = groups == k
        bound = np.broadcast_to(level, (groups.max() + 1,))[k]
        mean = losses[rows].mean()
        sign = 1.0 if mean >= bound else -1.0
        flooded_mean = mean if sign > 0 else 2 * bound - mean
        value += rows.mean() * flooded_mean
        for name, slope in slopes.items():
            grad[name] = grad[name] + rows.mean() * sign * slope[rows].mean(0)
    return value, grad


MEAN = float(numpy_losses(*batch())[0].mean())
LEVELS = {
    "above": np.float32(0.8 * MEAN),
    "below": np.float32(1.2 * MEAN),
    "off": np.float32(-np.inf),
}


def assert_close(got, expected, rtol=3e-6):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def expected_updates(level):
    return jax.tree.map(lambda g: -LEARNING_RATE * g, numpy_gradient(level)[1])


# ---- every form at once ----


def optimizers(level, axis_name=None, inner=None):
    """Each optax form, with SGD behind it."""
    inner = optax.sgd(LEARNING_RATE) if inner is None else inner
    skip = optax.skip_not_finite
    return {
        "chain": optax.chain(scale_by_flood(level, axis_name=axis_name), inner),
        "wrapper": flood(inner, level, axis_name=axis_name),
        "skipping": flood(
            inner, level, axis_name=axis_name, should_skip_update_fn=skip
        ),
    }


def objectives(level, axis_name=None):
    """Each loss form of the batch's mean."""
    return {
        "flooded": flooded(loss_fn, level, axis_name=axis_name),
        "flood_mean": lambda *args: flood_mean(
            losses_fn(*args), level, axis_name=axis_name
        ),
    }


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
    for name, objective in objectives(level, axis_name).items():
        value, grads = jax.value_and_grad(objective)(local, *batch)
        results[name] = (
            (value, whole(grads)) if axis_name is None else (whole(value), whole(grads))
        )
    return results


def assert_large_batch(results, level):
    """Compares with NumPy's large batch; the optax forms also by their state."""
    value, gradient = numpy_gradient(level)
    assert len(results) == 6
    for name in ("chain", "wrapper", "skipping", "window"):
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


# ---- jit: nothing is needed ----


def jit_equals_the_large_batch(kind):
    mesh = mesh_of("data", kind=kind)
    with jax.set_mesh(mesh):
        arrays, _ = batch_and_halves(mesh)
        params = put(mesh, parameters(), P())
        step = jax.jit(every_form)
        for level in LEVELS.values():
            results = step(params, level, *arrays)
            leaves = jax.tree.leaves(results)
            assert all(leaf.sharding.is_fully_replicated for leaf in leaves)
            assert_large_batch(results, level)


@check
def jit_with_auto_sharding_equals_the_large_batch():
    jit_equals_the_large_batch(AxisType.Auto)


@check
def jit_with_explicit_sharding_equals_the_large_batch():
    jit_equals_the_large_batch(AxisType.Explicit)


def sharded_parameters_keep_their_sharding(kind):
    """Parameters split over the devices, as in FSDP; two steps, one window of two."""
    mesh = mesh_of("data", kind=kind)
    split = {"w": NamedSharding(mesh, P("data")), "b": NamedSharding(mesh, P())}
    level = LEVELS["below"]

    def whole_loss(params, x, y):
        if kind == AxisType.Explicit:
            params = {**params, "w": jax.sharding.reshard(params["w"], P())}
        return loss_fn(params, x, y)

    with jax.set_mesh(mesh):
        params = jax.device_put(parameters(), split)
        (arrays, _), _ = batch_and_halves(mesh)
        adam = optax.adam(0.1)
        window = flood(adam, level, every_k=2)
        for optimizer in (*optimizers(level, inner=adam).values(), window):

            @jax.jit
            def step(params, state, x, y, optimizer=optimizer):
                value, grads = jax.value_and_grad(whole_loss)(params, x, y)
                return optimizer.update(grads, state, params, value=value)

            updates, state = {}, optimizer.init(params)
            for _ in range(2):
                updates, new = step(params, state, *arrays)
                assert typeof(updates) == typeof(params)
                assert typeof(new) == typeof(state)
                tensors = [a for a in jax.tree.leaves((updates, state, new)) if a.ndim]
                assert len(tensors) >= 5
                for tensor in tensors:
                    assert tensor.sharding.is_equivalent_to(split["w"], 1), tensor
                state = new
            signs = np.sign(numpy_gradient(level)[1]["w"])
            np.testing.assert_array_equal(np.sign(updates["w"]), -signs)


def typeof(tree):
    """Shape, dtype, weak type and, in explicit mode, sharding of every leaf."""
    return jax.tree.map(jax.typeof, tree)


@check_once
def sharded_parameters_with_auto_sharding_keep_it():
    sharded_parameters_keep_their_sharding(AxisType.Auto)


@check
def sharded_parameters_with_explicit_sharding_keep_it():
    sharded_parameters_keep_their_sharding(AxisType.Explicit)


# ---- shard_map ----


def shard_map_equals_the_large_batch(check_vma, *names):
    mesh = mesh_of(*names)
    axes = names if len(names) > 1 else names[0]
    arrays, specs = batch_and_halves(mesh, axes)
    form = functools.partial(every_form, axis_name=axes)
    step = mapped(form, mesh, (P(), P(), *specs), check_vma=check_vma)
    for level in LEVELS.values():
        assert_large_batch(step(parameters(), level, *arrays), level)


@check
def shard_map_with_check_vma_equals_the_large_batch():
    shard_map_equals_the_large_batch(True, "data")


@check
def shard_map_without_check_vma_equals_the_large_batch():
    shard_map_equals_the_large_batch(False, "data")


@check
def shard_map_over_two_axes_equals_the_large_batch():
    shard_map_equals_the_large_batch(True, "data", "fsdp")


@check_once
def shard_map_on_one_axis_of_two_equals_the_large_batch():
    """The other axis holds replicas: the axis name says what the batch is."""
    mesh = mesh_of("data", "replica")
    arrays, specs = batch_and_halves(mesh)
    form = functools.partial(every_form, axis_name="data")
    level = LEVELS["below"]
    step = mapped(form, mesh, (P(), P(), *specs), check_vma=True)
    assert_large_batch(step(parameters(), level, *arrays), level)


@check_once
def shard_map_reports_the_global_loss_in_info():
    mesh = mesh_of("data")
    level = LEVELS["below"]
    objective = flooded(loss_fn, level, axis_name="data", return_info=True)

    def info_of(params, x, y):
        return objective(varying(params), x, y)[1]

    specs = (P(), P("data", None), P("data"))
    for check_vma in (True, False):
        info = mapped(info_of, mesh, specs, check_vma=check_vma)(
            parameters(), *rows_on(mesh)
        )
        np.testing.assert_allclose(info.loss, MEAN, rtol=1e-6)
        assert info.multiplier == -1


GROUPS = np.array([0, 0, 2, 0, 0, 2, 0, 2, 0, 0, 2, 2, 0, 2, 2, 2])  # class 1 is empty


def partitions():
    """Arguments of flood_mean per partition, and the groups that NumPy averages."""
    losses = numpy_losses(*batch())[0]
    means = [losses[k == GROUPS].mean() for k in (0, 2)]
    per_class = np.array([0.9 * means[0], 1.0, 1.1 * means[1]])  # one above, one below
    per_example = losses * np.where(np.arange(ROWS) % 3, 0.9, 1.1)
    return {
        "example": (per_example, np.arange(ROWS)),
        "segment": (per_class, GROUPS),
    }


def shard_map_floods_partitions(check_vma):
    mesh = mesh_of("data")
    for over, (level, groups) in partitions().items():
        bound = jnp.asarray(level, jnp.float32)
        split = P("data") if over == "example" else P()

        def value_and_grad(params, x, y, ids, bound, *, over=over):
            def objective(params):
                given = {"segment_ids": ids, "num_segments": CLASSES}
                return flood_mean(
                    losses_fn(params, x, y),
                    bound,
                    over=over,
                    axis_name="data",
                    **(given if over == "segment" else {}),
                )

            value, grads = jax.value_and_grad(objective)(varying(params))
            return lax.pmean((value, grads), "data")

        specs = (P(), P("data", None), P("data"), P("data"), split)
        got = mapped(value_and_grad, mesh, specs, check_vma=check_vma)(
            parameters(), *rows_on(mesh), jnp.asarray(GROUPS), bound
        )
        assert_close(got, numpy_gradient(level, groups=groups))


@check
def shard_map_with_check_vma_floods_classes_and_examples():
    shard_map_floods_partitions(True)


@check
def shard_map_without_check_vma_floods_classes_and_examples():
    shard_map_floods_partitions(False)


@check
def shard_map_scan_over_a_window_equals_the_large_batch():
    """The state is made inside the map; the gradients are averaged at each step."""
    mesh = mesh_of("data")
    level = LEVELS["below"]
    optimizer = flood(optax.sgd(LEARNING_RATE), level, every_k=2, axis_name="data")

    def run(params, halves):
        def step(state, rows):
            value, grads = jax.value_and_grad(loss_fn)(varying(params), *rows)
            grads = global_mean(grads)
            updates, state = optimizer.update(grads, state, params, value=value)
            return state, updates

        return lax.scan(step, optimizer.init(params), halves)[1]

    (_, halves), specs = batch_and_halves(mesh)
    for check_vma in (True, False):
        step = mapped(run, mesh, (P(), specs[1]), check_vma=check_vma)
        updates = step(parameters(), halves)
        assert not any(np.any(u[0]) for u in jax.tree.leaves(updates))
        last = jax.tree.map(lambda u: u[1], updates)
        assert_close(last, expected_updates(level))


@check
def shard_map_scan_averaging_once_per_window_equals_the_large_batch():
    """Local gradients accumulate; only what the window gives is averaged."""
    mesh = mesh_of("data")
    level = LEVELS["below"]
    optimizer = flood(optax.sgd(LEARNING_RATE), level, every_k=2, axis_name="data")

    def run(params, halves):
        params = varying(params)

        def step(state, rows):
            value, grads = jax.value_and_grad(loss_fn)(params, *rows)
            updates, state = optimizer.update(grads, state, params, value=value)
            return state, updates

        _, updates = lax.scan(step, optimizer.init(params), halves)
        return global_mean(jax.tree.map(lambda u: u.sum(0), updates))

    (_, halves), specs = batch_and_halves(mesh)
    for check_vma in (True, False):
        step = mapped(run, mesh, (P(), specs[1]), check_vma=check_vma)
        assert_close(step(parameters(), halves), expected_updates(level))


@check_once
def shard_map_line_search_sees_the_global_flooded_loss():
    """value_fn is the local one; flood averages it, so all devices take one step."""
    mesh = mesh_of("data")
    level = LEVELS["below"]
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
    inner = optax.chain(optax.sgd(0.1), search)
    mapped_form = flood(inner, level, axis_name="data")
    single = flood(inner, level)
    params = parameters()

    def step(params, x, y):
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        grads = lax.pmean(grads, "data")
        updates, _ = mapped_form.update(
            grads,
            mapped_form.init(params),
            params,
            value=value,
            grad=grads,
            value_fn=lambda p: loss_fn(p, x, y),
        )
        return updates

    specs = (P(), P("data", None), P("data"))
    got = mapped(step, mesh, specs, check_vma=False)(params, *rows_on(mesh))
    x, y = batch()
    value, grads = jax.value_and_grad(loss_fn)(params, x, y)
    expected, _ = single.update(
        grads,
        single.init(params),
        params,
        value=value,
        grad=grads,
        value_fn=lambda p: loss_fn(p, x, y),
    )
    assert_close(got, expected, rtol=1e-5)


# ---- padding ----


@check
def padded_and_uneven_shards_equal_the_unpadded_batch():
    """One device counts nothing, one half; what is padded is NaN."""
    mesh = mesh_of("data")
    per = ROWS // jax.device_count()
    mask = np.ones(ROWS, bool)
    mask[:per] = False
    mask[-per // 2 :] = False
    x, y = batch()
    y[~mask] = np.nan
    losses = numpy_losses(x[mask], y[mask])[0]
    params, rows = parameters(), P("data")
    for level in (0.9 * losses.mean(), 1.1 * losses.mean()):
        expected = numpy_gradient(level, where=mask)

        def objective(params, x, y, mask, *, axis_name=None, level=level):
            losses = losses_fn(params, x, y)
            return flood_mean(losses, level, where=mask, axis_name=axis_name)

        def value_and_grad(params, x, y, mask, objective=objective):
            value, grads = jax.value_and_grad(objective)(
                varying(params), x, y, mask, axis_name="data"
            )
            return lax.pmean((value, grads), "data")

        # the rows of y that are NaN give NaN gradients unless the loss is masked too
        safe = np.where(mask, y, 0)
        for check_vma in (True, False):
            got = mapped(
                value_and_grad,
                mesh,
                (P(), P("data", None), rows, rows),
                check_vma=check_vma,
            )(params, x, safe, mask)
            assert_close(got, expected)
            value, _ = mapped(
                value_and_grad,
                mesh,
                (P(), P("data", None), rows, rows),
                check_vma=check_vma,
            )(params, x, y, mask)
            np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        arrays = [
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in ((x, P("data", None)), (safe, rows), (mask, rows))
        ]
        got = jax.jit(jax.value_and_grad(objective))(params, *arrays)
        assert_close(got, expected)


@check
def padded_classes_on_uneven_shards_equal_the_unpadded_batch():
    mesh = mesh_of("data")
    mask = np.arange(ROWS) % 5 != 0
    mask[: ROWS // jax.device_count()] = False
    losses = numpy_losses(*batch())[0]
    means = [losses[mask & (k == GROUPS)].mean() for k in (0, 2)]
    level = np.array([1.1 * means[0], 1.0, 0.9 * means[1]])
    expected = numpy_gradient(level, where=mask, groups=GROUPS)

    def value_and_grad(params, x, y, ids, mask):
        def objective(params):
            return flood_mean(
                losses_fn(params, x, y),
                jnp.asarray(level, jnp.float32),
                over="segment",
                segment_ids=ids,
                num_segments=CLASSES,
                where=mask,
                axis_name="data",
            )

        value, grads = jax.value_and_grad(objective)(varying(params))
        return lax.pmean((value, grads), "data")

    specs = (P(), P("data", None), P("data"), P("data"), P("data"))
    for check_vma in (True, False):
        got = mapped(value_and_grad, mesh, specs, check_vma=check_vma)(
            parameters(), *batch(), GROUPS, mask
        )
        assert_close(got, expected)


# ---- pmap and vmap ----


def stacked():
    """The batch and its halves with a leading axis of devices."""
    n = jax.device_count()
    rows = tuple(a.reshape(n, -1, *a.shape[1:]) for a in batch())
    return rows, tuple(a.reshape(n, 2, -1, *a.shape[2:]) for a in rows)


@check
def pmap_equals_the_large_batch_on_every_replica():
    form = functools.partial(every_form, axis_name="data")
    step = jax.pmap(form, axis_name="data", in_axes=(None, None, 0, 0))
    for level in LEVELS.values():
        results = jax.device_get(step(parameters(), level, *stacked()))
        for i in range(jax.device_count()):
            one = jax.tree.map(lambda a, i=i: a[i], results)
            assert_large_batch(one, level)


@check_once
def vmap_with_an_axis_name_equals_the_large_batch():
    form = functools.partial(
        every_form, axis_name="data", spread=lambda params, axis_name: params
    )
    step = jax.jit(jax.vmap(form, in_axes=(None, None, 0, 0), axis_name="data"))
    level = LEVELS["below"]
    results = step(parameters(), level, *stacked())
    assert_large_batch(jax.tree.map(lambda a: a[-1], results), level)


# ---- collectives ----

COLLECTIVE = re.compile(
    r"= (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|collective-permute"
    r"|all-to-all)(?:-start)?\("
)


def collectives(step, *arguments):
    """Kind and result types of every collective in the compiled program."""
    text = jax.jit(step).lower(*arguments).compile().as_text()
    shape = re.compile(r"\w+\[[\d,]*\]")
    return [(m[2], sorted(shape.findall(m[1]))) for m in COLLECTIVE.finditer(text)]


def training_steps():
    adam = optax.with_extra_args_support(optax.adam(0.1))
    level = LEVELS["below"]
    forms = {
        "plain": (loss_fn, adam),
        "chain": (loss_fn, optax.chain(scale_by_flood(level), adam)),
        "wrapper": (loss_fn, flood(adam, level)),
        "flooded": (flooded(loss_fn, level), adam),
        "flood_mean": (lambda *a: flood_mean(losses_fn(*a), level), adam),
        "MultiSteps": (
            loss_fn,
            optax.with_extra_args_support(
                optax.MultiSteps(adam, 2).gradient_transformation()
            ),
        ),
        "window": (loss_fn, flood(adam, level, every_k=2)),
    }
    steps = {}
    for name, (objective, optimizer) in forms.items():

        def step(params, state, x, y, *, objective=objective, optimizer=optimizer):
            value, grads = jax.value_and_grad(objective)(params, x, y)
            updates, state = optimizer.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state, value

        steps[name] = step, optimizer.init(parameters())
    return steps


@check_once
def jit_adds_no_collective_but_one_scalar_for_the_loss_form():
    for axes in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of("data", kind=axes)
        with jax.set_mesh(mesh):
            params = jax.device_put(parameters(), NamedSharding(mesh, P()))
            counts = {
                name: collectives(step, params, state, *rows_on(mesh))
                for name, (step, state) in training_steps().items()
            }
        plain = counts["plain"]
        assert plain, "the plain step reduces its gradients"
        assert {kind for kind, _ in plain} == {"all-reduce"}
        for name in ("chain", "wrapper"):
            assert counts[name] == plain, (name, counts)
        assert counts["window"] == counts["MultiSteps"], counts
        for name in ("flooded", "flood_mean"):
            assert len(counts[name]) <= len(plain) + 1, (name, counts)
            scalars = [t for _, t in counts[name] if t == ["f32[]"]]
            assert len(scalars) == 1, (name, counts)
            assert {kind for kind, _ in counts[name]} == {"all-reduce"}


# ---- what the one-liners do: the numbers of docs/traps.md ----

# One example per device; losses w^2 s_i with mean .255 at w = 0.1, gradient 5.1.
SLOPES = np.array([2.5, 12.5, 30.5, 56.5])
TRAP_LEVEL, W = 0.2, np.float32(0.1)


def naive_flood(loss):
    return jnp.abs(loss - TRAP_LEVEL) + TRAP_LEVEL


def trap_loss(w, s):
    return (w**2 * s).mean()


def trap_gradient(function, *, check_vma):
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    specs = (P(), P("data"))
    out = mapped(function, mesh, specs, check_vma=check_vma)
    return float(out(W, np.float32(SLOPES)))


@check_once
def trap_per_device_flooding_is_another_objective():
    def gradient(w, s):
        grad = jax.grad(lambda w: naive_flood(trap_loss(w, s)))(varying(w))
        return lax.pmean(grad, "data")

    for check_vma in (True, False):
        assert abs(trap_gradient(gradient, check_vma=check_vma) - 3.6) < 1e-5

    def ours(w, s):
        objective = flooded(trap_loss, TRAP_LEVEL, axis_name="data")
        return lax.pmean(jax.grad(objective)(varying(w), s), "data")

    for check_vma in (True, False):
        assert abs(trap_gradient(ours, check_vma=check_vma) - 5.1) < 1e-5


@check_once
def trap_pmean_inside_the_loss_keeps_the_local_gradient_without_check_vma():
    """Jax issue 3970: without check_vma each device keeps its own share."""

    def gradient(w, s):
        loss = lambda w: naive_flood(lax.pmean(trap_loss(w, s), "data"))
        return jax.grad(loss)(w)

    assert abs(trap_gradient(gradient, check_vma=True) - 5.1) < 1e-5
    assert abs(trap_gradient(gradient, check_vma=False) - 0.5) < 1e-5


@check_once
def trap_replicated_params_with_check_vma_are_summed_already():
    def gradient(w, s):
        objective = flooded(trap_loss, TRAP_LEVEL, axis_name="data")
        return lax.pmean(jax.grad(objective)(w, s), "data")

    assert abs(trap_gradient(gradient, check_vma=True) - 20.4) < 1e-4
    assert abs(trap_gradient(gradient, check_vma=False) - 5.1) < 1e-5


@check_once
def trap_local_value_flips_some_devices_only():
    """Silently wrong without check_vma, refused with it; replicas diverge in pmap."""

    def update(w, s, axis_name=None):
        value, grad = jax.value_and_grad(trap_loss)(varying(w), s)
        transform = scale_by_flood(TRAP_LEVEL, axis_name=axis_name)
        grad = lax.pmean(grad, "data")
        return transform.update(grad, transform.init(w), value=value)[0]

    # the first device's answer, whose own loss .025 is below the level
    assert abs(trap_gradient(update, check_vma=False) + 5.1) < 1e-5
    with pytest.raises(ValueError, match="out_specs"):
        trap_gradient(update, check_vma=True)
    for check_vma in (True, False):
        right = functools.partial(update, axis_name="data")
        assert abs(trap_gradient(right, check_vma=check_vma) - 5.1) < 1e-5

    rows = np.float32(SLOPES).reshape(4, 1)
    mapped_update = jax.pmap(
        update, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:4]
    )
    np.testing.assert_allclose(mapped_update(W, rows), [-5.1, -5.1, 5.1, 5.1], 1e-5)


@check_once
def trap_pmean_of_masked_means_weighs_examples_unequally():
    """One example counts on the first device and four on the second."""
    losses = np.float32([0.1, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    mask = np.array([True, False, False, False, True, True, True, True])
    level = 0.7
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )

    def naive(losses, mask):
        mean = lax.pmean(jnp.where(mask, losses, 0).sum() / mask.sum(), "data")
        return mean, jnp.sign(mean - level)

    def ours(losses, mask):
        mean = functools.partial(flood_mean, where=mask, axis_name="data")
        grad = jax.grad(lambda c: mean(c * losses, level))(varying(jnp.float32(1)))
        return mean(losses, -np.inf), jnp.sign(lax.pmean(grad, "data"))

    specs = (P("data"), P("data"))
    got = mapped(naive, mesh, specs, check_vma=False)(losses, mask)
    np.testing.assert_allclose(got, (0.55, -1), rtol=1e-6)
    got = mapped(ours, mesh, specs, check_vma=False)(losses, mask)
    np.testing.assert_allclose(got, (losses[mask].mean(), 1), rtol=1e-6)
    np.testing.assert_allclose(got[0], 0.82, rtol=1e-6)


@check_once
def shapes_other_than_reflect_use_the_global_residual():
    mesh = mesh_of("data")
    level = LEVELS["below"]
    r = MEAN - level
    multiplier = r / np.sqrt(1 + r * r)
    raw = numpy_gradient(-np.inf)[1]
    expected = jax.tree.map(lambda g: multiplier * g, raw)
    objective = flooded(loss_fn, level, axis_name="data", shape=shapes.soft())

    def gradient(params, x, y):
        return lax.pmean(jax.grad(objective)(varying(params), x, y), "data")

    specs = (P(), P("data", None), P("data"))
    got = mapped(gradient, mesh, specs, check_vma=True)(parameters(), *rows_on(mesh))
    assert_close(got, expected, rtol=1e-5)


# ---- the runner ----


@functools.cache
def report(devices):
    """What every check says with this many devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    try:
        ended = subprocess.run(
            (sys.executable, __file__),
            env=environment,
            capture_output=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        ended = late
    outcomes = {}
    for line in (ended.stdout or b"").splitlines():
        outcomes |= json.loads(line)
    tail = (ended.stderr or b"").decode(errors="replace")[-3000:]
    return outcomes, f"It did not end:\n{tail}"


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        pytest.param(name, n, marks=[pytest.mark.slow] if n > 4 else [])
        for n, checks in CHECKS.items()
        for name in checks
    ],
)
def test_sharding(name, devices):
    outcomes, otherwise = report(devices)
    assert outcomes.get(name, otherwise) is None, outcomes.get(name, otherwise)


def main():
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", ".*pmap.*", DeprecationWarning)
    for name, function in CHECKS[jax.device_count()].items():
        try:
            function()
            outcome = None
        except Exception:
            outcome = traceback.format_exc(limit=-6)
        print(json.dumps({name: outcome}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
