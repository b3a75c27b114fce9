"""Where levels come from: against decimals, closed forms and step-by-step rules."""

from decimal import Decimal, getcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import levels

getcontext().prec = 60


def test_warmup_of_a_schedule_does_not_shift_it():
    schedule = levels.warmup(lambda step: 0.25 * step, 2)
    chex.assert_trees_all_equal(
        jax.vmap(schedule)(jnp.arange(4)), jnp.array([-jnp.inf, -jnp.inf, 0.5, 0.75])
    )


# AdaFlood


def adaflood_in_decimals(a, gamma, alpha=1.0, beta=0.0):
    z = Decimal(alpha) * Decimal(a) + Decimal(beta)
    gamma = Decimal(gamma)
    return float(-((1 - gamma) * (-z).exp() + gamma).ln())


HELD_OUT = [
    0.0,
    1e-30,
    1e-6,
    0.003,
    0.4,
    0.75,
    3.0,
    18.0,
    90.0,
    1e4,
    -0.02,
    -3.0,
    -40.0,
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float32, 1e-6), (np.float64, 1e-14)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("gamma", [0.0, 2.0**-30, 0.0625, 0.5, 0.9375, 1 - 2.0**-20])
def test_adaflood_equals_the_formula_in_60_digits(gamma, dtype, rtol):
    a = np.array(HELD_OUT, dtype)
    expected = [adaflood_in_decimals(float(x), gamma) for x in a]
    result = levels.adaflood(a, gamma)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected, rtol=rtol)


@pytest.mark.usefixtures("x64")
def test_adaflood_alpha_and_beta_correct_the_held_out_loss():
    expected = [adaflood_in_decimals(a, 0.25, 0.75, 0.5) for a in HELD_OUT]
    result = levels.adaflood(jnp.array(HELD_OUT), 0.25, alpha=0.75, beta=0.5)
    np.testing.assert_allclose(result, expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("gamma", "cap"), [(0.05, 2.996), (0.25, 1.386), (0.5, 0.693), (0.9, 0.105)]
)
def test_adaflood_level_is_capped_as_published(gamma, cap):
    level = levels.adaflood(jnp.array([0.5, 20.0, 1e30, jnp.inf]), gamma)
    np.testing.assert_allclose(level[1:], cap, atol=5e-4)
    assert level[0] < cap


def test_adaflood_gamma_zero_is_the_held_out_loss_and_one_is_no_flooding():
    a = jnp.array([0.0, 1e-3, 0.3, 2.0, 700.0])
    np.testing.assert_allclose(levels.adaflood(a, 0.0), a, rtol=1e-6)
    np.testing.assert_array_equal(levels.adaflood(a, 1.0), 0.0)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_adaflood_slope_in_alpha_is_finite_and_right(gamma):
    # alpha can be trained on an objective of one's own
    a = np.array([0.0, 0.1, 2.0, 60.0])
    slopes = jax.vmap(jax.grad(lambda al, x: levels.adaflood(x, gamma, alpha=al)))(
        jnp.ones(4), jnp.asarray(a, jnp.float32)
    )
    weight = (1 - gamma) * np.exp(-a)
    np.testing.assert_allclose(slopes, a * weight / (weight + gamma), rtol=1e-5)


def test_adaflood_traces_once_over_gamma():
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(levels.adaflood, n=1))
    a = jnp.array([0.2, 3.0])
    for gamma in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(
            run(a, jnp.float32(gamma)), levels.adaflood(a, gamma), rtol=1e-6
        )


def test_adaflood_makes_no_nan_on_the_way():
    with jax.debug_nans(True):
        for gamma in (0.0, 0.5, 1.0):
            levels.adaflood(jnp.array(HELD_OUT), gamma)
