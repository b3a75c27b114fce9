"""Batches split over devices: every form gives the gradient of one large batch."""

import functools
import itertools

import jax
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from flood_optax import (
    average_params,
    averaged,
    flood,
    flooded,
    metrics,
    scale_by_flood,
)
from tests import forms, oracles
from tests.sharded import (
    LEARNING_RATE,
    LEVELS,
    MEAN,
    Checks,
    assert_close,
    assert_large_batch,
    batch,
    batch_and_halves,
    every_form,
    expected_updates,
    global_mean,
    loss_fn,
    mapped,
    mesh_of,
    numpy_gradient,
    optimizers,
    parameters,
    put,
    rows_on,
    varying,
)

CHECKS = Checks()
KINDS = {"auto": [AxisType.Auto], "explicit": [AxisType.Explicit]}

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


CHECKS.each(CHECKS.always, jit_equals_the_large_batch, **KINDS)


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


CHECKS.each(CHECKS.rarely, sharded_parameters_keep_their_sharding, auto=KINDS["auto"])
CHECKS.each(
    CHECKS.always, sharded_parameters_keep_their_sharding, explicit=KINDS["explicit"]
)


def average_keeps_the_sharding_of_its_parameters(kind):
    """Replicated and split; each update, and windows; begun eagerly and under jit."""
    mesh = mesh_of("data", kind=kind)
    level, sgd = LEVELS["below"], optax.sgd(0.01)
    every = {
        "step": optax.chain(scale_by_flood(level), sgd, average_params(0.5)),
        "window": flood(optax.chain(sgd, average_params(0.5)), level, every_k=2),
    }
    for (name, optimizer), spec in itertools.product(every.items(), (P(), P("data"))):
        placed = {"w": NamedSharding(mesh, spec), "b": NamedSharding(mesh, P())}

        @jax.jit
        def step(params, state, x, y, optimizer=optimizer):
            whole = params
            if kind == AxisType.Explicit:
                whole = {**params, "w": jax.sharding.reshard(params["w"], P())}
            value, grads = jax.value_and_grad(loss_fn)(whole, x, y)
            if kind == AxisType.Explicit:
                w = jax.sharding.reshard(grads["w"], jax.typeof(params["w"]).sharding)
                grads = {**grads, "w": w}
            updates, state = optimizer.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state, metrics(state)

        with jax.set_mesh(mesh):
            (arrays, _), _ = batch_and_halves(mesh)
            for begin in (optimizer.init, jax.jit(optimizer.init)):
                params, visited = jax.device_put(parameters(), placed), []
                state = begin(params)
                for leaf, where in placed.items():
                    first = optax.tree.get(state, "flood_average")[leaf]
                    assert first.sharding.is_equivalent_to(where, first.ndim), spec
                for _ in range(6):
                    before = typeof(state)
                    params, state, logs = step(params, state, *arrays)
                    assert typeof(state) == before
                    visited.append(jax.device_get(params))
                    for read in (averaged, jax.jit(averaged)):
                        mean = read(state, params)
                        assert typeof(mean) == typeof(params)
                        for leaf, where in placed.items():
                            kept = optax.tree.get(state, "flood_average")[leaf]
                            for found in (mean[leaf], kept):
                                assert found.sharding.is_equivalent_to(
                                    where, found.ndim
                                ), (name, spec, leaf, found.sharding)
                taken = visited[1::2] if name == "window" else visited
                wanted = jax.tree.map(lambda *a: oracles.average(a, 0.5), *taken)
                assert_close(mean, wanted)
                assert logs["flood/steps"] == len(taken)
                assert logs["flood/share_below"] > 0
                assert all(x.sharding.is_fully_replicated for x in logs.values())


CHECKS.each(
    CHECKS.rarely, average_keeps_the_sharding_of_its_parameters, auto=KINDS["auto"]
)
CHECKS.each(
    CHECKS.once,
    average_keeps_the_sharding_of_its_parameters,
    explicit=KINDS["explicit"],
)


# ---- shard_map ----


def shard_map_equals_the_large_batch(check_vma, *names):
    mesh = mesh_of(*names)
    axes = names if len(names) > 1 else names[0]
    arrays, specs = batch_and_halves(mesh, axes)
    form = functools.partial(every_form, axis_name=axes)
    step = mapped(form, mesh, (P(), P(), *specs), check_vma=check_vma)
    for level in LEVELS.values():
        assert_large_batch(step(parameters(), level, *arrays), level)


CHECKS.each(
    CHECKS.always,
    shard_map_equals_the_large_batch,
    with_check_vma=[True, "data"],
    without_check_vma=[False, "data"],
    over_two_axes=[True, "data", "fsdp"],
)


@CHECKS.once
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


def shard_map_scan_over_a_window_equals_the_large_batch(at_once):
    """Each gradient is averaged; or local ones, and only what the window gives is."""
    mesh = mesh_of("data")
    level = LEVELS["below"]
    optimizer = flood(optax.sgd(LEARNING_RATE), level, every_k=2, axis_name="data")

    def run(params, halves):
        local = varying(params)

        def step(state, rows):
            value, grads = jax.value_and_grad(loss_fn)(local, *rows)
            grads = grads if at_once else global_mean(grads)
            updates, state = optimizer.update(grads, state, params, value=value)
            return state, updates

        params = local if at_once else params
        updates = lax.scan(step, optimizer.init(params), halves)[1]
        return global_mean(updates) if at_once else updates

    (_, halves), specs = batch_and_halves(mesh)
    for check_vma in (True, False):
        step = mapped(run, mesh, (P(), specs[1]), check_vma=check_vma)
        updates = step(parameters(), halves)
        assert not any(np.any(u[0]) for u in jax.tree.leaves(updates))
        last = jax.tree.map(lambda u: u[1], updates)
        assert_close(last, expected_updates(level))


CHECKS.each(
    CHECKS.always,
    shard_map_scan_over_a_window_equals_the_large_batch,
    averaging_each=[False],
    averaging_once=[True],
)


@CHECKS.once
def shard_map_line_search_sees_the_global_flooded_loss():
    """value_fn is the local one; flood averages it, so all devices take one step."""
    mesh = mesh_of("data")
    level = LEVELS["below"]
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=20)
    inner = optax.chain(optax.sgd(0.1), search)
    params = parameters()

    def step(params, x, y, *, axis_name=None):
        value, grads = jax.value_and_grad(loss_fn)(params, x, y)
        grads = global_mean(grads, axis_name)
        optimizer = flood(inner, level, axis_name=axis_name)
        given = {"grad": grads, "value_fn": lambda p: loss_fn(p, x, y)}
        state = optimizer.init(params)
        return optimizer.update(grads, state, params, value=value, **given)[0]

    specs = (P(), P("data", None), P("data"))
    local = functools.partial(step, axis_name="data")
    got = mapped(local, mesh, specs, check_vma=False)(params, *rows_on(mesh))
    assert_close(got, jax.jit(step)(params, *batch()), rtol=1e-5)


@CHECKS.once
def band_under_shard_map_turns_by_the_loss_of_all():
    steps, apart = np.arange(60), np.array([-0.5, -0.125, 0.25, 0.375])
    noise = np.random.default_rng(2).uniform(-0.1, 0.1, 60)
    # thirty-seconds, whose means, ties among them, are exact
    mean = np.round(32 * (0.625 + 0.3 * np.sin(steps / 4) + noise)) / 32
    losses = np.float32(mean[:, None] + apart)
    weights = np.float32(1 + steps[:, None] % 3 + [0, 2, 0, 1])

    def run(losses, weights):
        found = {}
        for name, make in forms.OPTAX.items():
            optimizer = make(optax.identity(), 0.625, band=0.125, axis_name="data")
            each = {"value": losses[:, 0]}
            found[name, "plain"] = forms.course(optimizer, **each)["multiplier"]
            each |= {"weight": weights[:, 0]}
            found[name, "weighted"] = forms.course(optimizer, **each)["multiplier"]
        return found

    specs = (P(None, "data"), P(None, "data"))
    found = mapped(run, mesh_of("data"), specs, check_vma=True)(losses, weights)
    for (name, weigh), multipliers in found.items():
        shares = weights if weigh == "weighted" else np.ones_like(weights)
        wanted, _ = oracles.windows(
            *(np.ones(60), (shares * losses).sum(1) / shares.sum(1)),
            *(2 if name == "flood_every_k" else 1, 0.625),
            weights=shares.sum(1),
            band=0.125,
        )
        np.testing.assert_array_equal(np.sign(multipliers), wanted, f"{name} {weigh}")
        assert 6 < np.sum(wanted < 0) < 54
    for own in losses.T:  # each device by itself would turn elsewhere
        turns = oracles.strokes(own, 0.625, 0.125)[1]
        assert (turns != oracles.strokes(np.float32(mean), 0.625, 0.125)[1]).any()


# ---- pmap ----


def stacked():
    """The batch and its halves with a leading axis of devices."""
    n = jax.device_count()
    rows = tuple(a.reshape(n, -1, *a.shape[1:]) for a in batch())
    return rows, tuple(a.reshape(n, 2, -1, *a.shape[2:]) for a in rows)


@CHECKS.always
def pmap_equals_the_large_batch_on_every_replica():
    form = functools.partial(every_form, axis_name="data")
    step = jax.pmap(form, axis_name="data", in_axes=(None, None, 0, 0))
    for level in LEVELS.values():
        results = jax.device_get(step(parameters(), level, *stacked()))
        for i in range(jax.device_count()):
            one = jax.tree.map(lambda a, i=i: a[i], results)
            assert_large_batch(one, level)


@CHECKS.parametrize()
def test_sharding(name, devices):
    CHECKS.assert_held(name, __file__, devices)


if __name__ == "__main__":
    CHECKS.report()
