"""The two forms and a numpy oracle are one: bit for bit, at every side of the level."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flood_optax
from flood_optax import flooded, scale_by_flood


class TanhMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(jnp.tanh(nn.Dense(7)(x)))[..., 0]


def mlp():
    x = jax.random.normal(jax.random.key(0), (11, 3))
    y = jnp.sin(x[:, 0]) - 0.5 * x[:, 1]
    model = TanhMLP()
    params = model.init(jax.random.key(1), x)
    params = jax.tree.map(lambda p: p.astype(x.dtype), params)
    return lambda p: jnp.mean((model.apply(p, x) - y) ** 2), params


def logistic():
    x = jax.random.normal(jax.random.key(2), (13, 4))
    y = (x[:, 0] + 0.3 * x[:, 3] > 0.2).astype(x.dtype)
    params = {"w": jnp.array([0.3, -0.2, 0.1, 0.7], x.dtype), "b": x[0, 0]}

    def loss_fn(p):
        return optax.sigmoid_binary_cross_entropy(x @ p["w"] + p["b"], y).mean()

    return loss_fn, params


def quartic():
    def loss_fn(p):
        return (p[0] ** 2 - 1) ** 2 + 0.3 * p[0] * p[1] + 0.2 * p[1] ** 4 - 0.1 * p[1]

    return loss_fn, jnp.array([0.4, -1.3])


MAKERS = {"mlp": mlp, "logistic": logistic, "quartic": quartic}


def kept_by_width(make):
    """Made once for 32 and once for 64 bits: what is compiled for it serves all."""
    made = functools.cache(lambda x64: make())
    return lambda: made(jax.config.jax_enable_x64)


PROBLEMS = {name: kept_by_width(make) for name, make in MAKERS.items()}
SIDES = {
    "far_above": lambda loss: loss + 0.3,
    "just_above": lambda loss: np.nextafter(loss, -np.inf, dtype=loss.dtype),
    "tie": lambda loss: loss,
    "just_below": lambda loss: np.nextafter(loss, np.inf, dtype=loss.dtype),
    "far_below": lambda loss: loss - 0.3,
    "off": lambda loss: -np.inf,
}
DESCENDS = {"just_above", "tie", "far_below", "off"}  # the side the *level* is on


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("bits", [32, 64])
def test_both_forms_equal_the_numpy_oracle_bit_for_bit(bits, problem, side, request):
    if bits == 64:
        request.getfixturevalue("x64")
    loss_fn, params = PROBLEMS[problem]()
    value, grad = jax.value_and_grad(loss_fn)(params)
    assert value.dtype == f"float{bits}"
    level = SIDES[side](np.asarray(value))

    sign = 1.0 if side in DESCENDS else -1.0
    oracle = jax.tree.map(lambda g: np.asarray(g) * np.asarray(sign, g.dtype), grad)

    loss_form = jax.grad(flooded(loss_fn, level))(params)
    transform = scale_by_flood(level)
    state = transform.init(params)
    optax_form, _ = transform.update(grad, state, value=value)
    jitted = jax.jit(lambda g, v: transform.update(g, state, value=v)[0])

    chex.assert_trees_all_equal(loss_form, oracle)
    chex.assert_trees_all_equal(optax_form, oracle)
    chex.assert_trees_all_equal(jitted(grad, value), oracle)
    chex.assert_trees_all_equal_shapes_and_dtypes(loss_form, grad)


@pytest.mark.parametrize("side", ["far_above", "far_below", "off"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.usefixtures("x64")
def test_both_forms_agree_when_the_whole_step_is_compiled(problem, side):
    # XLA fuses the two programs apart, so sums may round apart: 1e-14, not bits
    loss_fn, params = PROBLEMS[problem]()
    level = SIDES[side](np.asarray(loss_fn(params)))
    transform = scale_by_flood(level)

    @jax.jit
    def optax_form(params):
        value, grad = jax.value_and_grad(loss_fn)(params)
        return transform.update(grad, transform.init(params), value=value)[0]

    loss_form = jax.jit(jax.grad(flooded(loss_fn, level)))
    chex.assert_trees_all_close(
        loss_form(params), optax_form(params), rtol=1e-13, atol=1e-15
    )


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "adamw_clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.2), optax.adamw(0.05, weight_decay=0.1)
    ),
}


LEVEL = 0.4  # of the trajectories


def train(optimizer, objective):
    """The last parameters of 80 steps, and the raw loss after each."""
    loss_fn, params = PROBLEMS["mlp"]()

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(grad, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), loss_fn(params)

    start = (params, optimizer.init(params))
    (last, _), losses = jax.lax.scan(step, start, length=80)
    return last, losses


@functools.cache
def trained_on_the_flooded_loss(name):
    plain = optax.with_extra_args_support(OPTIMIZERS[name]())
    return train(plain, flooded(PROBLEMS["mlp"]()[0], LEVEL))


@pytest.mark.parametrize("form", ["chain", "wrapper"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("x64")
def test_training_trajectories_of_the_forms_coincide(name, form):
    inner = OPTIMIZERS[name]()
    if form == "chain":
        flooding = optax.chain(scale_by_flood(LEVEL), inner)
    else:
        flooding = flood_optax.flood(inner, LEVEL)
    by_loss, losses = trained_on_the_flooded_loss(name)
    by_optax, _ = train(flooding, PROBLEMS["mlp"]()[0])
    chex.assert_trees_all_close(by_loss, by_optax, rtol=1e-12)
    # the run crosses the level: otherwise it compares nothing
    assert losses[0] > LEVEL
    assert np.any(losses < LEVEL)


@pytest.mark.parametrize("level", [0.0, -np.inf])
def test_flooding_at_zero_or_off_is_plain_training_bit_for_bit(level):
    loss_fn, params = logistic()
    inner = optax.adam(0.1)
    flooding = optax.chain(scale_by_flood(level), inner)
    states = [(params, inner.init(params)), (params, flooding.init(params))]

    def steps(states):
        (p, s), (q, t) = states
        u, s = inner.update(jax.grad(loss_fn)(p), s, p)
        value, grad = jax.value_and_grad(loss_fn)(q)
        v, t = flooding.update(grad, t, q, value=value)
        return [(optax.apply_updates(p, u), s), (optax.apply_updates(q, v), t)]

    for _ in range(8):
        states = steps(states)
    chex.assert_trees_all_equal(states[0][0], states[1][0])


# ---- a pair of steps is one step on |grad L|^2 ----
