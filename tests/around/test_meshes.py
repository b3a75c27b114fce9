"""Every public function of arrays, on every kind of mesh, gives what one device gives.

A row is a call and its arrays; to add a function, add a row. Each runs under automatic
and explicit sharding, its arrays as arguments and closed over, and takes no collective
more than the line by hand beside it.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import flood_optax
from flood_optax import (
    flood_loss,
    flood_mean,
    flooded,
    levels,
    objective,
    penalty,
    scale_by_flood,
    shapes,
    sharpness,
)
from tests.sharded import Checks, assert_close, mapped, mesh_of, varying

CHECKS = Checks()
N, C, T = 16, 3, 6
RNG = np.random.default_rng(5)
KEY = jax.random.key(2)

# name -> the array, and how it is split over ("data", "model")
ARRAYS = {
    "losses": (RNG.gamma(2.0, 0.5, N), P("data")),
    "own": (np.linspace(0.2, 1.9, N), P("data")),
    "weights": (RNG.integers(0, 3, N).astype(float), P("data")),
    "mask": (np.arange(N) % 3 > 0, P("data")),
    "ids": (np.arange(N) ** 2 % C, P("data")),
    "tokens": (RNG.gamma(2.0, 0.5, (N, T)), P("data", None)),
    "real": (np.arange(T) < RNG.integers(0, T + 1, N)[:, None], P("data", None)),
    "logits": (3 * RNG.normal(size=(N, C)), P("data", None)),
    "classes": (np.sin(3.0 * np.arange(4 * N)).reshape(N, 4), P("data", "model")),
    "probs": (RNG.dirichlet(np.ones(C), N), P("data", None)),
    "x": (RNG.normal(size=(N, 4)), P("data", None)),
    "y": (RNG.normal(size=N), P("data")),
    "w": (RNG.normal(size=(4, 8)), P(None, "model")),
    "v": (RNG.normal(size=8), P("model")),
}


class Row(NamedTuple):
    """A call of these arrays, and the line by hand, for its collectives alone."""

    call: object
    arrays: str
    by_hand: object = None


def flood(x, level):
    return jnp.abs(x - level) + level


def segment_mean(x, k):
    ones = jax.ops.segment_sum(jnp.ones_like(x), k, C)
    return (flood(jax.ops.segment_sum(x, k, C) / ones, 0.9) * ones).sum() / N


def over_segments(x, k, level=0.9, **options):
    return flood_mean(
        x, level, over="segment", segment_ids=k, num_segments=C, **options
    )


MEANS = {
    "flood_loss": Row(lambda x: flood_loss(x, 0.9), "losses", lambda x: flood(x, 0.9)),
    "flood_loss, own levels": Row(flood_loss, "losses own", flood),
    **{
        f"flood_loss, {name}": Row(
            lambda x, shape=shape: flood_loss(x, 0.9, shape=shape), "losses"
        )
        for name, shape in {
            "soft": shapes.soft(0.4),
            "pause": shapes.pause(),
            "asymmetric": shapes.asymmetric(0.5, 0.1),
        }.items()
    },
    "batch": Row(
        lambda x: flood_mean(x, 0.9), "losses", lambda x: flood(x.mean(), 0.9)
    ),
    "batch, weights": Row(
        lambda x, w: flood_mean(x, 0.9, weights=w),
        "losses weights",
        lambda x, w: flood((w * x).sum() / w.sum(), 0.9),
    ),
    "batch, mask": Row(lambda x, m: flood_mean(x, 0.9, where=m), "losses mask"),
    "example": Row(
        lambda x, b: flood_mean(x, b, over="example"),
        "losses own",
        lambda x, b: flood(x, b).mean(),
    ),
    "example, both": Row(
        lambda x, w, m: flood_mean(x, 0.9, over="example", where=m, weights=w),
        "losses weights mask",
    ),
    "sequence": Row(
        lambda x: flood_mean(x, 0.9, over="sequence"),
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
    **{
        f"relax_loss, epoch {epoch}, {level}": Row(
            lambda z, k, m, epoch=epoch, level=level: objective.relax_loss(
                z, k, level, epoch=epoch, where=m
            ),
            "logits ids mask",
        )
        for epoch in (0, 1)
        for level in (0.3, 9.0)
    },
}
OF_LEVELS = {
    "noise_matrix": Row(levels.noise_matrix, "probs ids"),
    "entropy_floor": Row(levels.entropy_floor, "probs"),
    "adaflood": Row(lambda a: levels.adaflood(a, 0.3), "losses"),
    "wavebound": Row(lambda a: levels.wavebound(a, 0.1), "losses"),
    "gradient_accordance": Row(levels.gradient_accordance, "losses own"),
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


def arrays_of(row):
    """Its arrays on one device, and how they are split."""
    given = [ARRAYS[name] for name in row.arrays.split()]
    return [jnp.asarray(a.astype("f4") if a.dtype == float else a) for a, _ in given], [
        spec for _, spec in given
    ]


def collectives(compiled):
    found = re.findall(
        r"= .*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
        r"(?:-start)?\(",
        compiled.as_text(),
    )
    return sorted(found)


def assert_equal(name, got, wanted, rtol):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        atol = rtol * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


def rows_hold(rows, mesh, *, slopes=False, rtol=2e-6):
    """Value, and slope by the first array, are those of one device."""
    for name, row in rows.items():
        arrays, specs = arrays_of(row)

        def both(*arrays, call=row.call):
            slope = jax.grad(lambda first: call(first, *arrays[1:]).sum())
            return call(*arrays), slope(arrays[0]) if slopes else None

        wanted = jax.jit(both)(*arrays)
        with jax.set_mesh(mesh):
            split = [
                jax.device_put(a, NamedSharding(mesh, spec))
                for a, spec in zip(arrays, specs, strict=True)
            ]
            assert_equal(name, jax.jit(both)(*split), wanted, rtol)
            if slopes and explicit_axes_of(split[0]):  # JAX then forgets more easily
                closed_over = jax.jit(functools.partial(row.call, *split))()
                assert_equal(f"{name}, closed over", closed_over, wanted[0], rtol)
            if row.by_hand:
                ours, hand = (
                    collectives(jax.jit(function).lower(*split).compile())
                    for function in (row.call, row.by_hand)
                )
                assert len(ours) <= len(hand), (name, ours, hand)


@CHECKS.always
def means_on_an_automatic_mesh_equal_one_device():
    rows_hold(MEANS, mesh_of("data", kind=AxisType.Auto), slopes=True)


@CHECKS.always
def means_on_an_explicit_mesh_equal_one_device():
    rows_hold(MEANS, mesh_of("data", kind=AxisType.Explicit), slopes=True)


@CHECKS.once
def levels_on_any_mesh_equal_one_device():
    for kind in (AxisType.Auto, AxisType.Explicit):
        rows_hold(OF_LEVELS, mesh_of("data", kind=kind))


@CHECKS.once
def relax_loss_of_split_classes_equals_one_device():
    """A mask of examples has no axis of classes, which the logits' own cannot lend."""
    call = lambda z, k, m: objective.relax_loss(z, k, 9.0, epoch=1, where=m)
    rows = {"relax_loss": Row(call, "classes ids mask")}
    for kind in (AxisType.Auto, AxisType.Explicit):
        rows_hold(rows, mesh_of("data", "model", kind=kind), slopes=True)


@CHECKS.once
def curvature_on_an_automatic_model_axis_equals_one_device():
    mesh = mesh_of("data", "model", kind=AxisType.Auto)
    rows_hold(CURVATURE, mesh, rtol=1e-4)


@CHECKS.once
def curvature_on_an_explicit_model_axis_equals_one_device():
    mesh = mesh_of("data", "model", kind=AxisType.Explicit)
    rows_hold(CURVATURE, mesh, rtol=1e-4)


# ---- shard_map ----

OVER_AXIS = {
    "batch": lambda axis, x, k, z, t, m: flood_mean(x, 0.9, axis_name=axis),
    "example": lambda axis, x, k, z, t, m: flood_mean(
        x, 0.9, over="example", axis_name=axis
    ),
    "segment": lambda axis, x, k, z, t, m: over_segments(x, k, axis_name=axis),
    "sequence": lambda axis, x, k, z, t, m: flood_mean(
        t, 0.9, over="sequence", where=m, axis_name=axis
    ),
    **{
        f"relax_loss, epoch {epoch}, {level}": (
            lambda axis, x, k, z, t, m, epoch=epoch, level=level: objective.relax_loss(
                z, k, level, epoch=epoch, where=x > 0.4, axis_name=axis
            )
        )
        for epoch in (0, 1)
        for level in (0.3, 9.0)
    },
}


@CHECKS.always
def shard_map_equals_one_device_both_ways():
    mesh = mesh_of("data")
    names = ("losses", "ids", "logits", "tokens", "real")
    arrays, specs = arrays_of(Row(None, " ".join(names)))
    factor = jnp.float32(0.8)
    for name, call in OVER_AXIS.items():

        def scaled(factor, *arrays, axis=None, call=call):
            x, k, z, t, m = arrays
            return call(axis, factor * x, k, factor * z, factor * t, m)

        def local(factor, *arrays, scaled=scaled):
            step = jax.value_and_grad(scaled)(varying(factor), *arrays, axis="data")
            return lax.pmean(step, "data")

        wanted = jax.value_and_grad(scaled)(factor, *arrays)
        for check_vma in (True, False):
            step = mapped(local, mesh, (P(), *specs), check_vma=check_vma)
            try:
                assert_close(step(factor, *arrays), wanted)
            except AssertionError as error:
                raise AssertionError(f"{name}, check_vma={check_vma}") from error


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
    mesh, (arrays, specs) = mesh_of("data"), arrays_of(Row(None, "losses ids"))

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
                local, mesh=mesh, in_specs=tuple(specs), out_specs=out
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
    mesh, (arrays, _) = mesh_of("data"), arrays_of(Row(None, "losses"))
    losses = jax.device_put(arrays[0], NamedSharding(mesh, P("data")))
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
    np.testing.assert_allclose(value, flood(arrays[0].mean(), 0.9), rtol=1e-6)


@CHECKS.parametrize()
def test_meshes(name, devices):
    CHECKS.assert_held(name, __file__, devices)


if __name__ == "__main__":
    CHECKS.report()
