"""The levels of arrays that are split over devices: those of the whole arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from flood_optax import levels
from tests.sharded import Checks, collectives, mesh_of, put

pytestmark = pytest.mark.slow  # test_sharding.py has devices every time
CHECKS = Checks()
N, C = 16, 4
RNG = np.random.default_rng(5)
PROBS = RNG.dirichlet(np.ones(C), N).astype(np.float32)
LABELS = RNG.integers(0, C, N).astype(np.int32)
LOSSES = RNG.gamma(2.0, 0.5, N).astype(np.float32)
MATRIX = RNG.dirichlet(np.ones(C), C).astype(np.float32) * 0.3 + 0.7 * np.eye(C, C)
MATRIX = MATRIX.astype(np.float32)
FREQUENCIES = MATRIX.T @ np.float32([0.4, 0.3, 0.2, 0.1])
GRADS = {"w": RNG.normal(size=(N, C)).astype("f4"), "b": np.ones(C, "f4")}
OTHER = {"w": GRADS["w"] + 1, "b": np.arange(C, dtype="f4")}
HELD = {"num_folds": 4, "key": jax.random.key(0), "stratify": LABELS % 2}


def left_out_by(rows):
    """Held-out sums, answered in parts that are split as the rows are."""
    placed = jax.typeof(rows).sharding

    def evaluate(total, indices):
        found = total + indices.astype(jnp.float32)
        if any(placed.spec):  # 4 held out on 4 devices
            found = jax.sharding.reshard(found, placed)
        return found

    total = rows.sum()
    return levels.held_out(lambda i, key: total, evaluate, N, **HELD)


# a function, its arrays, and the axes by which each of them may be split
PER_EXAMPLE = {
    "adaflood": (lambda a: levels.adaflood(a, 0.1), [LOSSES]),
    "entropy_floor": (levels.entropy_floor, [PROBS]),
    "wavebound": (lambda a: levels.wavebound(a, 0.1), [LOSSES]),
    "wavebound, own": (levels.wavebound, [LOSSES, LOSSES / 9]),
}
WHOLE = {
    "at_best": (lambda a, b: levels.at_best(a, b, mode="max", window=3), [LOSSES] * 2),
    "at_best, integers": (
        lambda a, b: levels.at_best(a, b, mode="max"),
        [LOSSES, LABELS],
    ),
    "gradient_accordance": (levels.gradient_accordance, [GRADS, OTHER]),
    "noise_floor": (
        lambda m, f: levels.noise_floor(m, label_frequencies=f),
        [MATRIX, FREQUENCIES],
    ),
    "noise_matrix": (levels.noise_matrix, [PROBS, LABELS]),
    "noise_matrix, labels of one host": (
        lambda p: levels.noise_matrix(p, LABELS),
        [PROBS],
    ),
    "noise_rate": (levels.noise_rate, [PROBS, LABELS]),
    "held_out": (left_out_by, [LOSSES]),
}
SPLITS = {"rows": ("data", None), "classes": (None, "model"), "both": ("data", "model")}


def placed(mesh, tree, split):
    """Leading axes are rows, second ones classes; what does not divide stays whole."""

    def put_one(array):
        axes = [
            name if name in mesh.shape and size % mesh.shape[name] == 0 else None
            for name, size in zip(split, array.shape, strict=False)
        ]
        return put(mesh, jnp.asarray(array), P(*axes))

    return jax.tree.map(put_one, tree)


@functools.cache
def whole():
    """Of all arrays on one device: one program."""
    every = PER_EXAMPLE | WHOLE
    return jax.jit(
        lambda given: {name: every[name][0](*given[name]) for name in every}
    )({name: jax.tree.map(jnp.asarray, arrays) for name, (_, arrays) in every.items()})


def levels_of_split_arrays(kind, split):
    mesh, every = mesh_of("data", "model", kind=kind), PER_EXAMPLE | WHOLE
    with jax.set_mesh(mesh):
        given = {n: placed(mesh, a, SPLITS[split]) for n, (_, a) in every.items()}

        def run(given):
            return {name: every[name][0](*given[name]) for name in every}

        # op by op, hundreds of programs: where all that can be split is
        by_op = [run(given)] if split == "both" else []
        for found in (jax.jit(run)(given), *by_op):
            for name, got in found.items():
                np.testing.assert_allclose(got, whole()[name], 1e-5, 1e-6, err_msg=name)


for split in SPLITS:
    CHECKS.each(
        CHECKS.rarely if split == "both" else CHECKS.once,
        levels_of_split_arrays,
        **{
            f"{split}, {kind.name}": [kind, split]
            for kind in (AxisType.Explicit, AxisType.Auto)
        },
    )


@CHECKS.once
def leave_one_out_of_split_features_is_that_of_the_whole():
    expected = levels.leave_one_out(GRADS["w"], LABELS, C)
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = mesh_of("data", "model", kind=kind)
        with jax.set_mesh(mesh):
            given = placed(mesh, [GRADS["w"], LABELS], SPLITS["both"])
            got = levels.leave_one_out(*given, C)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@CHECKS.once
def levels_of_examples_need_no_collective():
    mesh = mesh_of("data", kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        for function, arrays in PER_EXAMPLE.values():
            given = placed(mesh, arrays, SPLITS["rows"])
            assert not collectives(function, *given)


@CHECKS.once
def levels_inside_shard_map_are_those_of_the_whole():
    mesh = mesh_of("data")
    replicated = ("at_best", "gradient_accordance", "noise_floor", "noise_matrix")
    rows = {name: (*row, P("data")) for name, row in PER_EXAMPLE.items()}
    rows |= {name: (*WHOLE[name], P()) for name in (*replicated, "noise_rate")}
    for check_vma in (True, False):
        for name, (function, arrays, spec) in rows.items():
            step = jax.shard_map(
                function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
            )
            got = jax.jit(step)(*arrays)
            np.testing.assert_allclose(got, whole()[name], 1e-5, err_msg=name)


@CHECKS.parametrize()
def test_levels_of_split_arrays(name, devices):
    CHECKS.assert_held(name, __file__, devices)


if __name__ == "__main__":
    CHECKS.report()
