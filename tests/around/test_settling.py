"""Flooding among optax's optimizers: which of them settle at the level."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from flood_optax import flood, flooded, scale_by_flood

# ---- settling: the objective is convex, asymmetric, its minimum 0, its start .709 ----

B = 1.0
C = jnp.array([1.0, 0.5, 2.0])
START = jnp.array([0.8, -1.0, 0.3])


def objective(w):
    return jnp.sum(C * (jnp.exp(w) - w - 1.0))


BENT = flooded(objective, B)


def late_losses(optimizer, arguments, steps=200, loss_fn=objective, at=None):
    """Raw losses of the last 20 steps, at the params or at what `at` makes of them."""

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss_fn)(params)
        given = arguments(value, grad)
        updates, state = optimizer.update(grad, state, params, **given)
        params = optax.apply_updates(params, updates)
        return (params, state), objective(at(state, params) if at else params)

    def run():
        start = START, optimizer.init(START)
        return jax.lax.scan(step, start, length=steps)[1][-20:]

    return np.asarray(jax.jit(run)())


def reading(value, grad):
    del grad
    return {"value": value}


def searching(value, grad):
    return {"value": value, "grad": grad, "value_fn": objective}


def sam(**options):
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
    return contrib.sam(optax.sgd(0.05), adversary, **options)


def taking_grad_fn(inner):
    """contrib.sam has no **extra_args: hand it grad_fn alone."""

    def update(updates, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args
        return inner.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def plateau():
    return contrib.reduce_on_plateau(factor=0.5, patience=5)


def behind(inner):
    return optax.chain(scale_by_flood(B), inner)


READERS = {
    # optimizers that read the value: how, and half the width around the level
    "lbfgs": (optax.lbfgs, searching, 0.01),
    "sgd_backtracking": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(30)),
        *(searching, 0.01),
    ),
    "polyak_sgd": (lambda: optax.polyak_sgd(f_min=B), reading, 1e-4),
    "momo": (lambda: contrib.momo(lower_bound=B), reading, 1e-4),
    "momo_adam": (lambda: contrib.momo_adam(0.1, lower_bound=B), reading, 1e-4),
    "reduce_on_plateau_inside": (
        lambda: optax.chain(optax.sgd(0.1), plateau()),
        *(reading, 0.01),
    ),
}
SETTLING = {
    name: (lambda make=make: flood(make(), B), arguments, band)
    for name, (make, arguments, band) in READERS.items()
} | {
    "reduce_on_plateau_behind": (
        lambda: optax.chain(scale_by_flood(B), optax.sgd(0.1), plateau()),
        *(reading, 0.01),
    ),
    "sophia": (
        lambda: behind(contrib.sophia(0.02)),
        lambda value, grad: {"value": value, "obj_fn": objective},
        0.15,
    ),
    # one step in two is the adversarial excursion, of length .05
    "sam_transparent": (
        lambda: behind(optax.GradientTransformation(*sam(opaque_mode=False))),
        *(reading, 0.3),
    ),
    "sam_opaque": (
        lambda: behind(taking_grad_fn(sam(opaque_mode=True))),
        lambda value, grad: {
            "value": value,
            "grad_fn": lambda params, _: jax.grad(BENT)(params),
        },
        0.15,
    ),
    "muon": (lambda: behind(contrib.muon(0.02)), reading, 0.1),
}


@pytest.mark.parametrize("name", SETTLING)
def test_optimizer_settles_at_the_level(name):
    make, arguments, band = SETTLING[name]
    losses = late_losses(make(), arguments)
    assert float(objective(START)) < 0.72  # it has to climb to the level
    np.testing.assert_allclose(losses, B, atol=band)


def averaged(state, params):
    return contrib.schedule_free_eval_params(state, params)


AVERAGED = {
    "schedule_free(flood)": (
        contrib.schedule_free(behind(optax.sgd(0.1)), 0.1),
        averaged,
    ),
    "flood, schedule_free": (
        behind(contrib.schedule_free_sgd(0.1)),
        lambda state, params: averaged(state[1], params),
    ),
}


@pytest.mark.parametrize("name", AVERAGED)
def test_schedule_free_settles_at_the_level_in_its_averaged_parameters(name):
    optimizer, at = AVERAGED[name]
    losses = late_losses(optimizer, reading, steps=400, at=at)
    np.testing.assert_allclose(losses, B, atol=0.02)


@pytest.mark.parametrize("name", ["lbfgs", "polyak_sgd", "momo", "sgd_backtracking"])
def test_flood_around_an_optimizer_that_reads_the_loss_equals_the_loss_form(name):
    make, arguments, _ = READERS[name]

    def flooded_arguments(value, grad):
        given = arguments(value, grad)
        return given | ({"value_fn": BENT} if "value_fn" in given else {})

    wrapped = late_losses(flood(make(), B), arguments, steps=20)
    by_loss = late_losses(make(), flooded_arguments, steps=20, loss_fn=BENT)
    np.testing.assert_allclose(wrapped, by_loss, rtol=1e-5)


# What the wrong composition does. These are facts about optax, pinned so that the
# documentation stays true.


def test_momo_behind_a_flood_in_the_chain_is_stuck_below_the_level():
    # it reads the raw loss, below its lower bound, and takes steps of length zero
    losses = late_losses(behind(contrib.momo(lower_bound=B)), reading)
    np.testing.assert_allclose(losses, objective(START), rtol=1e-6)


def test_polyak_sgd_with_minimum_zero_oscillates_and_differs_from_the_loss_form():
    chained = behind(optax.polyak_sgd(f_min=0.0))
    wrapped = flood(optax.polyak_sgd(f_min=0.0), B)
    # the first steps: later ones are chaotic, and others on another processor
    losses = functools.partial(late_losses, arguments=reading, steps=20)
    by_chain, by_wrapper = losses(chained), losses(wrapped)
    by_loss = losses(optax.polyak_sgd(f_min=0.0), loss_fn=BENT)
    assert np.ptp(by_wrapper) > 1.0
    np.testing.assert_allclose(by_wrapper, by_loss, rtol=1e-3)
    assert np.abs(by_chain - by_wrapper).max() > 1.0


def test_line_search_behind_a_flood_in_the_chain_is_refused():
    with pytest.raises(ValueError, match="it would search on the raw loss"):
        late_losses(behind(optax.lbfgs()), searching)


def test_opaque_sam_with_a_raw_grad_fn_does_not_flood():
    # its steps come from grad_fn, not from the flooded updates
    optimizer = behind(taking_grad_fn(sam(opaque_mode=True)))

    def raw(value, grad):
        del grad
        return {"value": value, "grad_fn": lambda p, _: jax.grad(objective)(p)}

    assert (late_losses(optimizer, raw) < 0.05).all()
