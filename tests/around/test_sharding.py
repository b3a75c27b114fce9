"""Batches split over devices: every form gives the gradient of one large batch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from flood_optax import (
    average_params,
    averaged,
    flood,
    flood_mean,
    flooded,
    metrics,
    scale_by_flood,
)
from tests import oracles
from tests.sharded import (
    CLASSES,
    LEARNING_RATE,
    LEVELS,
    MEAN,
    ROWS,
    Checks,
    assert_close,
    assert_large_batch,
    batch,
    batch_and_halves,
    every_form,
    expected_updates,
    global_mean,
    loss_fn,
    losses_fn,
    mapped,
    mesh_of,
    numpy_gradient,
    numpy_losses,
    optimizers,
    parameters,
    put,
    rows_on,
    varying,
)

CHECKS = Checks()

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


@CHECKS.always
def jit_with_auto_sharding_equals_the_large_batch():
    jit_equals_the_large_batch(AxisType.Auto)


@CHECKS.always
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


@CHECKS.rarely
def sharded_parameters_with_auto_sharding_keep_it():
    sharded_parameters_keep_their_sharding(AxisType.Auto)


@CHECKS.always
def sharded_parameters_with_explicit_sharding_keep_it():
    sharded_parameters_keep_their_sharding(AxisType.Explicit)


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


@CHECKS.once
def average_with_auto_sharding_keeps_that_of_its_parameters():
    average_keeps_the_sharding_of_its_parameters(AxisType.Auto)


@CHECKS.once
def average_with_explicit_sharding_keeps_that_of_its_parameters():
    average_keeps_the_sharding_of_its_parameters(AxisType.Explicit)


# ---- shard_map ----


def shard_map_equals_the_large_batch(check_vma, *names):
    mesh = mesh_of(*names)
    axes = names if len(names) > 1 else names[0]
    arrays, specs = batch_and_halves(mesh, axes)
    form = functools.partial(every_form, axis_name=axes)
    step = mapped(form, mesh, (P(), P(), *specs), check_vma=check_vma)
    for level in LEVELS.values():
        assert_large_batch(step(parameters(), level, *arrays), level)


@CHECKS.always
def shard_map_with_check_vma_equals_the_large_batch():
    shard_map_equals_the_large_batch(True, "data")


@CHECKS.always
def shard_map_without_check_vma_equals_the_large_batch():
    shard_map_equals_the_large_batch(False, "data")


@CHECKS.always
def shard_map_over_two_axes_equals_the_large_batch():
    shard_map_equals_the_large_batch(True, "data", "fsdp")


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


@CHECKS.always
def shard_map_with_check_vma_floods_classes_and_examples():
    shard_map_floods_partitions(True)


@CHECKS.always
def shard_map_without_check_vma_floods_classes_and_examples():
    shard_map_floods_partitions(False)


@CHECKS.always
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


@CHECKS.always
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


@CHECKS.once
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


@CHECKS.always
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


@CHECKS.always
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


@CHECKS.always
def weighted_means_on_uneven_shards_equal_the_large_batch():
    """The first device weighs nothing, one class neither; NaN where the weight is 0."""
    rng, mesh = np.random.default_rng(4), mesh_of("data")
    weights = rng.gamma(1.0, 3.0, ROWS).astype(np.float32)
    ids = np.where(np.arange(ROWS) % 5 == 0, 1, GROUPS)
    weights[: ROWS // jax.device_count()] = weights[ids == 1] = 0
    losses = np.where(weights > 0, rng.uniform(0.1, 2, ROWS), np.nan).astype("f4")
    means = [np.nanmean(losses[k == ids]) for k in (0, 2)]
    per_class = np.float32([1.2 * means[0], 1.0, 0.8 * means[1]])
    whole = np.average(losses[weights > 0], weights=weights[weights > 0])
    cases = [("batch", np.float32(f * whole)) for f in (0.9, 1.1)]
    cases += [("example", np.float32(whole)), ("segment", per_class)]
    for case in cases:

        def objective(w, losses, weights, ids, *, axis_name=None, case=case):
            over, level = case
            given = {"over": over, "weights": weights, "axis_name": axis_name}
            if over == "segment":
                given |= {"segment_ids": ids, "num_segments": CLASSES}
            return flood_mean(w * losses + 0.1 * w, level, **given)

        def local(w, *rows, objective=objective):
            slope = jax.value_and_grad(objective)(varying(w), *rows, axis_name="data")
            return lax.pmean(slope, "data")

        clean, w = np.nan_to_num(losses, nan=7.0), jnp.float32(0.9)
        expected = jax.value_and_grad(objective)(w, clean, weights, ids)
        specs = (P(), P("data"), P("data"), P("data"))
        for check_vma in (True, False):
            step = mapped(local, mesh, specs, check_vma=check_vma)
            assert_close(step(w, clean, weights, ids), expected)
            value, _ = step(w, losses, weights, ids)
            np.testing.assert_allclose(value, expected[0], rtol=1e-5)


# ---- pmap and vmap ----


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
