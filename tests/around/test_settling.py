"""Flooding among optax's optimizers: which of them settle at the level."""

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

    start = (START, optimizer.init(START))
    return np.asarray(jax.lax.scan(step, start, length=steps)[1][-20:])


def reading(value, grad):
    del grad
    return {"value": value}


def searching(value, grad):
    return {"value": value, "grad": grad, "value_fn": objective}


SETTLING = {
    # name: (optimizer, its arguments, half width of the band around the level)
    "lbfgs": (lambda: flood(optax.lbfgs(), B), searching, 0.01),
    "sgd_backtracking": (
        lambda: flood(
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(30)),
            B,
        ),
        searching,
        0.01,
    ),
    "polyak_sgd": (lambda: flood(optax.polyak_sgd(f_min=B), B), reading, 1e-4),
    "momo": (lambda: flood(contrib.momo(lower_bound=B), B), reading, 1e-4),
    "momo_adam": (
        lambda: flood(contrib.momo_adam(0.1, lower_bound=B), B),
        reading,
        1e-4,
    ),
    "reduce_on_plateau_behind": (
        lambda: optax.chain(
            scale_by_flood(B),
            optax.sgd(0.1),
            contrib.reduce_on_plateau(factor=0.5, patience=5),
        ),
        reading,
        0.01,
    ),
    "reduce_on_plateau_inside": (
        lambda: flood(
            optax.chain(
                optax.sgd(0.1), contrib.reduce_on_plateau(factor=0.5, patience=5)
            ),
            B,
        ),
        reading,
        0.01,
    ),
    "sophia": (
        lambda: optax.chain(scale_by_flood(B), contrib.sophia(0.02)),
        lambda value, grad: {"value": value, "obj_fn": objective},
        0.15,
    ),
    "sam_transparent": (
        # one step in two is the adversarial excursion, of length .05
        lambda: optax.chain(
            scale_by_flood(B), optax.GradientTransformation(*sam(opaque_mode=False))
        ),
        reading,
        0.3,
    ),
    "sam_opaque": (
        lambda: optax.chain(scale_by_flood(B), taking_grad_fn(sam(opaque_mode=True))),
        lambda value, grad: {
            "value": value,
            "grad_fn": lambda params, _: jax.grad(BENT)(params),
        },
        0.15,
    ),
    "muon": (
        lambda: optax.chain(scale_by_flood(B), contrib.muon(0.02)),
        reading,
        0.1,
    ),
}


def sam(**options):
    adversary = optax.chain(contrib.normalize(), optax.sgd(0.05))
    return contrib.sam(optax.sgd(0.05), adversary, **options)


def taking_grad_fn(inner):
    """contrib.sam has no **extra_args: hand it grad_fn alone."""

    def update(updates, state, params=None, *, grad_fn=None, **extra_args):
        del extra_args
        return inner.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(inner.init, update)


@pytest.mark.parametrize("name", SETTLING)
def test_optimizer_settles_at_the_level(name):
    make, arguments, band = SETTLING[name]
    losses = late_losses(make(), arguments)
    assert float(objective(START)) < 0.72  # it has to climb to the level
    np.testing.assert_allclose(losses, B, atol=band)


@pytest.mark.parametrize(
    "wrap", ["inside", "in_front"], ids=["schedule_free(flood)", "flood, schedule_free"]
)
def test_schedule_free_settles_at_the_level_in_its_averaged_parameters(wrap):
    if wrap == "inside":
        inner = optax.chain(scale_by_flood(B), optax.sgd(0.1))
        optimizer = contrib.schedule_free(inner, 0.1)
        averaged = contrib.schedule_free_eval_params
    else:
        optimizer = optax.chain(scale_by_flood(B), contrib.schedule_free_sgd(0.1))

        def averaged(state, params):
            return contrib.schedule_free_eval_params(state[1], params)

    losses = late_losses(optimizer, reading, steps=400, at=averaged)
    np.testing.assert_allclose(losses, B, atol=0.02)


@pytest.mark.parametrize("name", ["lbfgs", "polyak_sgd", "momo", "sgd_backtracking"])
def test_flood_around_an_optimizer_that_reads_the_loss_equals_the_loss_form(name):
    make, arguments, _ = SETTLING[name]
    inner = {
        "lbfgs": optax.lbfgs,
        "polyak_sgd": lambda: optax.polyak_sgd(f_min=B),
        "momo": lambda: contrib.momo(lower_bound=B),
        "sgd_backtracking": lambda: optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(30)
        ),
    }[name]()

    def flooded_arguments(value, grad):
        given = arguments(value, grad)
        return given | ({"value_fn": BENT} if "value_fn" in given else {})

    wrapped = late_losses(make(), arguments, steps=20)
    by_loss = late_losses(inner, flooded_arguments, steps=20, loss_fn=BENT)
    np.testing.assert_allclose(wrapped, by_loss, rtol=1e-5)


# What the wrong composition does. These are facts about optax, pinned so that the
# documentation stays true.


def test_momo_behind_a_flood_in_the_chain_is_stuck_below_the_level():
    # it reads the raw loss, below its lower bound, and takes steps of length zero
    chained = optax.chain(scale_by_flood(B), contrib.momo(lower_bound=B))
    losses = late_losses(chained, reading)
    np.testing.assert_allclose(losses, objective(START), rtol=1e-6)


def test_polyak_sgd_with_minimum_zero_oscillates_and_differs_from_the_loss_form():
    chained = optax.chain(scale_by_flood(B), optax.polyak_sgd(f_min=0.0))
    wrapped = flood(optax.polyak_sgd(f_min=0.0), B)
    by_chain, by_wrapper = (late_losses(o, reading) for o in (chained, wrapped))
    by_loss = late_losses(optax.polyak_sgd(f_min=0.0), reading, loss_fn=BENT)
    assert np.ptp(by_wrapper) > 1.0
    np.testing.assert_allclose(by_wrapper, by_loss, rtol=1e-3)
    assert abs(by_chain.mean() - by_wrapper.mean()) > 0.1


def test_line_search_behind_a_flood_in_the_chain_is_refused():
    chained = optax.chain(scale_by_flood(B), optax.lbfgs())
    with pytest.raises(ValueError, match="it would search on the raw loss"):
        late_losses(chained, searching)


def test_opaque_sam_with_a_raw_grad_fn_does_not_flood():
    # its steps come from grad_fn, not from the flooded updates
    optimizer = optax.chain(scale_by_flood(B), taking_grad_fn(sam(opaque_mode=True)))

    def raw(value, grad):
        del grad
        return {"value": value, "grad_fn": lambda p, _: jax.grad(objective)(p)}

    assert (late_losses(optimizer, raw) < 0.05).all()
