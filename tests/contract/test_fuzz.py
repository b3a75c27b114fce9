"""Random losses, levels, trees and windows against numpy; nothing may surprise."""

import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings

from flood_optax import (
    flood,
    flood_loss,
    flood_mean,
    flooded,
    scale_by_flood,
)
from tests import forms, oracles


def bounded(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None)


FLOATS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
TINY = np.finfo(np.float32).tiny  # smallest normal number


def flushed(x):
    """XLA on CPU computes with subnormal numbers as if they were zero."""
    x = np.float32(x)
    return np.copysign(np.float32(0), x) if abs(x) < TINY else x


def oracle(loss, level):
    """Multiplier and value of flooding, in numpy float32 that flushes subnormals."""
    work, bound = flushed(loss), flushed(level)
    with np.errstate(over="ignore"):
        if flushed(work - bound) == 0:  # what differs by less is a tie
            work = bound
        value, multiplier = oracles.bend(work, bound)
        return multiplier, loss if multiplier != -1 else value.astype(loss.dtype)


def same(got, wanted):
    """Equal dtype, shape and values; zeros compare without their sign."""
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    np.testing.assert_array_equal(got, wanted)


@functools.cache
def both_forms(jit):
    def run(loss, level):
        transform = scale_by_flood(level)
        one = jnp.ones((), loss.dtype)
        scaled, state = transform.update(one, transform.init(one), value=loss)
        value, slope = jax.value_and_grad(flooded(lambda x: x, level))(loss)
        inner = flood(optax.identity(), level)
        wrapped, _ = inner.update(one, inner.init(one), value=loss)
        return scaled, slope, wrapped, value, flood_loss(loss, level), state.flood_value

    return jax.jit(run) if jit else run


levels = st.floats(width=32, allow_nan=False).filter(lambda b: b != np.inf)


@pytest.mark.parametrize("dtype", FLOATS)
@bounded(150)
@given(bits=st.integers(0, 2**32 - 1), level=levels, near=st.booleans())
@example(bits=1, level=0.0, near=False)  # the smallest subnormal number
@example(bits=0x00800000, level=0.0, near=True)
@example(bits=0x7F7FFFFF, level=float(np.finfo(np.float32).min), near=False)
def test_any_loss_at_any_level_equals_numpy_in_both_forms(dtype, bits, level, near):
    # every bit pattern: NaN, infinite, subnormal and ordinary losses
    kind = np.dtype(FLOATS[dtype])
    word = np.uint32(bits) >> np.uint32(32 - 8 * kind.itemsize)
    if bits < 2**16:
        word = bits  # and many that are next to nothing
    loss = np.asarray(word, f"u{kind.itemsize}").view(kind)
    if near and np.isfinite(loss):
        level = np.nextafter(np.float32(loss), np.float32(level))
        level = min(level, np.finfo(np.float32).max)
    level = np.float32(level)
    got = both_forms(True)(loss, level)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        multiplier, value = oracle(loss, level)
        seen = np.float32(loss)
    for factor in got[:3]:
        same(factor, np.asarray(multiplier, kind))
    for flooded_value in got[3:5]:
        same(flooded_value, value)
    same(got[5], seen)


@bounded(25)
@given(
    loss=st.floats(width=16, allow_subnormal=False),
    level=st.floats(width=16, allow_nan=False, allow_subnormal=False).filter(
        lambda b: b != np.inf
    ),
    dtype=st.sampled_from(sorted(FLOATS)),
)
def test_eager_and_compiled_calls_agree_bit_for_bit(loss, level, dtype):
    loss, level = np.asarray(loss, FLOATS[dtype]), np.float32(level)
    eager, compiled = both_forms(False)(loss, level), both_forms(True)(loss, level)
    jax.tree.map(same, eager, compiled)


# ---- trees ----


@st.composite
def leaf(draw):
    dtype = FLOATS[draw(st.sampled_from(sorted(FLOATS)))]
    shape = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    size = int(np.prod(shape))
    entry = st.integers(-40, 40).map(lambda n: n / 8)
    numbers = draw(st.lists(entry, min_size=size, max_size=size))
    return np.asarray(numbers, np.float32).reshape(shape).astype(dtype)


trees = st.recursive(
    leaf(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, st.none()),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_leaves=5,
)


@pytest.mark.slow
@bounded(30)
@given(
    tree=trees,
    value=st.one_of(
        st.integers(-16, 16).map(lambda n: n / 8),
        st.sampled_from([np.nan, np.inf, -np.inf, 1e-40]),
    ),
    value_dtype=st.sampled_from(sorted(FLOATS)),
    level=st.one_of(st.integers(-8, 8).map(lambda n: n / 8), st.just(-np.inf)),
    shape=st.sampled_from(["reflect", "pause", "asymmetric"]),
)
def test_any_tree_keeps_structure_and_dtypes_and_equals_the_loss_form(
    tree, value, value_dtype, level, shape
):
    shape = forms.SHAPES[shape]
    tree = jax.tree.map(jnp.asarray, tree)
    offset = jnp.asarray(value, FLOATS[value_dtype])

    def loss_fn(params):  # its gradient is the tree, its value the offset
        products = jax.tree.map(lambda g, p: jnp.sum(g * p), tree, params)
        total = sum(x.astype(jnp.float32) for x in jax.tree.leaves(products))
        return (total + offset).astype(offset.dtype)

    at = jax.tree.map(jnp.zeros_like, tree)
    grads = jax.grad(loss_fn)(at) if jax.tree.leaves(at) else at
    transform = scale_by_flood(level, shape=shape)
    by_optax, _ = transform.update(grads, transform.init(at), at, value=offset)
    chex.assert_trees_all_equal_shapes_and_dtypes(by_optax, tree)
    for every_k in (1, 2):
        optimizer = flood(optax.identity(), level, every_k=every_k, shape=shape)
        state = optimizer.init(at)
        for _ in range(every_k):
            by_wrapper, state = optimizer.update(grads, state, at, value=offset)
        chex.assert_trees_all_equal_shapes_and_dtypes(by_wrapper, tree)
        jax.tree.map(same, by_wrapper, by_optax)
    if jax.tree.leaves(at):
        by_loss = jax.grad(flooded(loss_fn, level, shape=shape))(at)
        jax.tree.map(same, by_loss, by_optax)


# ---- partitions ----

COUNT, GROUPS = 6, 3


@functools.cache
def partitioned(over):
    def run(losses, level, where, ids):
        groups = {"segment_ids": ids, "num_segments": GROUPS}
        given = groups if over == "segment" else {}
        return flood_mean(losses, level, over=over, where=where, **given)

    return jax.jit(jax.value_and_grad(run))


sixteenths = st.integers(-64, 64).map(lambda n: n / 16)


@pytest.mark.parametrize("over", ["batch", "example", "segment"])
@bounded(60)
@given(
    losses=st.lists(
        st.one_of(sixteenths, st.just(np.nan)), min_size=COUNT, max_size=COUNT
    ),
    level=st.integers(-65, 65).map(lambda n: n / 16 + 1 / 1024),  # never a tie
    where=st.lists(st.booleans(), min_size=COUNT, max_size=COUNT),
    ids=st.lists(st.integers(0, GROUPS - 1), min_size=COUNT, max_size=COUNT),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_any_masked_mean_equals_numpy(*, over, losses, level, where, ids, dtype):
    losses = np.asarray(losses, FLOATS[dtype])
    where, ids = np.asarray(where), np.asarray(ids)
    level = np.float32(level)
    value, grad = jax.device_get(partitioned(over)(losses, level, where, ids))
    exact = losses.astype(np.float64)
    groups = {"batch": None, "example": np.arange(COUNT), "segment": ids}[over]
    wanted, slopes = oracles.mean(exact, float(level), groups=groups, weights=where)
    eps = float(jnp.finfo(FLOATS[dtype]).eps)
    assert (value.dtype, grad.dtype) == (losses.dtype, losses.dtype)
    np.testing.assert_allclose(np.float64(value), wanted, rtol=2 * eps, atol=4 * eps)
    if where.any():
        np.testing.assert_allclose(grad.astype(np.float64), slopes, rtol=2 * eps)


# ---- windows ----

THRESHOLD = 0.5 + 1 / 128  # no mean of eighths is a tie


@functools.cache
def accumulated(every_k, skips):
    skip = optax.skip_not_finite if skips else None
    optimizer = flood(
        optax.identity(), THRESHOLD, every_k=every_k, should_skip_update_fn=skip
    )

    def step(state, batch):
        grad, value = batch
        update, state = optimizer.update(grad, state, grad, value=value)
        return state, update

    @jax.jit
    def run(grads, values):
        state = optimizer.init(grads[0])
        state, updates = jax.lax.scan(step, state, (grads, values))
        return updates, optax.tree.get(state, "flood_step")

    return run


STEPS = 8
eighths = st.integers(-16, 16).map(lambda n: n / 8)
spoiled = st.one_of(eighths, eighths, eighths, st.sampled_from([np.nan, np.inf]))


@pytest.mark.parametrize("skips", [False, True], ids=["all", "skip_not_finite"])
@pytest.mark.parametrize("every_k", [1, 2, 4])
@bounded(30)
@given(
    grads=st.lists(st.tuples(spoiled, eighths), min_size=STEPS, max_size=STEPS),
    values=st.lists(spoiled, min_size=STEPS, max_size=STEPS),
)
def test_any_window_equals_numpy(every_k, skips, grads, values):
    grads, values = np.asarray(grads, np.float32), np.asarray(values, np.float32)
    updates, closed = jax.device_get(accumulated(every_k, skips)(grads, values))
    with np.errstate(invalid="ignore"):
        wanted, losses = oracles.windows(grads, values, every_k, THRESHOLD, skip=skips)
    # an infinite entry may turn into NaN in a running mean: not finite either way
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(updates), finite)
    np.testing.assert_allclose(updates[finite], wanted[finite], rtol=1e-6, atol=1e-6)
    assert closed == len(losses)


# ---- bands ----


@jax.jit
def banded(losses, level, band):
    makers = scale_by_flood, functools.partial(flood, optax.identity())
    return [forms.course(make(level, band=band), value=losses) for make in makers]


@bounded(150)
@given(
    losses=st.lists(
        st.one_of(
            st.integers(-48, 48).map(lambda n: n / 16),
            st.sampled_from([np.nan, np.inf, -np.inf]),
        ),
        min_size=12,
        max_size=12,
    ),
    level=st.one_of(st.integers(-16, 16).map(lambda n: n / 8), st.just(-np.inf)),
    band=st.integers(0, 16).map(lambda n: n / 16),
    scale=st.integers(-80, 80).map(lambda n: 2.0**n),
)
def test_no_step_ascends_from_the_upper_end_of_any_band(losses, level, band, scale):
    losses = np.float32(np.array(losses) * scale)
    level, band = np.float32(level * scale), np.float32(band * scale)
    ends, multipliers = oracles.strokes(losses, level, band)
    for found in jax.device_get(banded(losses, level, band)):
        np.testing.assert_array_equal(found["multiplier"], multipliers)
        np.testing.assert_array_equal(found["flood_level"], ends)
    up = multipliers < 0
    assert (losses[up] < level + band).all()
    # and down to the lower end it comes, whatever was before
    assert (up | np.isnan(losses))[losses < level - band].all()


# ---- bad input ----

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.integers(-(2**31), 2**31 - 1),
    st.floats(),
    st.complex_numbers(),
    st.lists(st.floats(width=32), max_size=3),
    st.tuples(st.floats(width=32), st.floats(width=32)),
    st.sampled_from([np.float16(0.5), np.int8(3), np.True_, np.float32(np.nan)]),
    st.builds(
        lambda shape, dtype: np.zeros(shape, dtype),
        st.sampled_from([(), (0,), (1,), (2, 3)]),
        st.sampled_from(["float32", "int32", "bool", "complex64", "float16"]),
    ),
)
GRADS = {"w": np.ones(3, np.float32)}


def updated(optimizer, loss):
    return optimizer.update(GRADS, optimizer.init(GRADS), value=loss)


CALLS = {
    "flood_loss": flood_loss,
    "flood_mean": flood_mean,
    "flood_mean_example": functools.partial(flood_mean, over="example"),
    "flooded": lambda loss, level: flooded(lambda: loss, level)(),
    "scale_by_flood": lambda loss, level: updated(scale_by_flood(level), loss),
    "flood": lambda loss, level: updated(
        flood(optax.identity(), level, every_k=2), loss
    ),
}


# jax before 0.10 warns of a number that float32 does not hold
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("call", CALLS)
@bounded(60)
@given(loss=junk, level=junk)
def test_junk_raises_what_is_documented_or_gives_the_right_kind(call, loss, level):
    try:
        result = CALLS[call](loss, level)
    except (TypeError, ValueError) as error:
        if str(error).startswith("`"):  # ours: names call and argument
            return
        raise
    if call.startswith("flood_") or call == "flooded":
        assert jnp.issubdtype(result.dtype, jnp.floating)
        assert result.shape == (np.shape(loss) if call == "flood_loss" else ())
    else:
        chex.assert_trees_all_equal_shapes_and_dtypes(result[0], GRADS)


# ---- what XLA on CPU does with subnormal numbers; see docs/traps.md ----


def test_losses_that_differ_by_a_subnormal_number_are_a_tie_on_cpu():
    level = np.nextafter(np.float32(1.5e-38), np.float32(1))
    loss = np.float32(1.5e-38)
    assert loss < level
    scaled, slope, *_ = both_forms(True)(loss, level)
    if jax.default_backend() == "cpu":
        assert scaled == slope == 1.0
    assert scaled == slope


def test_subnormal_updates_may_become_zero_but_float16_ones_do_not():
    tiny = {
        "float16": np.asarray([6e-8, -3e-6], np.float16),
        "float32": np.asarray([1e-40, -1e-39], np.float32),
    }
    transform = scale_by_flood(0.5)
    updates, _ = transform.update(tiny, transform.init(tiny), value=0.25)
    same(updates["float16"], -tiny["float16"])
    if jax.default_backend() == "cpu":
        same(updates["float32"], np.zeros(2, np.float32))
