"""Levels from targets, target models and gradients, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import flood_loss, flood_mean, levels

# WaveBound


def test_wavebound_is_below_the_target_and_passes_no_gradient():
    target = jnp.array([[0.5, 0.25], [1.0, 0.125]])
    np.testing.assert_array_equal(
        levels.wavebound(target, 0.125), target - np.float32(0.125)
    )
    slopes = jax.grad(lambda x: levels.wavebound(x, 0.1).sum())(target)
    np.testing.assert_array_equal(slopes, 0.0)
    assert levels.wavebound(target.astype(jnp.bfloat16), 0.1).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        levels.wavebound(target, jnp.array([0.0, 0.125])),
        [[0.5, 0.125], [1.0, 0.0]],
    )


def test_wavebound_where_the_models_agree_descends():
    # r = epsilon > 0: never a tie, never ascent
    def objective(w, target):
        losses = (w - jnp.array([0.3, 2.0])) ** 2
        bounds = levels.wavebound((target - jnp.array([0.3, 2.0])) ** 2, 1e-3)
        return flood_loss(losses, bounds).mean()

    w = jnp.array([1.0, 0.5])
    np.testing.assert_allclose(
        jax.grad(objective)(w, w), w - jnp.array([0.3, 2.0]), rtol=1e-6
    )


def test_unsigned_numbers_are_not_negated():
    losses = jnp.array([0.5, 2.0])
    one = np.uint8(1)
    np.testing.assert_array_equal(levels.wavebound(losses, one), losses - 1)
    found = levels.adaflood(losses, one - one, alpha=one, beta=one)
    np.testing.assert_allclose(found, losses + 1, rtol=1e-6)
    np.testing.assert_allclose(levels.noise_floor(one, 3), np.log(2), rtol=1e-6)


# Soft labels


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_entropy_floor_of_smoothed_labels_is_reached_and_not_crossed(dtype):
    smooth = np.asarray(optax.smooth_labels(np.eye(3, 5, dtype=np.float32), 0.1))
    targets = jnp.asarray(smooth, dtype)  # in bfloat16 the rows sum to 0.9985
    floor = np.asarray(levels.entropy_floor(targets))
    p = np.asarray(targets, np.float64)
    best = -(p * np.log(p / p.sum(-1, keepdims=True))).sum(-1)
    np.testing.assert_allclose(floor, best, rtol=1e-6)
    logits = np.log(p) + np.random.default_rng(0).normal(0, 0.02, (1000, 3, 5))
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert (-(p * log_q).sum(-1) > floor - 1e-6).all()
    np.testing.assert_array_equal(levels.entropy_floor(np.eye(3, dtype=dtype)), 0)


def test_entropy_floor_makes_a_level_for_mixup_act():
    # a constant level below the floor never acts, one relative to it does
    rng = np.random.default_rng(0)
    share = rng.beta(0.4, 0.4, (64, 1))
    a, b = np.eye(4)[rng.integers(0, 4, (2, 64))]
    targets = share * a + (1 - share) * b
    q = (targets + 1e-4) / (1 + 4e-4)  # overfitted to the mixed labels
    losses = -(targets * np.log(q)).sum(-1)
    plain = flood_mean(losses.astype(np.float32), 0.05)
    np.testing.assert_allclose(plain, losses.mean(), rtol=1e-6)
    floor = np.asarray(levels.entropy_floor(targets.astype(np.float32)))
    assert (losses - floor < 0.05).all()
    relative = flood_mean(losses.astype(np.float32), floor + 0.05, over="example")
    np.testing.assert_allclose(
        relative, np.mean(2 * (floor + 0.05) - losses), rtol=1e-6
    )


def test_entropy_floor_passes_no_gradient():
    slopes = jax.grad(lambda p: levels.entropy_floor(p).sum())(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(slopes, 0.0)


# Accordance


def numpy_cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in tree]) for tree in (a, b))
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_gradient_accordance_equals_the_cosine_at_any_scale(scale):
    rng = np.random.default_rng(0)
    a, b = ([rng.normal(size=(3, 2)), rng.normal(size=5)] for _ in range(2))
    b = [x + 0.5 * y for x, y in zip(b, a, strict=True)]
    scaled = [jnp.asarray(x * scale, jnp.float32) for x in a]
    result = levels.gradient_accordance(
        scaled, [jnp.asarray(x, jnp.float32) for x in b]
    )
    np.testing.assert_allclose(result, numpy_cosine(a, b), rtol=1e-6)


def test_gradient_accordance_predicts_what_a_step_does_to_the_other_batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, 3)).astype(np.float32), np.float32([[1, 0, 2, -1]])
    params = {"w": rng.normal(size=3).astype(np.float32), "b": np.float32(0.5)}

    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch @ params["w"]) + params["b"] - y) ** 2)

    @jax.jit
    def slopes():
        grads_a, grads_b = (jax.grad(loss)(params, batch) for batch in x)

        def after(eta):
            stepped = jax.tree.map(lambda p, g: p - eta * g, params, grads_a)
            return loss(stepped, x[1])

        norms = optax.tree.norm(grads_a) * optax.tree.norm(grads_b)
        accordance = levels.gradient_accordance(grads_a, grads_b)
        return jax.grad(after)(0.0), -accordance * norms

    np.testing.assert_allclose(*slopes(), rtol=1e-5)


def test_gradient_accordance_edges():
    ones = {"w": jnp.ones(3), "n": None}
    accordance = levels.gradient_accordance
    assert accordance(ones, {"w": jnp.zeros(3), "n": None}) == 0
    assert accordance({"w": jnp.zeros(3), "n": None}, ones) == 0
    assert np.isnan(accordance(ones, {"w": jnp.array([1, jnp.nan, 0]), "n": None}))
    assert np.isnan(accordance(ones, {"w": jnp.array([1, jnp.inf, 0]), "n": None}))
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ones)
    assert accordance(halves, ones).dtype == jnp.float32
    np.testing.assert_allclose(accordance(halves, ones), 1.0, rtol=1e-6)
    # <a, b> of complex gradients is Re(conj(a) b): i and 1 are at right angles
    np.testing.assert_allclose(accordance(jnp.array([1j, 2]), jnp.array([1.0, 2])), 0.8)
    steps = {"w": jnp.ones(3), "step": jnp.int32(7)}
    np.testing.assert_allclose(accordance(steps, steps), 1.0, rtol=1e-6)
