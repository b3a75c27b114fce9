"""Shapes against closed forms in numpy."""

import copy
import functools
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import flood_loss, shapes
from tests import forms, oracles

R = np.array([-7.0, -1.25, -0.3, -1e-3, 0.0, 1e-3, 0.3, 1.25, 7.0])
SHAPES = forms.SHAPES | {"soft3": shapes.soft(3.0)}
NUMPY = oracles.SHAPES | {"soft3": oracles.soft(3.0)}
every_shape = pytest.mark.parametrize("name", SHAPES)


@every_shape
@pytest.mark.usefixtures("x64")
def test_value_multiplier_and_derivative_equal_numpy(name):
    shape, (phi, m) = SHAPES[name], NUMPY[name](R)
    # the soft value avoids the cancellation of the closed form, which loses 1e-16
    functions = (*shape, jax.vmap(jax.grad(shape.value)))
    value, multiplier, derivative = jax.jit(lambda r: [f(r) for f in functions])(R)
    np.testing.assert_allclose(value, phi, rtol=1e-14, atol=3e-16 * 9)
    np.testing.assert_allclose(multiplier, m, rtol=1e-15)
    np.testing.assert_allclose(derivative, multiplier, rtol=1e-13)


@every_shape
def test_nan_stays_nan_and_infinity_descends_without(name):
    shape, (nan, inf) = SHAPES[name], np.float32([np.nan, np.inf])
    for function in (*shape, jax.grad(shape.value)):
        assert np.isnan(function(nan))
    assert shape.value(inf) == np.inf
    steepest = {"soft": 0.7, "soft3": 3.0}.get(name, 1.0)
    assert shape.multiplier(inf) == pytest.approx(steepest)
    # and it is reached before: soft tends to reflect far from the level
    far = shape.multiplier(np.float32([-1e6, 1e6])) / np.float32(steepest)
    if name.startswith("soft"):
        np.testing.assert_allclose(far, [-1.0, 1.0], rtol=1e-6)


@every_shape
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_shape_keeps_shape_and_dtype(name, dtype):
    r = jax.ShapeDtypeStruct((3, 3), dtype)
    for function in SHAPES[name]:
        assert jax.eval_shape(function, r) == r


@pytest.mark.usefixtures("x64")
def test_soft_small_residual_keeps_its_digits():
    # sqrt(1 + x^2) - 1 is 0 in float64 for x = 1e-9; the truth is x^2/2
    value = shapes.soft().value(jnp.float64(1e-9))
    np.testing.assert_allclose(value, 5e-19, rtol=1e-12)


def test_asymmetric_defaults_are_flooding_and_zero_ascent_a_pause():
    r = jnp.asarray(R, jnp.float32)
    for one, other in [
        (shapes.asymmetric(), shapes.reflect()),
        (shapes.asymmetric(ascent=0.0), shapes.pause()),
    ]:
        np.testing.assert_array_equal(one.value(r), other.value(r))
        np.testing.assert_array_equal(one.multiplier(r), other.multiplier(r))


def test_soft_scale_may_be_traced_and_mapped():
    bent = lambda s: flood_loss(0.25, 0.5, shape=shapes.soft(s))
    slope = lambda s: jax.grad(lambda x: flood_loss(x, 0.5, shape=shapes.soft(s)))(0.25)
    scales = np.float32([1.0, 3.0])
    wanted = [oracles.bend(0.25, 0.5, oracles.soft(s)) for s in scales]
    found = jax.vmap(lambda s: (bent(s), slope(s)))(scales)
    np.testing.assert_allclose(np.transpose(found), wanted, rtol=1e-6)


MAKERS = {
    "reflect()": shapes.reflect,
    "soft(scale=0.5)": lambda: shapes.soft(0.5),
    "pause()": shapes.pause,
    "asymmetric(ascent=0.25, dead_band=0.125)": lambda: shapes.asymmetric(0.25, 0.125),
}


@pytest.mark.parametrize("text", MAKERS)
def test_shapes_are_equal_where_their_numbers_are_and_print_as_their_call(text):
    one, other = MAKERS[text](), MAKERS[text]()
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == text
    assert eval(f"shapes.{text}") == one
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one) == one
    assert [name for name, make in MAKERS.items() if make() == one] == [text]


def test_numbers_of_any_kind_make_equal_shapes():
    made = [shapes.soft(x) for x in (2, 2.0, np.float32(2), np.array(2), jnp.array(2))]
    assert len(set(made)) == 1
    assert shapes.asymmetric(0.5, 0.25) != shapes.asymmetric(0.25, 0.5)
    assert shapes.soft(2.0) != shapes.soft(3.0)


def test_shape_of_parts_of_others_prints_and_pickles():
    mixed = shapes.Shape(shapes.soft(0.5).value, shapes.pause().multiplier)
    assert repr(mixed) == "Shape(value=soft(scale=0.5).value, multiplier=" + (
        "pause().multiplier)"
    )
    assert pickle.loads(pickle.dumps({"nested": [mixed]})) == {"nested": [mixed]}
    own = shapes.Shape(jnp.abs, lambda r: r)
    assert re.fullmatch(r"Shape\(value=\S*abs, multiplier=\S*<lambda>\)", repr(own))


def test_equal_static_shapes_are_one_trace():
    @functools.partial(jax.jit, static_argnames="shape")
    @chex.assert_max_traces(n=1)
    def slope(x, shape):
        return jax.grad(lambda x: flood_loss(x, 0.5, shape=shape))(x)

    for scale in (0.5, np.float32(0.5), jnp.array(0.5)):
        np.testing.assert_allclose(
            slope(0.25, shape=shapes.soft(scale)), -0.25 / np.sqrt(1.25), rtol=1e-6
        )


def test_shape_of_traced_numbers_can_be_hashed_and_compared():
    @jax.jit
    def run(s):
        one = shapes.soft(s)
        assert one == one  # noqa: PLR0124
        assert one != shapes.soft(s + 1)
        assert isinstance(hash(one), int)
        assert re.match(r"soft\(scale=", repr(one))
        return flood_loss(0.25, 0.5, shape=one)

    expected = 0.5 + 4 * (np.sqrt(1 + 0.125**2) - 1)
    np.testing.assert_allclose(run(2.0), expected, rtol=1e-6)
