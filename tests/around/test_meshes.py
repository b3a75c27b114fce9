"""Every public function of arrays, on every kind of mesh, gives what one device gives.

A row is a call and its arrays; to add a function, add a row. Each runs under automatic
and explicit sharding, its arrays as arguments and closed over, and takes no collective
more than the line by hand beside it.
"""

import contextlib
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flood_optax
from flood_optax import (
    flood_loss,
    flood_mean,
    flooded,
    objective,
    penalty,
    scale_by_flood,
    shapes,
    sharpness,
)
from tests import oracles
from tests.sharded import (
    Checks,
    assert_close,
    collectives,
    mapped,
    mesh_of,
    put,
    varying,
)

pytestmark = pytest.mark.slow  # test_sharding.py has devices every time
CHECKS = Checks()
N, C, T = 16, 4, 6
RNG = np.random.default_rng(5)
KEY = jax.random.key(2)
CLASSES = np.array([0, 0, 2, 0, 0, 2, 0, 2, 0, 0, 2, 2, 0, 2, 2, 3])  # 1 is empty
ROWS, BOTH = ("data",), ("data", "model")

# name -> the array, and the axes of the mesh by which its own are split
ARRAYS = {
    "losses": (RNG.gamma(2.0, 0.5, N), ROWS),
    "own": (np.linspace(0.2, 1.9, N), ROWS),
    "weights": (RNG.integers(0, 3, N).astype(float), ROWS),
    "mask": (np.arange(N) % 3 > 0, ROWS),
    "ids": (CLASSES, ROWS),
    "per_class": (np.array([0.9, 1.0, 1.1, 0.1]), ()),
    "tokens": (RNG.gamma(2.0, 0.5, (N, T)), ROWS),
    "real": (np.arange(T) < RNG.integers(0, T + 1, N)[:, None], ROWS),
    "logits": (3 * RNG.normal(size=(N, C)), ROWS),
    "probs": (RNG.dirichlet(np.ones(C), N), ROWS),
    "x": (RNG.normal(size=(N, 4)), ROWS),
    "y": (RNG.normal(size=N), ROWS),
    "w": (RNG.normal(size=(4, 8)), (None, "model")),
    "v": (RNG.normal(size=8), ("model",)),
}


def array(name):
    """On one device."""
    found = ARRAYS[name][0]
    return jnp.asarray(found, np.float32 if found.dtype == float else None)


class Row(NamedTuple):
    """A call of these arrays, and the line by hand, for its collectives alone."""

    call: object
    arrays: str
    by_hand: object = None


def flood(x, level):
    return jnp.abs(x - level) + level


def over_segments(x, k, level=0.9, **options):
    return flood_mean(
        x, level, over="segment", segment_ids=k, num_segments=C, **options
    )


def relax_rows(epoch, level):
    def call(z, k, m, **axis):
        return objective.relax_loss(z, k, level, epoch=epoch, where=m, **axis)

    return call


# both parities; the mean is above the first level, that of a device below
RELAX = {
    f"relax_loss, epoch {epoch}, {level}": relax_rows(epoch, level)
    for epoch in (0, 1)
    for level in (1.0, 9.0)
}
SHAPES = {
    "soft": shapes.soft(0.4),
    "pause": shapes.pause(),
    "asymmetric": shapes.asymmetric(0.5, 0.1),
}
mean = functools.partial(flood_mean, level=0.9)
MEANS = {
    "flood_loss": Row(lambda x: flood_loss(x, 0.9), "losses", lambda x: flood(x, 0.9)),
    "flood_loss, own levels": Row(flood_loss, "losses own", flood),
    **{
        f"flood_loss, {name}": Row(
            functools.partial(flood_loss, level=0.9, shape=shape), "losses"
        )
        for name, shape in SHAPES.items()
    },
    "batch": Row(mean, "losses", lambda x: flood(x.mean(), 0.9)),
    "batch, weights": Row(
        lambda x, w: mean(x, weights=w),
        "losses weights",
        lambda x, w: flood((w * x).sum() / w.sum(), 0.9),
    ),
    "batch, mask": Row(lambda x, m: mean(x, where=m), "losses mask"),
    "example": Row(
        lambda x, b: flood_mean(x, b, over="example"),
        "losses own",
        lambda x, b: flood(x, b).mean(),
    ),
    "example, both": Row(
        lambda x, w, m: mean(x, over="example", where=m, weights=w),
        "losses weights mask",
    ),
    "sequence": Row(
        lambda x: mean(x, over="sequence"),
        "tokens",
        lambda x: flood(x.mean(1), 0.9).mean(),
    ),
    "sequence, mask": Row(
        lambda x, m, b: flood_mean(x, b, over="sequence", where=m), "tokens real own"
    ),
    "segment": Row(over_segments, "losses ids"),
    "segment, both": Row(
        lambda x, k, w, m: over_segments(x, k, weights=w, where=m),
        "losses ids weights mask",
    ),
    "flooded": Row(
        lambda x: flooded(lambda x: (x**2).mean(), 0.9)(x),
        "losses",
        lambda x: flood((x**2).mean(), 0.9),
    ),
    **{name: Row(call, "logits ids mask") for name, call in RELAX.items()},
}


def net(w, v, x, y):
    split = explicit_axes_of(w)
    at = {"out_sharding": P("data")} if split else {}
    return jnp.mean((jnp.dot(jnp.tanh(x @ w), v, **at) - y) ** 2)


def explicit_axes_of(x):
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def of_params(function, *args, **options):
    def call(w, v, x, y):
        loss = lambda params, x, y: net(params["w"], params["v"], x, y)
        return function(loss, {"w": w, "v": v}, *args, x, y, **options)

    return Row(call, "w v x y")


CURVATURE = {
    "gradient_norm": of_params(sharpness.gradient_norm),
    "hessian_trace": of_params(sharpness.hessian_trace, key=KEY, num_samples=4),
    "top_eigenvalue": of_params(sharpness.top_eigenvalue, key=KEY, num_iterations=6),
    "pair_displacement": of_params(penalty.pair_displacement, 0.1),
    "level_set_drift": of_params(penalty.level_set_drift),
    "penalty.objective": of_params(
        lambda loss, *args: jax.value_and_grad(penalty.objective(loss, 0.1))(*args)
    ),
    **{
        f"penalty.value_and_grad, {method}": of_params(
            lambda loss, *args, method=method: penalty.value_and_grad(
                loss, 0.1, method=method
            )(*args)
        )
        for method in ("exact", "forward", "backward")
    },
}


def explicit(mesh):
    return AxisType.Explicit in mesh.axis_types


def placed(mesh):
    """All arrays on the mesh, as far as it has the axes that split them."""
    return {
        name: put(mesh, array(name), P(*(x if x in mesh.shape else None for x in axes)))
        for name, (_, axes) in ARRAYS.items()
    }


@contextlib.contextmanager
def of(name):
    """An error says in which row it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"The row is: {name}")
        raise


def of_all(rows, arrays, *, slopes=False):
    """Value, and slope by the first array, of every row: one program."""
    found = {}
    for name, row in rows.items():
        first, *others = (arrays[each] for each in row.arrays.split())
        with of(name):
            found[name] = row.call(first, *others)
            if slopes:
                slope = jax.grad(
                    lambda first, row=row, o=others: row.call(first, *o).sum()
                )
                found[f"{name}, slope"] = slope(first)
    return found


def assert_rows(got, wanted, rtol):
    for name, found in got.items():
        assert_close(found, wanted[name], rtol, name)


TABLES = {"means": MEANS, "curvature": CURVATURE}


@functools.cache
def of_one_device(table):
    run = functools.partial(of_all, TABLES[table], slopes=table == "means")
    return jax.jit(run)({name: array(name) for name in ARRAYS})


def rows_equal_one_device(table, mesh_axes, kind, rtol):
    mesh, rows = mesh_of(*mesh_axes, kind=kind), TABLES[table]
    run = functools.partial(of_all, rows, slopes=table == "means")
    with jax.set_mesh(mesh):
        split = placed(mesh)
        assert_rows(jax.jit(run)(split), of_one_device(table), rtol)
        if explicit(mesh):  # JAX then forgets more easily
            closed_over = jax.jit(lambda: of_all(rows, split))()
            assert_rows(closed_over, of_one_device(table), rtol)
        for name, row in rows.items():
            if row.by_hand:
                arrays = [split[each] for each in row.arrays.split()]
                ours, hand = (collectives(f, *arrays) for f in (row.call, row.by_hand))
                assert len(ours) <= len(hand), (name, ours, hand)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CHECKS.each(
    CHECKS.always,
    rows_equal_one_device,
    means_on_an_automatic_mesh=["means", ROWS, AUTO, 2e-6],
    means_on_an_explicit_mesh=["means", ROWS, EXPLICIT, 2e-6],
)
CHECKS.each(
    CHECKS.once,
    rows_equal_one_device,
    curvature_on_an_automatic_model_axis=["curvature", BOTH, AUTO, 1e-4],
)
CHECKS.each(
    CHECKS.rarely,
    rows_equal_one_device,
    curvature_on_an_explicit_model_axis=["curvature", BOTH, EXPLICIT, 1e-4],
)


@CHECKS.once
def relax_loss_of_split_classes_equals_one_device():
    """A mask of examples has no axis of classes, which the logits' own cannot lend."""

    def both(z, k, m):
        call = lambda z: objective.relax_loss(z, k, 9.0, epoch=1, where=m)
        return jax.value_and_grad(call)(z)

    names = ("logits", "ids", "mask")
    wanted = jax.jit(both)(*map(array, names))
    for kind in (AUTO, EXPLICIT):
        mesh = mesh_of(*BOTH, kind=kind)
        with jax.set_mesh(mesh):
            z, k, m = (placed(mesh)[name] for name in names)
            split = jax.device_put(z, NamedSharding(mesh, P(*BOTH)))
            assert_close(jax.jit(both)(split, k, m), wanted, 2e-6)


# ---- shard_map: value, and slope by a factor of all losses ----

FACTOR = np.float32(0.8)
OVER_AXIS = {
    "batch": lambda a, axis: mean(a["losses"], axis_name=axis),
    "example": lambda a, axis: flood_mean(
        a["losses"], a["own"], over="example", axis_name=axis
    ),
    "segment": lambda a, axis: over_segments(
        a["losses"], a["ids"], a["per_class"], axis_name=axis
    ),
    "sequence": lambda a, axis: mean(
        a["tokens"], over="sequence", where=a["real"], axis_name=axis
    ),
    **{
        name: lambda a, axis, call=call: call(
            a["logits"], a["ids"], a["mask"], axis_name=axis
        )
        for name, call in RELAX.items()
    },
}


def scaled(calls, factor, arrays, axis=None):
    found = {}
    for name, call in calls.items():

        def of_factor(factor, call=call):
            grown = ("losses", "logits", "tokens")
            return call(arrays | {each: factor * arrays[each] for each in grown}, axis)

        with of(name):
            found[name] = jax.value_and_grad(of_factor)(factor)
    return found


def over_devices(calls, check_vma, **more):
    def local(factor, arrays):
        return lax.pmean(scaled(calls, varying(factor), arrays, "data"), "data")

    arrays = {name: array(name) for name in ARRAYS} | more
    rows = [name for name, given in arrays.items() if len(given) == N]
    specs = {name: P("data") if name in rows else P() for name in arrays}
    step = mapped(local, mesh_of("data"), (P(), specs), check_vma=check_vma)
    return lambda **changed: step(FACTOR, arrays | changed)


@CHECKS.always
def shard_map_equals_one_device_both_ways():
    arrays = {name: array(name) for name in ARRAYS}
    wanted = jax.jit(functools.partial(scaled, OVER_AXIS))(FACTOR, arrays)
    for check_vma in (True, False):
        assert_rows(over_devices(OVER_AXIS, check_vma)(), wanted, 3e-6)


@CHECKS.always
def uneven_and_padded_shards_equal_the_unpadded_batch_in_numpy():
    """The first device counts nothing, nor do two classes; what does not is NaN."""
    per, losses = N // jax.device_count(), ARRAYS["losses"][0]
    mask = np.arange(N) % 5 != 0
    mask[:per] = mask[N - per // 2 :] = False
    weights = np.random.default_rng(4).gamma(1.0, 3.0, N) * mask
    calls, wanted = {}, {}
    for over, by, part in itertools.product(
        ("batch", "example", "segment"), ("where", "weights"), (0.9, 1.1)
    ):
        count = mask if by == "where" else np.float32(weights)
        average = FACTOR * np.average(losses, weights=count)
        groups, level = (
            {"batch": None, "example": np.arange(N)}.get(over, CLASSES),
            part,
        )
        if over == "segment":  # one class above its level, one below
            of_class = lambda k, c=count: np.average(losses, weights=c * (k == CLASSES))
            level = FACTOR * np.array(
                [part * of_class(0), 1.0, (2 - part) * of_class(2), 1.0]
            )
        else:
            level = part * average
        name = f"{over}, {by}, {part}"
        calls[name] = functools.partial(
            uneven, over=over, by=by, level=np.float32(level)
        )
        value, by_loss = oracles.mean(
            FACTOR * losses, level, groups=groups, weights=count
        )
        wanted[name] = value, by_loss @ losses
    for check_vma in (True, False):
        step = over_devices(calls, check_vma, where=mask, weights=np.float32(weights))
        assert_rows(step(), wanted, 3e-6)
        spoiled = step(losses=np.float32(np.where(mask, losses, np.nan)))
        assert_rows(
            {name: value for name, (value, _) in spoiled.items()},
            {name: value for name, (value, _) in wanted.items()},
            5e-6,
        )


def uneven(arrays, axis, *, over, by, level):
    given = {by: arrays[by], "axis_name": axis}
    if over == "segment":
        given |= {"segment_ids": arrays["ids"], "num_segments": C}
    return flood_mean(arrays["losses"], level, over=over, **given)


def refusal(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


def multiplier(form, losses):
    """What an optax form makes of a gradient of 1."""
    one = jnp.ones([])
    return form.update(one, form.init(one), value=losses.mean())[0]


@CHECKS.once
def losses_that_vary_over_an_axis_want_its_name():
    """And both remedies of the message work: the name, and `()` for each device."""
    mesh, arrays = mesh_of("data"), (array("losses"), array("ids"))

    forms = {
        "flooded": lambda x, k, **axis: flooded(jnp.mean, 0.9, **axis)(x),
        "flood_mean": lambda x, k, **axis: flood_mean(x, 0.9, **axis),
        "relax_loss": lambda x, k, **axis: objective.relax_loss(
            jnp.stack([x, 2 * x, 0 * x], 1), k, 0.9, epoch=0, **axis
        ),
        "scale_by_flood()": lambda x, k, **axis: multiplier(
            scale_by_flood(0.9, **axis), x
        ),
        "flood(inner)": lambda x, k, **axis: multiplier(
            flood_optax.flood(optax.identity(), 0.9, **axis), x
        ),
    }
    parts = [np.split(np.asarray(a), jax.device_count()) for a in arrays]
    for name, form in forms.items():

        def over(split, form=form, **axis):
            out = P("data") if split else P()
            local = lambda *rows: (
                form(*rows, **axis)[None]
                if split
                else lax.pmean(form(*rows, **axis), "data")
            )
            spread = jax.shard_map(
                local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=out
            )
            return jax.jit(spread)(*arrays)

        said = refusal(over, False)
        assert f"`{name}` floods the loss of each device by itself" in said, said
        assert "Pass `axis_name='data'`" in said, said
        whole = over(False, axis_name="data")
        np.testing.assert_allclose(whole, form(*arrays), rtol=1e-5)
        alone = [form(x, k) for x, k in zip(*parts, strict=True)]
        np.testing.assert_allclose(over(True, axis_name=()), alone, rtol=1e-5)


@CHECKS.once
def names_of_no_axis_are_refused_and_the_remedy_holds():
    """Under jit with split data `axis_name` is left out."""
    whole = array("losses")
    losses = put(mesh_of("data"), whole, P("data"))
    for call in (
        lambda: flooded(jnp.mean, 0.9, axis_name="data")(losses),
        lambda: flood_mean(losses, 0.9, axis_name="data"),
        lambda: objective.relax_loss(
            jnp.ones((2, 3)), jnp.zeros(2, int), 0.9, epoch=0, axis_name="data"
        ),
    ):
        said = refusal(jax.jit(call))
        assert "must be called inside `jax.shard_map` or `jax.pmap`" in said, said
        assert "leave axis_name out" in said, said
    value = jax.jit(lambda: flooded(jnp.mean, 0.9)(losses))()
    np.testing.assert_allclose(value, flood(whole.mean(), 0.9), rtol=1e-6)


@CHECKS.parametrize()
def test_meshes(name, devices):
    CHECKS.assert_held(name, __file__, devices)


if __name__ == "__main__":
    CHECKS.report()
