"""Parts of unequal size: the table of docs/traps.md, row by row.

Three parts of 1, 7 and 16 tokens with mean losses 2, .5 and .2 and gradients 1, .8 and
.6. The oracle is the mean over the 24 tokens, by hand in NumPy. The rows with devices
run in a process with three of them: this file is also the script that it runs.
"""

import warnings

import jax
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from flood_optax import flood, flood_mean, scale_by_flood
from tests import processes

SIZES = np.array([1, 7, 16])
LOSSES, SLOPES, LEVEL = np.array([2.0, 0.5, 0.2]), np.array([1.0, 0.8, 0.6]), 0.5
MEAN, SLOPE = (float(np.dot(SIZES, part) / 24) for part in (LOSSES, SLOPES))
RIGHT = SLOPE  # uphill: the mean is below the level
# the tokens of each part, padded: every token of a part has its loss and its slope
MASK = np.arange(16) < SIZES[:, None]


def test_the_oracle_is_that_of_the_page():
    np.testing.assert_allclose([MEAN, SLOPE], [0.3625, 0.675])
    assert MEAN < LEVEL < LOSSES.mean()


WINDOWS = {  # every_k, what else each part hands over; the loss that is met, the step
    "means alone": (3, {}, (0.9, -0.8)),
    "weighed": (3, {"weight": SIZES}, (MEAN, RIGHT)),
    "short": (4, {"weight": SIZES}, (0.0, 0.0)),
    "short and flushed": (4, {"weight": SIZES, "flush": [0, 0, 1]}, (MEAN, RIGHT)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_window_of_parts_of_unequal_size(name):
    every_k, more, expected = WINDOWS[name]
    optimizer = flood(optax.sgd(1.0), LEVEL, every_k=every_k)
    update, w, moved = jax.jit(optimizer.update), np.float32(1.0), 0.0
    state = optimizer.init(w)
    for i in range(3):
        extra = {"value": np.float32(LOSSES[i])}
        extra |= {key: np.float32(each[i]) for key, each in more.items()}
        extra |= {"flush": bool(extra["flush"])} if "flush" in extra else {}
        step, state = update(np.float32(SLOPES[i]), state, w, **extra)
        moved += float(step)
    met = float(optax.tree.get(state, "flood_value"))
    np.testing.assert_allclose((met, moved), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("where", "slope", "flooded"),
    [(None, 0.3375, 2 * LEVEL - 0.18125), (MASK, RIGHT, 2 * LEVEL - MEAN)],
    ids=["padded", "masked"],
)
def test_padding_counts_unless_it_is_masked(where, slope, flooded):
    tokens, slopes = (np.float32(each[:, None] * MASK) for each in (LOSSES, SLOPES))

    @jax.jit
    @jax.value_and_grad
    def objective(w):
        return flood_mean(tokens + (w - 1.0) * slopes, LEVEL, where=where)

    value, grad = objective(1.0)
    np.testing.assert_allclose((value, -grad), (flooded, slope), rtol=1e-6)


# ---- devices: one part on each ----


def devices_step(optimizer, weigh_gradients, weigh_loss, mapped):
    """One step over three devices: the loss that it met, and the update."""

    def step(w, state, loss, slope, size):
        count = size.sum()
        value, grad = loss.sum(), slope.sum()  # of this device's part
        if weigh_gradients:
            grad = lax.psum(count * grad, "data") / lax.psum(count, "data")
        else:
            grad = lax.pmean(grad, "data")
        extra = {"weight": count} if weigh_loss else {}
        return optimizer.update(grad, state, w, value=value, **extra)

    w = np.float32(1.0)
    given = w, optimizer.init(w), *map(np.float32, (LOSSES, SLOPES, SIZES))
    axes = (None, None, 0, 0, 0)
    if mapped == "pmap":
        update, state = jax.pmap(step, axis_name="data", in_axes=axes)(*given)
        assert len(set(np.asarray(update).tolist())) == 1, "the replicas go apart"
        update, state = jax.tree.map(lambda x: x[0], (update, state))
    else:
        mesh = jax.sharding.Mesh(jax.devices(), ("data",))
        specs = tuple(P() if axis is None else P("data") for axis in axes)
        sharded = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), P()))
        update, state = jax.jit(sharded)(*given)
    return float(optax.tree.get(state, "flood_value")), float(update)


FORMS = {
    "scale_by_flood": optax.chain(
        scale_by_flood(LEVEL, axis_name="data"), optax.sgd(1.0)
    ),
    "flood": flood(optax.sgd(1.0), LEVEL, axis_name="data"),
}
ROWS = {  # gradients weighed, loss weighed: the loss that meets the level and the step
    "nothing weighed": (False, False, (0.9, -0.8)),
    "gradients weighed": (True, False, (0.9, -RIGHT)),
    "both weighed": (True, True, (MEAN, RIGHT)),
}
CASES = [
    (mapped, form, row)
    for mapped in ("shard_map", "pmap")
    for form in FORMS
    for row in ROWS
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_devices_with_parts_of_unequal_size(case):
    processes.assert_held(", ".join(case), __file__, devices=3)


def check(mapped, form, row):
    *weighed, expected = ROWS[row]
    got = devices_step(FORMS[form], *weighed, mapped)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", ".*pmap.*", DeprecationWarning)
    processes.report(
        {", ".join(case): lambda case=case: check(*case) for case in CASES}
    )
