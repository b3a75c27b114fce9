"""Patterns of optax's own examples whose gradients are not those of the loss.

docs/trainers.md lists more: the others are in test_settling.py, test_composition.py and
test_accumulation.py. With the line the raw loss stays at the level, some steps being
below it and some not; with the level at -inf the same program ends below it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax import contrib

from flood_optax import flooded, scale_by_flood

B, STEPS, LATE = 0.06, 400, 100  # the level; the late steps are the last of all
KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (32, 3))
Y = jnp.sin(2 * X[:, 0]) * X[:, 1] + 0.3 * X[:, 2] ** 2
PARAMS = {
    "hidden": {"w": jax.random.normal(KEYS[1], (3, 16)), "b": jnp.linspace(-1, 1, 16)},
    "out": {"w": jax.random.normal(KEYS[2], (16,)) / 4, "b": jnp.zeros([])},
}


def predict(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return hidden @ params["out"]["w"] + params["out"]["b"]


def loss_fn(params, x=X, y=Y):
    return jnp.mean((predict(params, x) - y) ** 2)


def scanned(optimizer, step, steps=STEPS):
    """The raw losses of all steps: `step` gives the updates, the state and the loss."""

    def body(carry, _):
        params, state = carry
        updates, state, loss = step(params, state)
        return (optax.apply_updates(params, updates), state), loss

    start = (PARAMS, optimizer.init(PARAMS))
    return lax.scan(body, start, length=steps)[1]


# ---- the patterns: level -> raw losses ----


def dp_sgd(level, per_example_loss=loss_fn):
    private = contrib.differentially_private_aggregate(
        l2_norm_clip=1.0, noise_multiplier=0.05, key=jax.random.key(1)
    )
    optimizer = optax.chain(private, scale_by_flood(level), optax.sgd(0.1))
    per_example = jax.vmap(jax.grad(per_example_loss), (None, 0, 0))

    def step(params, state):
        value, grads = loss_fn(params), per_example(params, X, Y)
        updates, state = optimizer.update(grads, state, params, value=value)
        return updates, state, value

    return scanned(optimizer, step, steps=1500)


def attacked(function, params):
    return X + 0.05 * jnp.sign(jax.grad(function, argnums=1)(params, X, Y))


def adversarial(level, attacking_loss=loss_fn):
    optimizer = optax.adam(0.02)

    def step(params, state):
        x = attacked(attacking_loss, params)
        grads = jax.grad(flooded(loss_fn, level))(params, x, Y)
        updates, state = optimizer.update(grads, state, params)
        return updates, state, loss_fn(params, attacked(loss_fn, params), Y)

    return scanned(optimizer, step)


# ---- a language model with one block ----


PATTERNS = {"dp_sgd": dp_sgd, "adversarial": adversarial}


def late(compiled, level):
    return np.asarray(compiled(jnp.float32(level)))[-LATE:]


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_settles_at_the_level_and_ends_below_it_without_flooding(name):
    pattern = jax.jit(PATTERNS[name])
    losses, plain = late(pattern, B), late(pattern, -np.inf)
    assert losses.mean() == pytest.approx(B, rel=0.1)
    assert 0.25 < (losses < B).mean() < 0.75
    assert plain.max() < 0.8 * B


# ---- why the line belongs where it is ----


def test_adversarial_training_whose_attack_is_flooded_too_stays_above_the_level():
    """Below the level the attack helps the loss, so training fights no attack."""

    @jax.jit
    def shared(level):
        return adversarial(level, attacking_loss=flooded(loss_fn, level))

    assert late(shared, B).min() > 1.1 * B


def test_dp_sgd_with_a_flooded_loss_per_example_stays_above_the_level():
    """Half of the examples pull upwards at any time, whatever their mean is."""

    @jax.jit
    def per_example(level):
        return dp_sgd(-jnp.inf, per_example_loss=flooded(loss_fn, level))

    assert late(per_example, B).min() > 1.1 * B
