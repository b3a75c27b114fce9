"""Where a loss meets its level: derivatives of every kind, and what takes part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet

from flood_optax import flood_loss, flood_mean, flooded, scale_by_flood, shapes
from flood_optax.objective import relax_loss
from tests import forms, oracles
from tests.marks import slow_but


def numpy_phi(name, r):
    """Value, first and second derivative of phi, and of its branch at a kink."""
    second = (1 + (r / 0.7) ** 2) ** -1.5 if name == "soft" else 0
    return *oracles.SHAPES[name](r), second


LEVEL = 0.5
IDS = jnp.array([0, 1, 1])
FORMS = {
    "flood_loss": lambda x, shape: flood_loss(x, LEVEL, shape=shape),
    "flooded": lambda x, shape: flooded(lambda y: y, LEVEL, shape=shape)(x),
    "raw_value": lambda x, shape: flooded(
        lambda y: y, LEVEL, shape=shape, raw_value=True
    )(x),
    "batch": lambda x, shape: flood_mean(x + SPREAD, LEVEL, shape=shape),
    "example": lambda x, shape: flood_mean(
        x + 0 * SPREAD, LEVEL, over="example", shape=shape
    ),
    "segment": lambda x, shape: flood_mean(
        x + SPREAD,
        jnp.array([LEVEL + 0.1875, LEVEL - 0.1875]),
        over="segment",
        segment_ids=np.array([0, 0, 1, 1]),
        num_segments=2,
        shape=shape,
    ),
}
# means 0, and .1875 and -.1875 in the segments; a division by 4 is exact, also compiled
SPREAD = np.array([0.25, 0.125, -0.125, -0.25])


INNER = 0.75, 0.5  # the derivatives of the loss at x = 0


@functools.cache
def derivatives(form):
    """Value and two derivatives at a loss, by shape, in forward and reverse mode."""

    def by_shape(shape, at):
        def objective(x):
            return FORMS[form](at + INNER[0] * x + INNER[1] * x**2 / 2, shape)

        value, series = jet(objective, (0.0,), ((1.0, 0.0),))
        gradient = jax.grad(objective)
        reverse = objective(0.0), gradient(0.0), jax.grad(gradient)(0.0)
        return (value, *series), reverse

    return jax.jit(
        lambda at: {key: by_shape(shape, at) for key, shape in forms.SHAPES.items()}
    )


@pytest.mark.parametrize("residual", [-0.375, -0.125, 0.0, 0.375], ids="r={}".format)
@pytest.mark.parametrize("shape", forms.SHAPES)
@pytest.mark.parametrize("form", slow_but(("flood_loss", "flooded"), FORMS))
@pytest.mark.usefixtures("x64")
def test_jet_and_reverse_mode_give_value_and_two_derivatives(form, shape, residual):
    """`jet` looks through custom rules: the value itself has to carry them."""
    phi, slope, bend = numpy_phi(shape, residual)
    expected = (
        LEVEL + (residual if form == "raw_value" else phi),
        slope * INNER[0],
        bend * INNER[0] ** 2 + slope * INNER[1],
    )
    forward, reverse = derivatives(form)(LEVEL + residual)[shape]
    np.testing.assert_allclose(forward, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(reverse, expected, rtol=1e-13, atol=1e-14)


def loss_of(form, x, level, scale):
    """Every loss form with a traced level and a traced number in its shape."""
    soft, both = shapes.soft(scale), shapes.asymmetric(scale, scale / 8)
    losses = x * jnp.array([0.5, -0.4, 1.9])
    segments = {"over": "segment", "segment_ids": IDS, "num_segments": 2}
    return {
        "flood_loss": lambda: flood_loss(x, level, shape=soft),
        "flood_loss_asymmetric": lambda: flood_loss(x, level, shape=both),
        "flooded": lambda: flooded(jnp.sin, level, shape=soft)(x),
        "flooded_asymmetric": lambda: flooded(jnp.sin, level, shape=both)(x),
        "batch": lambda: flood_mean(losses, level, shape=soft),
        "example": lambda: flood_mean(losses, level, over="example", shape=soft),
        "segment": lambda: flood_mean(losses, level, shape=soft, **segments),
        "relax_even": lambda: relax_loss(losses, 1, level, epoch=2, upper=scale),
        "relax_odd": lambda: relax_loss(losses, 1, level, epoch=3, upper=scale),
    }[form]()


@functools.cache
def slopes(form):
    """By the loss; by level and shape, of the value and of that slope."""
    of = functools.partial(loss_of, form)

    @jax.jit
    def by_everything(*arguments):
        found = [jax.grad(of, 0)(*arguments)]
        tangents = (jnp.zeros([]), jnp.ones([]), jnp.ones([]))
        for function in (of, jax.grad(of, 0)):
            found += jax.grad(function, (1, 2))(*arguments)
            found.append(jax.jvp(function, arguments, tangents)[1])
        return found

    return by_everything


@pytest.mark.parametrize("level", [0.25, 5.0], ids=["above", "below"])
@pytest.mark.parametrize(
    "form",
    [
        "flood_loss",
        "flood_loss_asymmetric",
        "flooded",
        "flooded_asymmetric",
        "batch",
        "example",
        "segment",
        "relax_even",
        "relax_odd",
    ],
)
def test_no_gradient_flows_into_level_or_shape(form, level):
    """Nor does the gradient of the loss depend on them, in reverse and forward mode."""
    slope, *others = slopes(form)(*jnp.float32([0.45, level, 0.6]))
    assert slope != 0
    np.testing.assert_array_equal(others, 0)


@pytest.mark.parametrize("name", ["soft", "asymmetric"])
def test_no_gradient_flows_into_the_numbers_of_a_shape_by_itself(name):
    make = getattr(shapes, name)
    for function in ("value", "multiplier"):
        call = lambda s, function=function: getattr(make(s), function)(jnp.float32(-1))
        assert call(0.6) != call(0.7)
        assert jax.grad(call)(0.6) == 0


# ---- a level read off a compiled run ----


def optax_form(loss_fn, level, shape):
    def update(x):
        value, grad = jax.value_and_grad(loss_fn)(x)
        transform = scale_by_flood(level, shape=shape)
        return transform.update(grad, transform.init(x), value=value)[0]

    return update


TIES = {
    "flooded": lambda f, b, s: jax.grad(flooded(lambda x: f(x).mean(), b, shape=s)),
    "flood_mean": lambda f, b, s: jax.grad(lambda x: flood_mean(f(x), b, shape=s)),
    "optax form": lambda f, b, s: optax_form(lambda x: f(x).mean(), b, s),
}


@pytest.mark.parametrize("shape", ["reflect", "soft"])
@pytest.mark.parametrize("form", TIES)
def test_compiled_mean_that_equals_the_level_is_a_tie(form, shape):
    """The last product of a mean of 50 fused with "- level" is no rounded loss."""
    mean = jax.jit(lambda x: jnp.square(x).mean())
    step = jax.jit(
        lambda x, level: TIES[form](jnp.square, level, forms.SHAPES[shape])(x)
    )
    slope = {"reflect": 1, "soft": 0}[shape]
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=50).astype(np.float32)
        expected = slope * np.float32(2 / 50) * x
        np.testing.assert_allclose(step(x, mean(x)), expected, rtol=1e-6)
