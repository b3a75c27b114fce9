"""Where levels come from: against decimals, closed forms and step-by-step rules."""

import re
from decimal import Decimal, getcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import levels, scale_by_flood

getcontext().prec = 60


# Warm-up


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_warmup_floods_from_its_step_on(compile_):
    optimizer = optax.chain(scale_by_flood(levels.warmup(0.5, 2)), optax.sgd(1.0))
    update = compile_(optimizer.update)
    state, signs = optimizer.init(0.0), []
    for _ in range(4):  # always below the level
        updates, state = update(jnp.float32(1.0), state, value=jnp.float32(0.3))
        signs.append(float(updates))
    assert signs == [-1, -1, 1, 1]
    assert optax.tree.get(state, "flood_below") == 2


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


# Bad input

LOSSES, KEY = jnp.array([0.1, 0.4]), jax.random.key(0)
BAD = {
    "adaflood_nan": (
        lambda: levels.adaflood(jnp.array([0.1, jnp.nan]), 0.5),
        ValueError,
        "`adaflood(held_out_loss)` must not be NaN, got 1 of 2 entries: the model of",
    ),
    "adaflood_integers": (
        lambda: levels.adaflood(jnp.arange(3), 0.5),
        TypeError,
        "`adaflood(held_out_loss)` must be of a real float dtype, got int32.",
    ),
    "adaflood_gamma": (
        lambda: levels.adaflood(LOSSES, 1.5),
        ValueError,
        "`adaflood(gamma=...)` must be in [0, 1], got 1.5.",
    ),
    "adaflood_gamma_nan": (
        lambda: levels.adaflood(LOSSES, jnp.float32(jnp.nan)),
        ValueError,
        "`adaflood(gamma=...)` must be in [0, 1], got nan.",
    ),
    "adaflood_gamma_vector": (
        lambda: levels.adaflood(LOSSES, jnp.array([0.1, 0.2])),
        ValueError,
        "`adaflood(gamma=...)` must be a scalar, got shape (2,).",
    ),
    "adaflood_gamma_text": (
        lambda: levels.adaflood(LOSSES, "0.5"),
        TypeError,
        "`adaflood(gamma=...)` must be a real number, got '0.5' of type str.",
    ),
    "adaflood_alpha": (
        lambda: levels.adaflood(LOSSES, 0.5, alpha=np.inf),
        ValueError,
        "`adaflood(alpha=...)` must be finite, got inf.",
    ),
    "adaflood_beta": (
        lambda: levels.adaflood(LOSSES, 0.5, beta=None),
        TypeError,
        "`adaflood(beta=...)` must be a real number, got None of type NoneType.",
    ),
    "folds_one": (
        lambda: hold_out(num_folds=1),
        ValueError,
        "`held_out_losses(num_folds=...)` must be at least 2, got 1.",
    ),
    "folds_float": (
        lambda: hold_out(num_folds=2.0),
        TypeError,
        "`held_out_losses(num_folds=...)` must be a static int, got 2.0.",
    ),
    "examples_one": (
        lambda: hold_out(num_examples=1),
        ValueError,
        "`held_out_losses(num_examples=...)` must be at least 2, got 1.",
    ),
    "folds_too_many": (
        lambda: hold_out(num_folds=7),
        ValueError,
        "`held_out_losses(num_folds=..., vmap=False)` must be at most num_examples, "
        "6, got 7.",
    ),
    "folds_key": (
        lambda: hold_out(key=0),
        TypeError,
        "`held_out_losses(key=...)` must be a key, `jax.random.key(0)`, got 0.",
    ),
    "folds_keys": (
        lambda: hold_out(key=jax.random.split(jax.random.key(0), 3)),
        TypeError,
        "`jax.random.key(0)`, got key<fry> of shape (3,).",
    ),
    "folds_uneven": (
        lambda: hold_out(num_folds=4, vmap=True),
        ValueError,
        "`held_out_losses(num_folds=..., vmap=True)` must divide num_examples, 6, "
        "got 4.",
    ),
    "groups_length": (
        lambda: hold_out(groups=[1, 1, 2]),
        ValueError,
        "`held_out_losses(groups=...)` must have an entry for each of the 6 examples, "
        "got 3.",
    ),
    "groups_axes": (
        lambda: hold_out(groups=np.ones((6, 1))),
        ValueError,
        "`held_out_losses(groups=...)` must have one axis, with an entry per example, "
        "got shape (6, 1).",
    ),
    "groups_unhashable": (
        lambda: hold_out(groups=[[0], [0], [1], [1], [2], [2]]),
        TypeError,
        "`held_out_losses(groups=...)` must be hashable, got an entry that is not, "
        "unhashable type: 'list': make it a tuple or a string.",
    ),
    "groups_nan": (
        lambda: hold_out(groups=np.array([0, 1, 2, 3, np.nan, np.nan])),
        ValueError,
        "`held_out_losses(groups=...)` must not be NaN",
    ),
    "groups_few": (
        lambda: hold_out(num_folds=3, groups=[0, 0, 0, 1, 1, 1]),
        ValueError,
        "`held_out_losses(num_folds=...)` must be at most the number of groups, 2, "
        "got 3.",
    ),
    "groups_vmap": (
        lambda: hold_out(groups=[0, 0, 0, 0, 1, 1], vmap=True),
        ValueError,
        "`held_out_losses(vmap=True)` needs folds of one size, got 2 to 4 examples",
    ),
    "stratify_traced": (
        lambda: jax.jit(lambda y: hold_out(stratify=y, key=KEY))(jnp.arange(6) % 2),
        TypeError,
        "`held_out_losses(stratify=...)` must be known where `groups` or `stratify`",
    ),
    "stratify_traced_key": (
        lambda: jax.jit(lambda k: hold_out(key=k, stratify=[0, 1] * 3))(
            jax.random.key(0)
        ),
        TypeError,
        "`held_out_losses(key=...)` must be known where `groups` or `stratify` are",
    ),
    "stratify_single": (
        lambda: hold_out(stratify=list("aabbbz")),
        ValueError,
        "`held_out_losses(stratify=...)` must leave every class in the rest of every "
        "fold, got class 'z' in fold ",
    ),
    "stratify_group": (
        lambda: hold_out(stratify=[0, 0, 0, 0, 1, 1], groups=[0, 1, 2, 3, 4, 4]),
        ValueError,
        "must leave every class in the rest of every fold, got class 1 in fold ",
    ),
    "losses_mean": (
        lambda: hold_out(evaluate=lambda model, indices: jnp.float32(0.5)),
        ValueError,
        "`held_out_losses(evaluate)` must return one loss per index, shape (3,), "
        "got ().",
    ),
    "losses_integers": (
        lambda: hold_out(evaluate=lambda model, indices: indices),
        TypeError,
        "`held_out_losses(evaluate)'s losses` must be of a real float dtype, got int32",
    ),
    "wavebound_epsilon": (
        lambda: levels.wavebound(LOSSES, -0.1),
        ValueError,
        "`wavebound(epsilon=...)` must be non-negative and finite, got -0.1.",
    ),
    "wavebound_shape": (
        lambda: levels.wavebound(LOSSES, jnp.ones(3)),
        ValueError,
        "`wavebound(epsilon=...)` must broadcast to the shape (2,) of the losses",
    ),
    "entropy_scalar": (
        lambda: levels.entropy_floor(1.0),
        ValueError,
        "`entropy_floor(target_probs)` must have an axis of classes, got shape ().",
    ),
    "entropy_no_classes": (
        lambda: levels.entropy_floor(jnp.ones((3, 0))),
        ValueError,
        "`entropy_floor(target_probs)` must have an axis of classes, got shape (3, 0).",
    ),
    "entropy_logits": (
        lambda: levels.entropy_floor(jnp.array([-1.0, 2.0])),
        ValueError,
        "`entropy_floor(target_probs)` must be rows of probabilities, got numbers from "
        "-1.0 and sums from 1.0 to 1.0.",
    ),
    "entropy_sum": (
        lambda: levels.entropy_floor(jnp.array([[0.5, 0.5], [0.5, 0.75]])),
        ValueError,
        "must be rows of probabilities, got numbers from 0.5 and sums from 1.0 to 1.25",
    ),
    "accordance_structure": (
        lambda: levels.gradient_accordance({"a": LOSSES}, {"b": LOSSES}),
        ValueError,
        "`gradient_accordance(grads_a, grads_b)` must be trees of floats of one "
        "structure and shapes, got {'a': (2,)} and {'b': (2,)}.",
    ),
    "accordance_shapes": (
        lambda: levels.gradient_accordance([LOSSES], [LOSSES[:1]]),
        ValueError,
        "structure and shapes, got [(2,)] and [(1,)].",
    ),
    "accordance_empty": (
        lambda: levels.gradient_accordance([], []),
        ValueError,
        "`gradient_accordance(grads_a, grads_b)` must be trees of floats",
    ),
}


def hold_out(
    num_examples=6,
    num_folds=2,
    vmap=False,
    evaluate=lambda model, indices: jnp.ones(indices.shape),
    key=None,
    **given,
):
    return levels.held_out_losses(
        lambda indices, key: (),
        evaluate,
        num_examples,
        num_folds=num_folds,
        key=jax.random.key(0) if key is None else key,
        vmap=vmap,
        **given,
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_its_message(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
