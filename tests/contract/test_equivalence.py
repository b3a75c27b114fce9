"""The two forms and a numpy oracle are one: op by op, and over whole trainings."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import flooded, scale_by_flood, shapes
from tests import forms
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("optimized")


class TanhMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.tanh(nn.Dense(7)(x)))[..., 0]


def mlp():
    model = TanhMLP()

    @jax.jit
    def made():
        x = jax.random.normal(jax.random.key(0), (11, 3))
        y = jnp.sin(x[:, 0]) - 0.5 * x[:, 1]
        params = model.init(jax.random.key(1), x)
        return x, y, jax.tree.map(lambda p: p.astype(x.dtype), params)

    x, y, params = made()
    return lambda p: jnp.mean((model.apply(p, x) - y) ** 2), params


def quartic():
    def loss_fn(p):
        return (p[0] ** 2 - 1) ** 2 + 0.3 * p[0] * p[1] + 0.2 * p[1] ** 4 - 0.1 * p[1]

    return loss_fn, jnp.array([0.4, -1.3])


MAKERS = {"mlp": mlp, "quartic": quartic}


@functools.cache
def problem(name, bits):
    """Its loss and parameters: once for 32 and once for 64 bits."""
    assert jax.config.jax_enable_x64 == (bits == 64)
    return MAKERS[name]()


@functools.cache
def op_by_op(name, bits):
    """Value and gradient."""
    loss_fn, params = problem(name, bits)
    return jax.value_and_grad(loss_fn)(params)


SIDES = {
    # the level, and whether the loss descends to it
    "far_above": (lambda loss: loss + 0.3, False),
    "just_above": (lambda loss: np.nextafter(loss, np.inf, dtype=loss.dtype), False),
    "tie": (lambda loss: loss, True),
    "just_below": (lambda loss: np.nextafter(loss, -np.inf, dtype=loss.dtype), True),
    "far_below": (lambda loss: loss - 0.3, True),
    "off": (lambda loss: -np.inf, True),
}


@jax.jit
def compiled_update(grads, value, level):
    transform = scale_by_flood(level)
    return transform.update(grads, transform.init(grads), value=value)[0]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", slow_but(["quartic"], MAKERS))
@pytest.mark.parametrize("bits", slow_but([32], [32, 64]))
def test_both_forms_equal_the_numpy_oracle_bit_for_bit(bits, name, side, request):
    if bits == 64:
        request.getfixturevalue("x64")
    loss_fn, params = problem(name, bits)
    value, grad = op_by_op(name, bits)
    assert value.dtype == f"float{bits}"
    level_of, descends = SIDES[side]
    level = level_of(np.asarray(value))
    sign = 1.0 if descends else -1.0
    oracle = jax.tree.map(lambda g: np.asarray(g) * np.asarray(sign, g.dtype), grad)
    transform = scale_by_flood(level)
    state = transform.init(params)
    loss_form = jax.grad(flooded(loss_fn, level))(params)
    optax_form, _ = transform.update(grad, state, value=value)
    jitted = compiled_update(grad, value, np.asarray(level, value.dtype))
    for found in (loss_form, optax_form, jitted):
        chex.assert_trees_all_equal(found, oracle)
        chex.assert_trees_all_equal_shapes_and_dtypes(found, grad)


# ---- trainings, compiled, in float64 ----

LEVEL, BAND, STEPS = 0.4, 0.08, 80
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "adamw_clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.2), optax.adamw(0.05, weight_decay=0.1)
    ),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.3),
}
SHAPES = {
    "reflect": shapes.reflect(),
    "asymmetric": shapes.asymmetric(0.5),
    "own": forms.STEEPER,
}


def train(step, optimizer):
    """Parameters, state and direction at the end, and the loss before each step."""
    params = problem("mlp", 64)[1]

    @jax.jit
    def run():
        start = params, optimizer.init(params), False
        return jax.lax.scan(lambda carry, _: step(*carry), start, length=STEPS)

    return run()


@functools.cache
def by_the_loss_form(name, shape, band):
    """Where there is a band the loop carries the direction: see docs/traps.md."""
    inner = optax.with_extra_args_support(OPTIMIZERS[name]())

    def step(params, state, rises):
        end = LEVEL + jnp.where(rises, band, -band)
        objective = flooded(
            problem("mlp", 64)[0], end, return_info=True, shape=SHAPES[shape]
        )
        (value, info), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = inner.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state, info.loss < end), info.loss

    return train(step, inner)


COURSES = [
    *((form, name, 0, "reflect") for form in ("chain", "flood") for name in OPTIMIZERS),
    *(("chain", "adam", BAND, "reflect"), ("flood", "adam", BAND, "reflect")),
    *(("flood", name, BAND, "reflect") for name in ("momentum", "polyak_sgd")),
    *(("flood", "sgd", BAND, shape) for shape in ("asymmetric", "own")),
]
COURSES.remove(("chain", "polyak_sgd", 0, "reflect"))  # it reads the raw loss there


@pytest.mark.parametrize(
    ("form", "name", "band", "shape"),
    slow_but([("flood", "sgd", BAND, "own")], COURSES),
)
@pytest.mark.usefixtures("x64")
def test_training_trajectories_of_the_forms_coincide(form, name, band, shape):
    optimizer = forms.OPTAX[form](
        OPTIMIZERS[name](), LEVEL, band=band, shape=SHAPES[shape]
    )

    def step(params, state, rises):
        value, grads = jax.value_and_grad(problem("mlp", 64)[0])(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state, rises), value

    (params, state, _), losses = train(step, optimizer)
    (wanted, inner, _), wanted_losses = by_the_loss_form(name, shape, band)
    chex.assert_trees_all_close(params, wanted, rtol=1e-12)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-12)
    found = state[1] if form == "chain" else state.flood_inner_state
    chex.assert_trees_all_close(found, inner, rtol=1e-10, atol=1e-12)
    # the run crosses both ends, more than once: otherwise it compares nothing
    below = optax.tree.get(state, "flood_below")
    assert losses[0] > LEVEL + band
    assert 5 < below < STEPS - 5
    assert np.sum(np.diff(losses > LEVEL) != 0) >= 3


@pytest.mark.parametrize("level", [0.0, -np.inf])
@pytest.mark.parametrize("form", ["chain", "flood"])
def test_flooding_at_zero_or_off_is_plain_training_bit_for_bit(form, level):
    loss_fn, params = problem("mlp", 32)
    inner = optax.with_extra_args_support(optax.adam(0.1))
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    ends = []
    for optimizer in (inner, forms.OPTAX[form](inner, level)):
        at, state = params, optimizer.init(params)
        for _ in range(8):
            value, grads = value_and_grad(at)
            updates, state = optimizer.update(grads, state, at, value=value)
            at = optax.apply_updates(at, updates)
        ends.append(at)
    chex.assert_trees_all_equal(*ends)
