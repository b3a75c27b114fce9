"""Parts of unequal size: the table of docs/traps.md, row by row.

Three parts of 1, 7 and 16 tokens with mean losses 2, .5 and .2 and gradients 1, .8 and
.6. The oracle is the mean over the 24 tokens, by hand in NumPy. The rows with devices
run in a process with three of them: this file is also the script that it runs.
"""

import warnings

import jax
import jax.numpy as jnp
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


def losses_at(w, part=slice(None)):
    """Losses [..., 16] of the tokens, which grow with w by a slope; 0 on padding."""
    tokens = jnp.asarray(LOSSES)[part] + (w - 1.0) * jnp.asarray(SLOPES)[part]
    return tokens[..., None] * jnp.asarray(MASK, jnp.float32)[part]


def mean_of(w, part):
    return losses_at(w, part).sum() / SIZES[part]


def window(every_k=3, *, weighted, flush=False):
    """The sum of the updates of one window, and the loss that it met the level with."""
    optimizer = flood(optax.sgd(1.0), LEVEL, every_k=every_k)
    w, moved = jnp.array(1.0), 0.0
    state = optimizer.init(w)
    for i, size in enumerate(SIZES):
        value, grad = jax.value_and_grad(mean_of)(w, i)
        extra = {"weight": float(size)} if weighted else {}
        extra |= {"flush": i == 2} if flush else {}
        update, state = optimizer.update(grad, state, w, value=value, **extra)
        moved += float(update)
    return moved, float(optax.tree.get(state, "flood_value"))


def test_window_without_weight_descends_where_the_large_batch_ascends():
    np.testing.assert_allclose(window(weighted=False), (-0.8, 0.9), rtol=1e-6)


def test_window_with_weight_is_the_large_batch():
    np.testing.assert_allclose(window(weighted=True), (RIGHT, MEAN), rtol=1e-6)


def test_short_window_waits_unless_it_is_flushed():
    assert window(4, weighted=True) == (0.0, 0.0)
    flushed = window(4, weighted=True, flush=True)
    np.testing.assert_allclose(flushed, (RIGHT, MEAN), rtol=1e-6)


@pytest.mark.parametrize(
    ("where", "slope", "flooded"),
    [(None, 0.3375, 2 * LEVEL - 0.18125), (MASK, RIGHT, 2 * LEVEL - MEAN)],
)
def test_padding_counts_unless_it_is_masked(where, slope, flooded):
    def objective(w):
        return flood_mean(losses_at(w), LEVEL, where=where)

    value, grad = jax.value_and_grad(objective)(1.0)
    np.testing.assert_allclose((value, -grad), (flooded, slope), rtol=1e-6)


def test_flooding_each_part_by_the_one_liner_is_another_step():
    def one_liner(w, i):
        return jnp.abs(mean_of(w, i) - LEVEL) + LEVEL

    steps = [-jax.grad(one_liner)(1.0, i) for i in range(3)]
    np.testing.assert_allclose(np.mean(steps), -0.4, rtol=1e-6)


# ---- devices: one part on each ----


def devices_step(optimizer, weigh_gradients, weigh_loss, mapped):
    """One step over three devices by shard_map or pmap: update, and the loss it met."""

    def sum_and_count(w, tokens, mask):
        losses = tokens[0] + (w - 1.0) * tokens[1]
        return jnp.where(mask, losses, 0.0).sum(), mask.sum()

    def step(w, state, tokens, mask):
        tokens, mask = tokens.reshape(2), mask.reshape(16)
        local = lax.pcast(w, "data", to="varying") if mapped == "shard_map" else w
        sums = jax.value_and_grad(sum_and_count, has_aux=True)
        (total, count), grad = sums(local, tokens, mask)
        if weigh_gradients:
            grad = lax.psum(grad, "data") / lax.psum(count, "data")
        else:
            grad = lax.pmean(grad / count, "data")
        extra = {"weight": count} if weigh_loss else {}
        return optimizer.update(grad, state, w, value=total / count, **extra)

    w = jnp.array(1.0)
    state = optimizer.init(w)
    tokens = jnp.asarray(np.stack([LOSSES, SLOPES], axis=1), jnp.float32)
    if mapped == "pmap":
        pmapped = jax.pmap(step, axis_name="data", in_axes=(None, None, 0, 0))
        update, state = pmapped(w, state, tokens, jnp.asarray(MASK))
        assert len(set(np.asarray(update).tolist())) == 1, "the replicas go apart"
        update, state = jax.tree.map(lambda x: x[0], (update, state))
    else:
        sharded = jax.shard_map(
            step,
            mesh=jax.sharding.Mesh(jax.devices(), ("data",)),
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=(P(), P()),
        )
        update, state = jax.jit(sharded)(w, state, tokens, jnp.asarray(MASK))
    return float(update), float(optax.tree.get(state, "flood_value"))


FORMS = {
    "scale_by_flood": optax.chain(
        scale_by_flood(LEVEL, axis_name="data"), optax.sgd(1.0)
    ),
    "flood": flood(optax.sgd(1.0), LEVEL, axis_name="data"),
}
ROWS = {  # gradients weighed, loss weighed: the step and the loss that meets the level
    "nothing weighed": (False, False, (-0.8, 0.9)),
    "gradients weighed": (True, False, (-RIGHT, 0.9)),
    "both weighed": (True, True, (RIGHT, MEAN)),
}
CASES = [
    (mapped, form, row)
    for mapped in ("shard_map", "pmap")
    for form in FORMS
    for row in ROWS
]


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
