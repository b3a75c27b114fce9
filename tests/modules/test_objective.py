"""The loss form against numpy, at, above and below the level."""

import functools
import inspect
import typing

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flood_optax import (
    FloodInfo,
    flood,
    flood_loss,
    flood_mean,
    flooded,
    penalty,
    shapes,
    sharpness,
)
from tests import oracles

LOSSES = np.array([[0.05, 0.7, 0.31], [1.9, 0.02, 0.44]])


def numpy_flood(loss, level):
    return oracles.bend(loss, level)[0]


@pytest.mark.usefixtures("x64")
def test_flood_loss_equals_numpy_and_is_exact_above():
    losses = jnp.asarray(LOSSES)
    result = flood_loss(losses, 0.4)
    np.testing.assert_allclose(result, numpy_flood(LOSSES, 0.4), rtol=1e-15)
    above = LOSSES >= 0.4
    np.testing.assert_array_equal(np.asarray(result)[above], LOSSES[above])


def test_flood_loss_above_the_level_is_the_loss_bit_for_bit():
    # |l - b| + b rounds: of these 10,000 losses some would come back changed
    losses = jax.random.uniform(jax.random.key(0), (10_000,), minval=0.3, maxval=5.0)
    np.testing.assert_array_equal(flood_loss(losses, 0.3), losses)
    assert np.any(np.abs(losses - 0.3) + np.float32(0.3) != losses)


def test_flood_loss_level_broadcasts_to_the_loss():
    levels = np.array([0.1, 0.6, 0.4])
    result = flood_loss(jnp.asarray(LOSSES, jnp.float32), jnp.asarray(levels))
    np.testing.assert_allclose(result, numpy_flood(LOSSES, levels), rtol=1e-6)


def test_flood_loss_tie_descends_in_value_and_gradient():
    value, slope = jax.value_and_grad(lambda x: flood_loss(x, 0.25))(0.25)
    assert (value, slope) == (0.25, 1.0)


@pytest.mark.parametrize("shape", [shapes.reflect(), shapes.soft(), shapes.pause()])
@pytest.mark.parametrize("loss", [0.3, -4.0, np.inf, -np.inf, np.nan])
def test_flood_loss_level_minus_infinity_is_the_identity(shape, loss):
    off = functools.partial(flood_loss, level=-jnp.inf, shape=shape)
    value, slope = jax.value_and_grad(off)(jnp.float32(loss))
    np.testing.assert_array_equal(value, np.float32(loss))
    assert slope == 1.0


def test_flood_loss_nan_gives_nan_value_and_gradient():
    value, slope = jax.value_and_grad(lambda x: flood_loss(x, 0.25))(jnp.nan)
    assert np.isnan(value)
    assert np.isnan(slope)


def test_flood_loss_no_gradient_flows_into_the_level():
    slopes = jax.grad(flood_loss, argnums=1)(0.1, 0.5)
    assert slopes == 0.0


@pytest.mark.usefixtures("x64")
def test_flood_loss_second_derivative_below_is_minus_the_raw_one():
    def loss(x):
        return x**4 - 2 * x

    hessian = jax.grad(jax.grad(lambda x: flood_loss(loss(x), 5.0)))
    np.testing.assert_allclose(hessian(0.7), -12 * 0.7**2, rtol=1e-14)
    hessian = jax.grad(jax.grad(lambda x: flood_loss(loss(x), -5.0)))
    np.testing.assert_allclose(hessian(0.7), 12 * 0.7**2, rtol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_flood_loss_keeps_dtype_and_compares_in_float32(dtype):
    # 0.2 is not a bfloat16: the nearest, 0.2002, is above the level and must descend
    loss = jnp.asarray(0.2, dtype)
    level = np.float32(loss) * np.float32(1 - 1e-4)
    value, slope = jax.value_and_grad(lambda x: flood_loss(x, level))(loss)
    assert value.dtype == dtype
    assert (value, slope) == (loss, 1.0)


# ---- flood_mean ----


def test_flood_mean_batch_floods_the_mean():
    expected = numpy_flood(LOSSES.mean(), 0.6)
    result = flood_mean(jnp.asarray(LOSSES, jnp.float32), 0.6)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_flood_mean_example_takes_a_level_per_example():
    levels = LOSSES[::-1] * 0.9
    result = flood_mean(
        jnp.asarray(LOSSES, jnp.float32), jnp.asarray(levels), over="example"
    )
    np.testing.assert_allclose(result, numpy_flood(LOSSES, levels).mean(), rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_flood_mean_segment_equals_a_loop_over_segments(masked):
    ids = np.array([[0, 2, 2], [0, 4, 2]])  # segments 1 and 3 are empty
    levels = np.array([0.5, 9.0, 0.6, 9.0, 0.1])
    mask = np.array([[True, True, False], [True, True, True]])
    mask = mask if masked else np.ones_like(mask)
    result = flood_mean(
        jnp.asarray(LOSSES, jnp.float32),
        jnp.asarray(levels),
        over="segment",
        segment_ids=jnp.asarray(ids),
        num_segments=5,
        where=jnp.asarray(mask),
    )
    expected, _ = oracles.mean(LOSSES[mask], levels, groups=ids[mask])
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_flood_mean_segments_at_plus_one_give_the_plain_gradient():
    losses = jnp.asarray(LOSSES, jnp.float32)
    slope = jax.grad(
        lambda x: flood_mean(
            x,
            -1.0,
            over="segment",
            segment_ids=jnp.array([[0, 1, 1], [0, 0, 0]]),
            num_segments=2,
        )
    )(losses)
    np.testing.assert_allclose(slope, np.full((2, 3), 1 / 6), rtol=1e-6)


@pytest.mark.parametrize("over", ["batch", "example", "segment"])
def test_flood_mean_masked_entries_count_nowhere_even_nan(over):
    extra = {}
    if over == "segment":
        extra = {"segment_ids": jnp.array([0, 1, 1, 0]), "num_segments": 2}
    mask = jnp.array([True, True, False, True])
    losses = jnp.array([0.1, 0.9, jnp.nan, 0.4])

    def objective(x):
        return flood_mean(x, 0.5, over=over, where=mask, **extra)

    value, slope = jax.value_and_grad(objective)(losses)
    clean = jax.value_and_grad(objective)(losses.at[2].set(7.0))
    np.testing.assert_array_equal(value, clean[0])
    np.testing.assert_array_equal(slope, clean[1])
    assert slope[2] == 0.0
    assert np.isfinite(value)


@pytest.mark.parametrize("over", ["batch", "example", "segment"])
def test_flood_mean_all_masked_is_nan_at_run_time(over):
    extra = {}
    if over == "segment":
        extra = {"segment_ids": jnp.array([0, 1]), "num_segments": 2}
    nothing = jnp.zeros(2, bool)
    assert np.isnan(flood_mean(jnp.ones(2), 0.5, over=over, where=nothing, **extra))


def test_flood_mean_traced_segment_id_out_of_range_is_nan_not_dropped():
    @jax.jit
    def value(ids):
        return flood_mean(
            jnp.ones(2), 0.5, over="segment", segment_ids=ids, num_segments=2
        )

    assert np.isnan(value(jnp.array([0, 5])))
    assert value(jnp.array([0, 1])) == 1


def test_flood_mean_jensen_batch_below_example_with_published_numbers():
    # losses .01 .02 .2 .3, level .1: the batch descends, examples cancel
    losses = jnp.array([0.01, 0.02, 0.2, 0.3])
    batch = jax.grad(lambda x: flood_mean(x, 0.1))(losses)
    example = jax.grad(lambda x: flood_mean(x, 0.1, over="example"))(losses)
    np.testing.assert_allclose(batch, [0.25] * 4)
    np.testing.assert_allclose(example, [-0.25, -0.25, 0.25, 0.25])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_flood_mean_sixteen_bit_losses_are_averaged_in_float32(dtype):
    losses = jnp.full(5000, 0.25, dtype).at[0].set(1.0)
    result = flood_mean(losses, 0.0)
    assert result.dtype == dtype
    expected = np.asarray(losses, np.float64).mean()
    np.testing.assert_array_equal(result, np.asarray(expected, dtype))


# ---- flooded ----


def quartic(params, x, *, scale=1.0):
    return scale * jnp.mean((params["a"] * x**2 - params["b"]) ** 2)


PARAMS = {"a": jnp.float32(0.7), "b": jnp.float32(-0.2)}
X = jnp.array([0.3, -1.1, 0.8])


@pytest.mark.parametrize("level", [0.1, 5.0])
def test_flooded_value_and_gradient(level):
    raw, grad = jax.value_and_grad(quartic)(PARAMS, X, scale=2.0)
    value, bent = jax.value_and_grad(flooded(quartic, level))(PARAMS, X, scale=2.0)
    sign = 1 if raw >= level else -1
    np.testing.assert_allclose(value, numpy_flood(raw, level), rtol=1e-6)
    chex.assert_trees_all_equal(bent, jax.tree.map(lambda g: sign * g, grad))


def test_flooded_calls_loss_fn_once_and_keeps_its_name():
    calls = []

    def loss_fn(w):
        """Documented."""
        calls.append(w)
        return w**2

    wrapped = flooded(loss_fn, 0.5, return_info=True)
    jax.value_and_grad(wrapped, has_aux=True)(0.3)
    assert len(calls) == 1
    assert (wrapped.__name__, wrapped.__doc__) == ("loss_fn", "Documented.")


def test_flooded_has_aux_passes_aux_through():
    def loss_fn(w):
        return w**2, {"w": w}

    (value, aux), slope = jax.value_and_grad(
        flooded(loss_fn, 0.5, has_aux=True), has_aux=True
    )(0.5)
    assert (value, aux["w"], slope) == (0.75, 0.5, -1.0)


@pytest.mark.parametrize("has_aux", [False, True])
def test_flooded_return_info_is_the_raw_loss(has_aux):
    def loss_fn(w):
        return (w**2, "aux") if has_aux else w**2

    value, info = flooded(loss_fn, 0.5, has_aux=has_aux, return_info=True)(0.5)
    assert isinstance(info, FloodInfo)
    assert value == 0.75
    assert (info.loss, info.level, info.multiplier) == (0.25, 0.5, -1.0)
    assert info.aux == ("aux" if has_aux else None)


def test_flooded_jit_traces_once_over_changing_levels():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, level):
        return jax.grad(flooded(quartic, level))(params, X)

    for level in (0.1, 0.3, 5.0, -jnp.inf):
        step(PARAMS, jnp.float32(level))


def test_flooded_vmap_over_levels():
    slopes = jax.vmap(lambda b: jax.grad(flooded(lambda w: w**2, b))(0.5))
    np.testing.assert_array_equal(
        slopes(jnp.array([0.1, 0.25, 0.3, -jnp.inf])), [1.0, 1.0, -1.0, 1.0]
    )


def test_flooded_hessian_vector_product_by_forward_over_reverse():
    tangent = {"a": jnp.float32(1.0), "b": jnp.float32(-2.0)}

    def product(loss_fn):
        return jax.jvp(jax.grad(lambda p: loss_fn(p, X)), (PARAMS,), (tangent,))[1]

    below = product(flooded(quartic, 5.0))
    expected = jax.tree.map(lambda h: -h, product(quartic))
    chex.assert_trees_all_close(below, expected, rtol=1e-6)


# ---- what flooded returns ----


def square(w: jax.Array, scale: float = 1.0) -> jax.Array:
    return jnp.sum(scale * w**2)


FLOODED = flooded(square, 0.5)


@functools.wraps(FLOODED)
def wrapped(*args):
    return FLOODED(*args)


class Model:
    loss = FLOODED


HIDDEN = {
    "itself": FLOODED,
    "partial": functools.partial(functools.partial(FLOODED), scale=2.0),
    "wraps": wrapped,
    "method": Model().loss,
    "jit": jax.jit(FLOODED),
    "jit of partial": jax.jit(functools.partial(FLOODED, scale=2.0)),
    "checkpoint": jax.checkpoint(FLOODED),
    "tree_util.Partial": jax.tree_util.Partial(FLOODED),
    "filter_jit": eqx.filter_jit(FLOODED),
    "nnx.jit": nnx.jit(FLOODED),
}
W = jnp.array([0.5, 0.1])
TAKERS = {
    "flooded": lambda f: flooded(f, 0.2),
    "penalty.objective": lambda f: penalty.objective(f, 0.1),
    "penalty.value_and_grad": lambda f: penalty.value_and_grad(f, 0.1),
    "penalty.pair_displacement": lambda f: penalty.pair_displacement(f, W, 0.1),
    "penalty.level_set_drift": lambda f: penalty.level_set_drift(f, W),
    "sharpness.gradient_norm": lambda f: sharpness.gradient_norm(f, W),
    "sharpness.hessian_trace": lambda f: sharpness.hessian_trace(
        f, W, key=jax.random.key(0), num_samples=2
    ),
    "sharpness.top_eigenvalue": lambda f: sharpness.top_eigenvalue(
        f, W, key=jax.random.key(0), num_iterations=1
    ),
}


@pytest.mark.parametrize("call", TAKERS)
def test_a_flooded_function_is_refused_and_its_original_is_not(call):
    """-11.6 was the trace of a flooded bowl, and two floods are plain training."""
    for function in HIDDEN.values():
        with pytest.raises(ValueError, match=r"\(loss_fn\)` is flooded already, got"):
            TAKERS[call](function)
    for original in (square, vars(FLOODED)["__wrapped__"], jax.jit(square)):
        TAKERS[call](original)


def test_the_original_of_a_flooded_penalty_has_its_penalty():
    """`inspect.unwrap` finds the bare loss, which a remedy must not name."""
    penalised = penalty.objective(square, 0.5)
    with pytest.raises(ValueError, match=r"`.__wrapped__` of what `flooded` returned"):
        flooded(flooded(penalised, 0.5), 0.25)
    assert vars(flooded(penalised, 0.5))["__wrapped__"] is penalised


def test_a_flooded_value_fn_is_refused():
    optimizer = flood(optax.scale_by_backtracking_linesearch(5), 0.5)
    value, grad = jax.value_and_grad(square)(W)
    search = functools.partial(
        optimizer.update, grad, optimizer.init(W), W, value=value, grad=grad
    )
    with pytest.raises(ValueError, match=r"update\(value_fn=...\)` is flooded already"):
        search(value_fn=FLOODED)
    search(value_fn=square)


@pytest.mark.parametrize("has_aux", [False, True])
def test_annotations_say_what_is_returned_with_info(has_aux):
    def plain(w: jax.Array) -> jax.Array:
        return w**2

    def with_aux(w: jax.Array) -> tuple[jax.Array, str]:
        return w**2, "aux"

    loss_fn = with_aux if has_aux else plain
    kept = flooded(loss_fn, 0.5, has_aux=has_aux)
    assert typing.get_type_hints(kept) == typing.get_type_hints(loss_fn)
    assert inspect.signature(kept) == inspect.signature(loss_fn)
    shown = flooded(loss_fn, 0.5, has_aux=has_aux, return_info=True)
    hints = typing.get_type_hints(shown)
    assert hints["w"] is jax.Array
    signature = inspect.signature(shown)
    assert [*signature.parameters] == ["w"]
    for returned in (hints["return"], signature.return_annotation):
        value, info = typing.get_args(returned)
        assert (value, typing.get_origin(info)) == (jax.Array, FloodInfo)
    got = shown(jnp.float32(0.1))
    assert isinstance(got[0], jax.Array)
    assert isinstance(got[1], FloodInfo)
    unsaid = flooded(lambda w: w**2, 0.5, return_info=True)
    assert "return" not in typing.get_type_hints(unsaid)


def test_no_gradient_flows_through_the_info():
    """Of none of its fields: the soft multiplier has a derivative, the loss too."""
    for field in ("loss", "level", "multiplier"):
        slope = jax.grad(
            lambda w, level, field=field: getattr(
                flooded(lambda w: w**2, level, shape=shapes.soft(), return_info=True)(
                    w
                )[1],
                field,
            ),
            (0, 1),
        )(0.3, 0.5)
        assert slope == (0.0, 0.0), field
