"""flood_mean with weights, against NumPy in float64 and the batch written out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from flood_optax import flood_mean, shapes
from tests import oracles

OVER = ["batch", "example", "segment", "sequence"]
every_over = pytest.mark.parametrize("over", OVER)
NUM_SEGMENTS = 4  # of which the last holds no loss


def problem(size, seed=0, *, shape=None):
    """Losses, weights that are zero here and there, segments and a mask."""
    rng = np.random.default_rng(seed)
    shape = shape or (size,)
    losses = rng.uniform(0.05, 1.5, shape).astype(np.float32)
    weights = np.where(rng.uniform(size=shape) < 0.3, 0, rng.gamma(1.0, 3.0, shape))
    weights.flat[0], ids = 1.5, rng.integers(0, NUM_SEGMENTS - 1, shape)
    where = rng.uniform(size=shape) < 0.8
    where.flat[0] = True
    return losses, weights.astype(np.float32), ids, where


def level_of(over, shape):
    if over == "example":
        return np.linspace(0.2, 0.9, int(np.prod(shape)), dtype=np.float32).reshape(
            shape
        )
    return np.float32([0.9, 0.3, 0.6, 5.0]) if over == "segment" else np.float32(0.7)


def oracle(losses, level, over, weights, ids, **shape):
    """Value and slopes in NumPy, by the name of the partition."""
    groups = {"batch": None, "example": np.arange(losses.size), "segment": ids}
    groups["sequence"] = np.zeros(len(losses), int)  # one of all losses
    return oracles.mean(losses, level, groups=groups[over], weights=weights, **shape)


def segments_of(over, ids):
    given = {"segment_ids": jnp.asarray(ids), "num_segments": NUM_SEGMENTS}
    return given if over == "segment" else {}


@functools.partial(jax.jit, static_argnames=("over", "shape"))
def ours(losses, level, over, weights, ids, *, where=None, shape=shapes.reflect()):
    given = {"over": over, "weights": weights, "where": where, "shape": shape}
    return jax.value_and_grad(flood_mean)(
        losses, level, **given, **segments_of(over, ids)
    )


@every_over
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    size=st.sampled_from([1, 2, 5, 12]),
    seed=st.integers(0, 10**6),
    poison=st.booleans(),
)
def test_weighted_mean_equals_numpy_in_float64(over, size, seed, poison):
    losses, weights, ids, where = problem(size, seed)
    level, counts = level_of(over, (size,)), np.where(where, weights, 0)
    value, gradient = oracle(losses, level, over, counts, ids)
    if poison:
        losses = np.where(counts == 0, np.nan, losses)
        weights = np.where(where, weights, np.nan)
    got = ours(losses, level, over, weights, ids, where=where)
    np.testing.assert_allclose(got[0], value, rtol=3e-6)
    np.testing.assert_allclose(got[1], gradient, rtol=3e-6)


def test_the_oracle_counts_a_whole_weight_as_the_loss_written_so_often():
    losses, _, ids, _ = problem(6, 3)
    repeats = np.array([3, 1, 0, 2, 5, 1])
    for groups, level in ((None, 0.7), (ids, level_of("segment", (6,)))):
        spread = None if groups is None else np.repeat(groups, repeats)
        wanted, _ = oracles.mean(np.repeat(losses, repeats), level, groups=spread)
        found, _ = oracles.mean(losses, level, groups=groups, weights=repeats)
        np.testing.assert_allclose(found, wanted)


@every_over
def test_weights_of_any_unit_weigh_as_none(over):
    losses, _, ids, _ = problem(12)
    level = level_of(over, (12,))
    exact, slopes = oracle(losses, level, over, None, ids)
    for unit in (None, 1, 1e-6, 1e6):
        weights = None if unit is None else np.full(12, unit, np.float32)
        value, gradient = ours(losses, level, over, weights, ids)
        np.testing.assert_allclose(value, exact, rtol=1e-6)
        np.testing.assert_allclose(gradient, slopes, rtol=3e-6)


@every_over
def test_weighted_soft_mean_has_the_soft_slope(over):
    losses, weights, ids, _ = problem(12, 4)
    level = level_of(over, (12,))
    found = ours(losses, level, over, weights, ids, shape=shapes.soft(0.7))
    wanted = oracle(losses, level, over, weights, ids, shape=oracles.SHAPES["soft"])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=3e-6, atol=1e-7)


@every_over
def test_weight_zero_is_a_mask_that_is_false(over):
    losses, _, ids, where = problem(9, 5)
    level = level_of(over, (9,))
    poisoned = np.where(where, losses, np.nan)
    far = np.where(where, ids, 99)  # nor is its segment looked at
    by_weight = ours(poisoned, level, over, where.astype(np.float32), far)
    by_mask = ours(poisoned, level, over, None, far, where=where)
    for one, other in zip(by_weight, by_mask, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.isfinite(by_weight[0])


@every_over
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_losses_and_weights_are_weighed_in_float32(over, dtype):
    losses, weights, ids, _ = problem(3000, 11)
    losses, weights = jnp.asarray(losses, dtype), jnp.asarray(weights, dtype)
    level = level_of(over, (3000,))
    value, gradient = ours(losses, level, over, weights, ids)
    assert value.dtype == gradient.dtype == dtype
    expected, slope = oracle(
        np.asarray(losses, float), level, over, np.asarray(weights, float), ids
    )
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(float(value), expected, rtol=eps)
    rounded = np.asarray(jnp.asarray(slope, dtype), float)
    np.testing.assert_allclose(
        np.asarray(gradient, float), rounded, rtol=2 * eps, atol=1e-7
    )


@every_over
@pytest.mark.parametrize("bad", ["zeros", "nan", "nan beside others", "masked"])
def test_weights_without_a_mean_give_nan_at_run_time(over, bad):
    losses, weights, ids, where = problem(5, 2)
    weights = {
        "zeros": np.zeros(5, np.float32),
        "nan": np.where(ids == ids[0], np.float32(np.nan), 0),
        "nan beside others": np.where(np.arange(5) == 3, np.float32(np.nan), 1),
        "masked": weights,
    }[bad]
    where = np.full(5, bad != "masked")
    value, _ = ours(losses, level_of(over, (5,)), over, weights, ids, where=where)
    assert np.isnan(value)


def test_segment_id_out_of_range_is_nan_where_it_is_traced_and_not_dropped():
    for last, wanted in ((5, np.nan), (1, 1.0)):
        ids = jnp.array([0, last])
        value, _ = ours(jnp.ones(2), np.float32(0.5), "segment", None, ids)
        np.testing.assert_equal(float(value), wanted)


@every_over
def test_no_gradient_flows_into_weights(over):
    losses, weights, ids, _ = problem(5, 2)
    by_weights = jax.grad(lambda w: ours(losses, level_of(over, (5,)), over, w, ids)[0])
    np.testing.assert_array_equal(by_weights(weights), 0)


@pytest.mark.parametrize("weigh", ["tokens", "alike", "weights", None])
def test_sequences_equal_segments_by_hand(weigh):
    """[B, T] and [A, B, T] losses, one sequence empty, NaN where nothing counts."""
    for shape in ((4, 5), (2, 2, 5)):
        losses, weights, _, where = problem(0, 7, shape=shape)
        level = np.float32([0.9, 0.4, 0.7, 0.2]).reshape(shape[:-1])
        where.reshape(4, 5)[2] = False
        counts, given = np.ones(shape), {}
        if weigh is not None:
            losses = np.where(where, losses, np.nan)
            alike = where / np.maximum(where.sum(-1, keepdims=True), 1)
            counts, given = {
                "tokens": (where, {"where": where}),
                "alike": (alike, {"weights": alike.astype(np.float32)}),
                "weights": (weights * where, {"where": where, "weights": weights}),
            }[weigh]

        @jax.jit
        def by_sequence(losses, level, given=given):
            return flood_mean(losses, level, over="sequence", **given)

        rows = np.repeat(np.arange(4), 5)
        exact = oracles.mean(
            losses.ravel(), level.ravel(), groups=rows, weights=counts.ravel()
        )
        value, gradient = jax.jit(jax.value_and_grad(by_sequence))(losses, level)
        np.testing.assert_allclose(value, exact[0], rtol=1e-6)
        np.testing.assert_allclose(gradient.ravel(), exact[1], rtol=1e-6)
        # above its level it is the plain weighted mean
        plain = np.average(losses[counts > 0], weights=counts[counts > 0])
        np.testing.assert_allclose(by_sequence(losses, -1.0), plain, rtol=1e-6)


def flops(size, over, **options):
    """What value and gradient cost; segment sums are scatters, which count nothing."""
    losses, weights, ids, _ = problem(size)
    given = dict(segments_of(over, ids), over=over, **options)
    if given.pop("weighed", False):
        given["weights"] = jnp.asarray(weights)
    level = jnp.asarray(level_of(over, (size,)))
    function = jax.value_and_grad(lambda losses: flood_mean(losses, level, **given))
    return jax.jit(function).lower(losses).compile().cost_analysis()["flops"]


def test_weights_that_are_not_given_cost_nothing():
    """Per loss one addition: the count is no sum, the factor 1 no multiplication."""

    def per_loss(**options):
        return (flops(8000, "batch", **options) - flops(4000, "batch", **options)) / 4e3

    assert abs(per_loss() - 1) < 0.01
    assert per_loss(weighed=True) > 2


@every_over
def test_program_without_weights_names_none(over):
    losses, _, ids, _ = problem(8)
    with_and_without = (
        jax.make_jaxpr(functools.partial(ours.__wrapped__, over=over))(
            losses, level_of(over, (8,)), weights=weights, ids=ids
        )
        for weights in (jnp.ones(8), None)
    )
    more, less = (len(re.findall(r"\bmul\b", str(p))) for p in with_and_without)
    # one product less than with weights; "segment" has one of its own
    assert less < more


# ---- millions of losses ----

ORDERS = {
    "equal": lambda n, rng: np.full(n, 0.97),
    "rising": lambda n, rng: np.sort(rng.exponential(size=n)),
    "two values": lambda n, rng: np.where(np.arange(n) < n // 2, 1e-3, 1.94),
}
IDS = {
    "one": lambda n, number, rng: np.full(n, number // 2),
    "by turns": lambda n, number, rng: np.arange(n) % number,
    "skewed": lambda n, number, rng: np.minimum(rng.geometric(0.4, n), number) - 1,
}


@jax.jit
def every_mean(losses, ids, weights, level):
    """By partition; in `level` one number for each segment."""
    segments = {"segment_ids": ids, "num_segments": len(level)}
    rows = losses.reshape(2, -1), None if weights is None else weights.reshape(2, -1)

    def of_rows(losses, weights, ids):
        given = dict(segments, weights=weights, segment_ids=ids)
        return flood_mean(losses, -1.0, over="segment", **given)

    return {
        "batch": flood_mean(losses, -1.0, weights=weights),
        "example": flood_mean(losses, -1.0, over="example", weights=weights),
        "sequence": flood_mean(rows[0], -1.0, over="sequence", weights=rows[1]),
        "segment": flood_mean(
            losses, level, over="segment", weights=weights, **segments
        ),
        "vmap": jax.vmap(of_rows)(*rows, ids.reshape(2, -1)),
    }


def means_of_many(size, order, number, ids, weigh):
    """Each partition's mean: ours in float32, and NumPy's in float64."""
    rng = np.random.default_rng(7)
    losses = ORDERS[order](size, rng).astype(np.float32)
    ids = IDS[ids](size, number, rng).astype(np.int32)
    weights = rng.integers(1, 4, size).astype(np.float32) if weigh else None
    counts = np.ones(size) if weights is None else weights.astype(float)
    sums = np.bincount(ids, counts * losses, number)
    sizes = np.bincount(ids, counts, number)
    means = sums / np.maximum(sizes, 1)
    total = sums.sum() / sizes.sum()

    # every other segment is a thousandth of a per cent above its level, or below
    level = means * np.where(np.arange(number) % 2, 1 - 1e-5, 1 + 1e-5)
    got = every_mean(losses, ids, weights, level.astype(np.float32))
    halves = np.split(counts * losses, 2), np.split(counts, 2)
    wanted = dict.fromkeys(("batch", "example", "sequence"), total)
    wanted["segment"] = (sizes / sizes.sum()) @ np.maximum(means, 2 * level - means)
    wanted["vmap"] = np.array([x.sum() / w.sum() for x, w in zip(*halves, strict=True)])
    return got, wanted


@pytest.mark.slow
@pytest.mark.parametrize("weigh", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ids", IDS)
def test_means_of_many_losses_in_float32_are_right(ids, order, weigh):
    got, wanted = means_of_many(200_000, order, 5, ids, weigh)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=5e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 1000, 100_000])
def test_means_of_ten_million_losses_in_float32_are_right(number):
    for ids, order in (("one", "equal"), ("by turns", "two values"), ("one", "rising")):
        got, wanted = means_of_many(10_000_000, order, number, ids, number == 1000)
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_a_million_losses_above_the_level_of_their_segment_descend():
    """Added one by one their mean would be .983, or .969 of 100,000."""
    losses, ids = jnp.full(1_000_000, 0.97), jnp.zeros(1_000_000, jnp.int32)
    of = lambda x, level: flood_mean(
        x, level, over="segment", segment_ids=ids, num_segments=2
    )
    slope_of = jax.jit(jax.grad(of))
    for level, sign in ((0.96999, 1), (0.97001, -1)):
        slope = slope_of(losses, level)
        np.testing.assert_allclose(slope, sign * 1e-6, rtol=1e-6)


def segments_by_hand(losses, level, ids, number):
    sizes = jax.ops.segment_sum(jnp.ones_like(losses), ids, number)
    means = jax.ops.segment_sum(losses, ids, number) / jnp.maximum(sizes, 1)
    return (sizes / losses.size * (jnp.abs(means - level) + level)).sum()


@pytest.mark.parametrize(
    ("number", "most"), [(10, 1.32), (1000, 1.34), (100_000, 1.48)]
)
def test_exact_segments_take_one_more_index_per_loss(number, most):
    """8 bytes a loss beside 28 by hand: the place is written, and read."""
    losses, ids = jnp.ones(65_536), jnp.zeros(65_536, jnp.int32)
    taken = []
    for function in (
        functools.partial(segments_by_hand, number=number),
        lambda losses, level, ids: flood_mean(
            losses, level, over="segment", segment_ids=ids, num_segments=number
        ),
    ):
        step = jax.jit(jax.value_and_grad(function)).lower(losses, 0.5, ids)
        taken.append(step.compile().cost_analysis()["bytes accessed"])
    if jax.__version_info__ < (0, 10):  # whose XLA fuses less
        most += 0.25
    assert taken[1] < most * taken[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("given", [np.uint8, np.int16, np.uint32, np.int64])
def test_segment_ids_of_any_integer_dtype_are_numbers_and_not_wrapped(given):
    losses = np.linspace(0.1, 2, 600, dtype=np.float32)
    ids = (np.arange(600) % 250).astype(given)
    flood = lambda ids: flood_mean(
        losses, 1.0, over="segment", segment_ids=ids, num_segments=300
    )
    expected = oracles.mean(losses, 1.0, groups=ids.astype(int))[0]
    np.testing.assert_allclose(jax.jit(flood)(ids), expected, rtol=1e-6)
    if given == np.int64:
        ids[3] += 2**32
        assert np.isnan(jax.jit(flood)(ids))
