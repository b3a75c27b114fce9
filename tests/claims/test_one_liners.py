"""What the one-liners do, each in the table of the README, next to the library."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flood_optax
from flood_optax import flood, scale_by_flood


def test_one_liner_of_nan_ascends_where_ours_keeps_the_nan():
    def naive(loss):
        return jnp.abs(loss - 0.2) + 0.2

    assert jax.grad(naive)(jnp.nan) == -1
    assert jnp.isnan(jnp.sign(jnp.nan - 0.2))
    assert jnp.isnan(jax.grad(lambda loss: flood_optax.flood_loss(loss, 0.2))(jnp.nan))


def test_one_liner_abs_is_nan_without_a_level_and_rounds_negative_losses():
    b = -jnp.inf
    assert jnp.isnan(jnp.abs(1.0 - b) + b)
    assert (
        jax.grad(lambda loss: jnp.abs(loss - b) + b)(1.0) == 1
    )  # the gradient is fine
    assert jnp.sign(1.0 - b) == 1
    rng = np.random.default_rng(0)
    for level, low, high, share in ((-1.0, -1.0, 2.0, 0.5), (0.2, 0.2, 5.0, 0.005)):
        above = jnp.float32(rng.uniform(low, high, 100_000))
        naive = jnp.abs(above - jnp.float32(level)) + jnp.float32(level)
        changed = np.mean(np.asarray(naive != above))
        assert 0.5 * share < changed < 1.1 * share
        ours = flood_optax.flood_loss(above, level)
        np.testing.assert_array_equal(ours, above)


def test_one_liner_sign_broadcasts_a_value_per_example_and_promotes():
    grads = jnp.ones((4, 3), jnp.bfloat16)
    flipped = jnp.sign(jnp.array([0.1, 0.3, 0.1]) - 0.2) * grads
    np.testing.assert_array_equal(flipped[0], [-1, 1, -1])  # per coordinate
    assert flipped.dtype == jnp.float32
    assert (jnp.sign(jnp.float32(0.2) - jnp.float32(0.2)) * grads == 0).all()
    transform = scale_by_flood(0.2)
    with pytest.raises(ValueError, match="value"):
        transform.update(grads, transform.init(grads), value=jnp.array([0.1, 0.3, 0.1]))
    updates, _ = transform.update(grads, transform.init(grads), value=jnp.float32(0.1))
    assert updates.dtype == jnp.bfloat16


def test_step_that_climbs_can_explode_where_plain_training_converges():
    def ends(loss_fn):
        w, losses = jnp.float32(0.9), []
        for _ in range(4):
            w -= 0.4 * jax.grad(loss_fn)(w)
            losses.append(float(w**4))
        return losses

    quartic = lambda w: w**4
    assert ends(quartic)[-1] < 0.002
    np.testing.assert_allclose(
        ends(flood_optax.flooded(quartic, 0.9))[:2], [18.233, 21092.7], rtol=1e-4
    )
    assert ends(flood_optax.flooded(quartic, 0.9))[-1] == np.inf


def naive_sign(level):
    """The one-liner as a transformation."""

    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: jnp.sign(value - level) * u, updates), state

    init = lambda params: optax.EmptyState()
    return optax.GradientTransformationExtraArgs(init, update)


def test_one_liners_under_accumulation():
    values = jnp.array([1.0, 0.4, 0.3, 0.2])  # each the gradient as well

    def window(transform):
        optimizer = optax.MultiSteps(optax.chain(transform, optax.sgd(1.0)), 4)
        w = jnp.zeros(())
        state = optimizer.init(w)
        for value in values:
            update, state = optimizer.update(value, state, w, value=value)
        return float(update)

    assert window(naive_sign(0.35)) == pytest.approx(0.475)
    slopes = jax.vmap(jax.grad(lambda loss: jnp.abs(loss - 0.35) + 0.35))(values)
    each = optax.MultiSteps(optax.sgd(1.0), 4)
    state = each.init(jnp.zeros(()))
    for slope, value in zip(slopes, values, strict=True):
        update, state = each.update(slope * value, state, jnp.zeros(()))
    assert float(update) == pytest.approx(-0.225)


def test_one_liners_with_lbfgs_started_below_the_level():
    def quartic(w):  # steeper in one direction
        return jnp.sum(w**2 * jnp.array([1.0, 4.0])) + w[0] ** 4

    def end(optimizer, function):
        def body(carry, _):
            w, state = carry
            value, grad = jax.value_and_grad(function)(w)
            updates, state = optimizer.update(
                grad, state, w, value=value, grad=grad, value_fn=function
            )
            return (optax.apply_updates(w, updates), state), None

        start = jnp.array([0.5, -0.5])
        (w, _), _ = jax.lax.scan(body, (start, optimizer.init(start)), length=60)
        return float(quartic(w))

    def bent(w):
        return jnp.abs(quartic(w) - 10.0) + 10.0

    assert quartic(jnp.array([0.5, -0.5])) < 1.4
    assert abs(end(optax.lbfgs(), bent) - 10.0) < 0.01
    assert abs(end(flood(optax.lbfgs(), 10.0), quartic) - 10.0) < 0.01
    assert end(optax.chain(naive_sign(10.0), optax.lbfgs()), quartic) < 0.01
