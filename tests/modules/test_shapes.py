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

R = np.array([-7.0, -1.25, -0.3, -1e-3, 0.0, 1e-3, 0.3, 1.25, 7.0])

NUMPY = {
    "reflect": (shapes.reflect(), np.abs, lambda r: np.where(r >= 0, 1.0, -1.0)),
    "soft": (
        shapes.soft(),
        lambda r: np.sqrt(1 + r**2) - 1,
        lambda r: r / np.sqrt(1 + r**2),
    ),
    "soft3": (
        shapes.soft(3.0),
        lambda r: 9 * (np.sqrt(1 + (r / 3) ** 2) - 1),
        lambda r: r / np.sqrt(1 + (r / 3) ** 2),
    ),
    "pause": (
        shapes.pause(),
        lambda r: np.maximum(r, 0),
        lambda r: np.where(r >= 0, 1.0, 0.0),
    ),
    "asymmetric": (
        shapes.asymmetric(0.4, 0.2),
        lambda r: np.where(r >= -0.2, r, -0.4 * (r + 0.2) - 0.2),
        lambda r: np.where(r >= -0.2, 1.0, -0.4),
    ),
}
every_shape = pytest.mark.parametrize("name", NUMPY)


@every_shape
@pytest.mark.usefixtures("x64")
def test_shape_value_and_multiplier_equal_numpy(name):
    shape, phi, m = NUMPY[name]
    r = jnp.asarray(R)
    # the soft value avoids the cancellation of the closed form, which loses 1e-16
    np.testing.assert_allclose(shape.value(r), phi(R), rtol=1e-14, atol=3e-16 * 9)
    np.testing.assert_allclose(shape.multiplier(r), m(R), rtol=1e-15)


@every_shape
@pytest.mark.usefixtures("x64")
def test_shape_multiplier_is_the_derivative_of_value(name):
    shape = NUMPY[name][0]
    r = jnp.asarray(R)
    derivative = jax.vmap(jax.grad(shape.value))(r)
    np.testing.assert_allclose(derivative, shape.multiplier(r), rtol=1e-13)


@every_shape
def test_shape_nan_stays_nan_in_value_multiplier_and_derivative(name):
    shape = NUMPY[name][0]
    nan = jnp.float32(jnp.nan)
    assert np.isnan(shape.value(nan))
    assert np.isnan(shape.multiplier(nan))
    assert np.isnan(jax.grad(shape.value)(nan))


@every_shape
def test_shape_infinity_descends_without_nan(name):
    shape = NUMPY[name][0]
    inf = jnp.float32(jnp.inf)
    assert shape.value(inf) == jnp.inf
    expected = {"soft3": 3.0}.get(name, 1.0)
    assert shape.multiplier(inf) == pytest.approx(expected)


@every_shape
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_shape_keeps_shape_and_dtype(name, dtype):
    shape = NUMPY[name][0]
    r = jnp.asarray(R, dtype).reshape(3, 3)
    for function in shape:
        assert function(r).dtype == dtype
        assert function(r).shape == (3, 3)


@pytest.mark.usefixtures("x64")
def test_soft_small_residual_keeps_its_digits():
    # sqrt(1 + x^2) - 1 is 0 in float64 for x = 1e-9; the truth is x^2/2
    assert shapes.soft().value(jnp.float64(1e-9)) == pytest.approx(5e-19, rel=1e-12)


@pytest.mark.usefixtures("x64")
def test_soft_second_derivative_is_true():
    r = jnp.asarray(R)
    second = jax.vmap(jax.grad(jax.grad(lambda x: flood_loss(x, 0.0, shape=soft))))
    soft = shapes.soft()
    np.testing.assert_allclose(second(r), (1 + R**2) ** -1.5, rtol=1e-12)


def test_soft_tends_to_reflect_far_from_the_level():
    r = jnp.array([-1e6, 1e6])
    np.testing.assert_array_equal(shapes.soft().multiplier(r), [-1.0, 1.0])


def test_asymmetric_defaults_are_flooding_and_zero_ascent_a_pause():
    r = jnp.asarray(R, jnp.float32)
    for one, other in [
        (shapes.asymmetric(), shapes.reflect()),
        (shapes.asymmetric(ascent=0.0), shapes.pause()),
    ]:
        np.testing.assert_array_equal(one.value(r), other.value(r))
        np.testing.assert_array_equal(one.multiplier(r), other.multiplier(r))


def test_soft_scale_may_be_traced():
    values = jax.vmap(lambda s: shapes.soft(s).multiplier(jnp.float32(-1.0)))
    expected = [-1 / np.sqrt(2), -1 / np.sqrt(1 + 1 / 9)]
    np.testing.assert_allclose(values(jnp.array([1.0, 3.0])), expected, rtol=1e-6)


def test_flood_loss_traced_scale_under_grad_and_vmap():
    def slope(s):
        return jax.grad(lambda x: flood_loss(x, 0.5, shape=shapes.soft(s)))(0.25)

    expected = [-0.25 / np.sqrt(1 + (0.25 / s) ** 2) for s in (1.0, 3.0)]
    np.testing.assert_allclose(
        jax.vmap(slope)(jnp.array([1.0, 3.0])), expected, rtol=1e-6
    )


def test_shapes_are_equal_and_hashable_where_they_have_no_parameter():
    assert shapes.reflect() == shapes.reflect()
    assert hash(shapes.pause()) == hash(shapes.pause())


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
