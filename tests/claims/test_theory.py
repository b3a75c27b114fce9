"""What flooding does, exactly and in the limit: docs/theory.md, claim by claim.

The oracles are double backward, dense Hessians, an adaptive ODE solver and closed
forms; the flooded runs are made by the library.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings, strategies as st
from jax.flatten_util import ravel_pytree
from scipy import stats

from flood_optax import flood_mean, flooded, penalty, scale_by_flood, shapes
from tests import forms
from tests.marks import slow_but

RNG = np.random.default_rng(11)
INPUTS, NOISE = RNG.normal(size=(30, 3)), RNG.normal(size=30)
TARGETS = np.sin(INPUTS @ [1.0, -1.5, 0.5]) + 0.3 * NOISE


class TanhMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, param_dtype=jnp.float64)(x))
        return nn.Dense(1, param_dtype=jnp.float64)(x)[..., 0]


def tanh_mlp():
    model = TanhMLP()
    params = model.init(jax.random.key(2), INPUTS)
    return lambda p: jnp.mean((model.apply(p, INPUTS) - TARGETS) ** 2), params


def logistic_regression():
    signs = np.sign(TARGETS)  # not separable: the minimum is finite

    def loss_fn(p):
        return jnp.mean(jax.nn.softplus(-signs * (INPUTS @ p["w"] + p["b"])))

    return loss_fn, {"w": jnp.array([0.9, 0.4, -0.8]), "b": jnp.array(-0.5)}


def quartic():
    """Not convex: its Hessian has eigenvalues of both signs at the start."""

    def loss_fn(w):
        x, y, z = w
        return 0.25 * (x**2 - y) ** 2 + 0.5 * (x - 1) ** 2 * z + 0.1 * z**4 + y * z

    return loss_fn, jnp.array([0.4, -0.6, 0.8])


class Problem(NamedTuple):
    """A loss of one vector, where to start, and its compiled gradients."""

    loss_fn: Callable
    start: np.ndarray
    raw: Callable  # w -> value and gradient
    step: Callable  # w, level, eta -> after a step of the flooded loss
    by_optax: Callable  # the same, by the optax form
    curved: Callable  # w -> H g, as the gradient of |g|^2 / 2


@functools.cache
def vector_problem(make):
    loss_of_tree, params = make()
    start, unravel = ravel_pytree(params)
    loss_fn = lambda w: loss_of_tree(unravel(w))
    gradient = jax.grad(loss_fn)

    @jax.jit
    def step(w, level, eta):
        return w - eta * jax.grad(flooded(loss_fn, level))(w)

    @jax.jit
    def by_optax(w, level, eta):
        optimizer = optax.chain(scale_by_flood(level), optax.sgd(eta))
        params = unravel(w)
        value, grads = jax.value_and_grad(loss_of_tree)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), value=value)
        return ravel_pytree(optax.apply_updates(params, updates))[0]

    curved = jax.jit(jax.grad(lambda w: 0.5 * jnp.sum(gradient(w) ** 2)))
    raw = jax.jit(jax.value_and_grad(loss_fn))
    return Problem(loss_fn, np.asarray(start), raw, step, by_optax, curved)


@pytest.fixture(
    params=slow_but(
        [logistic_regression, quartic], [tanh_mlp, logistic_regression, quartic]
    )
)
def problem(request, x64):
    return vector_problem(request.param)


def level_between(problem, eta, order):
    """A level such that the first step goes the way `order` says."""
    loss, g = problem.raw(problem.start)
    after = problem.raw(problem.start - (eta if order == "down-up" else -eta) * g)[0]
    assert (loss > after) == (order == "down-up")
    return (loss + after) / 2


def pair(problem, eta, order, form="step"):
    """How far two flooded steps move."""
    level, w = level_between(problem, eta, order), problem.start
    for _ in range(2):
        w = np.asarray(getattr(problem, form)(w, level, eta))
    return w - problem.start


ORDERS = {"down-up": "backward", "up-down": "forward"}


@pytest.mark.parametrize("form", ["step", "by_optax"], ids=["loss", "optax"])
@pytest.mark.parametrize("order", ORDERS)
def test_flooded_pair_is_one_step_along_a_finite_difference(problem, order, form):
    """Of size eta^2 and radius eta, to the rounding of the parameters."""
    eta, w = 0.02, problem.start
    moved, g = pair(problem, eta, order, form), lambda w: np.asarray(problem.raw(w)[1])
    if order == "down-up":
        difference = (g(w) - g(w - eta * g(w))) / eta
    else:
        difference = (g(w + eta * g(w)) - g(w)) / eta
    rounding = 8 * np.spacing(np.abs(w).max())
    assert np.linalg.norm(moved) > 1e5 * rounding
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=rounding)
    close(moved, -(eta**2) * difference)
    _, penalised = jax.jit(
        penalty.value_and_grad(
            problem.loss_fn, eta**2, method=ORDERS[order], radius=eta
        )
    )(w)
    close(moved, g(w) - penalised)
    if order == "down-up":
        by_library = jax.jit(penalty.pair_displacement, static_argnums=0)
        close(moved, by_library(problem.loss_fn, w, eta))


@pytest.mark.parametrize("order", ORDERS)
def test_flooded_pair_differs_from_the_penalty_at_third_order(problem, order):
    """|pair + eta^2 H g| over three decades of eta, H g by double backward."""
    product = np.asarray(problem.curved(problem.start))
    etas = np.logspace(-4, -1, 7)
    distances = [
        np.linalg.norm(pair(problem, eta, order) + eta**2 * product) for eta in etas
    ]
    slope = np.polyfit(np.log(etas), np.log(distances), 1)[0]
    assert abs(slope - 3) < 0.05
    assert distances[0] < 1e-3 * etas[0] ** 2 * np.linalg.norm(product)


def project(loss_fn, w, level):
    """Newton's method along the gradient."""

    def step(_, w):
        loss, g = jax.value_and_grad(loss_fn)(w)
        return w - (loss - level) * g / (g @ g)

    return jax.lax.fori_loop(0, 12, step, w)


def reference_flow(loss_fn, w, times):
    """Solves dw/dtau = -P_T H g with the dense Hessian."""

    def field(_, w, __):
        g, hessian = jax.grad(loss_fn)(w), jax.hessian(loss_fn)(w)
        projection = jnp.eye(w.size) - jnp.outer(g, g) / (g @ g)
        return -projection @ hessian @ g

    return diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri5(),
        t0=0.0,
        t1=times[-1],
        dt0=None,
        y0=w,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-11),
    ).ys


def flooded_run(loss_fn, level, w, eta, steps):
    """Flooded SGD, seen five times after so many steps each."""
    gradient = jax.grad(flooded(loss_fn, level))

    def stretch(w, _):
        w = jax.lax.fori_loop(0, steps, lambda _, w: w - eta * gradient(w), w)
        return w, w

    return jax.lax.scan(stretch, w, length=5)[1]


LEAN = 0.4


def bowl(w):
    """Steeper on the right."""
    return 0.5 * (1 + LEAN * w[0]) * (w @ w)


def leaning_bowl():
    return bowl, jnp.array([0.6, 0.8])


# For each loss how long to follow the flow, and the largest learning rate.
LONG_RUNS = {
    "leaning_bowl": (leaning_bowl, 4, 0.1),
    "logistic_regression": (logistic_regression, 60, 0.5),
    "tanh_mlp": (tanh_mlp, 0.5, 0.04),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_RUNS)
def test_flooded_sgd_follows_the_penalty_flow_on_the_level_set(x64, name):
    """Seen at tau = steps eta^2 / 2, on the level set: their distance is O(eta^2)."""
    make, duration, eta = LONG_RUNS[name]
    loss_fn, w, raw, *_ = vector_problem(make)
    level = float(raw(w)[0])
    times = np.linspace(0, duration, 6)[1:]
    onto = jax.jit(jax.vmap(lambda w: project(loss_fn, w, level)))
    run = jax.jit(functools.partial(flooded_run, loss_fn, level))
    flow = onto(jax.jit(reference_flow, static_argnums=0)(loss_fn, w, times))
    etas, errors = eta / 2.0 ** np.arange(4), []
    for rate in etas:
        seen = np.asarray(onto(run(w, rate, round(times[0] * 2 / rate**2))))
        errors.append(np.linalg.norm(seen - flow, axis=1).max())
    order = np.polyfit(np.log(etas), np.log(errors), 1)[0]
    assert 1.6 < order < 2.4, (order, errors)
    assert errors[-1] < 1e-3 * np.linalg.norm(flow[-1] - w)
    squared = [np.sum(np.square(raw(point)[1])) for point in (w, *seen)]
    assert (np.diff(squared) < 0).all(), squared
    assert squared[-1] < 0.97 * squared[0]


def test_flattest_point_of_the_level_set_is_where_the_page_finds_the_iterate(x64):
    """On {L = b}, |g|^2 = 2b (1 + 2kx) + (kb / (1 + kx))^2: least at the left end."""
    level, k = 0.45, LEAN
    # (1 + kx) x^2 = 2b there: the iterate of the page's code swings around it
    left = -1.5
    assert 0.5 * (1 + k * left) * left**2 == pytest.approx(level, rel=1e-15)
    directions = np.linspace(0, 2 * np.pi, 1001)
    rim = np.stack([np.cos(directions), np.sin(directions)], 1)
    onto = jax.jit(jax.vmap(lambda w: project(bowl, w, level)))
    points = np.asarray(onto(rim))
    squared = np.sum(np.square(jax.jit(jax.vmap(jax.grad(bowl)))(points)), axis=1)
    along = 1 + k * points[:, 0]
    closed_form = 2 * level * (2 * along - 1) + (k * level / along) ** 2
    np.testing.assert_allclose(squared, closed_form, rtol=1e-9)
    np.testing.assert_allclose(points[squared.argmin()], [left, 0], atol=1e-2)


def in_batches():
    """A tanh net on 64 points in eight batches; None is all of them."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 8, 4)), rng.normal(size=(8, 8))
    y = jnp.asarray(np.sin(x @ [1.0, -1.0, 0.5, 0.0]) + 0.3 * y)

    def loss_fn(w, batch=None):
        inputs, targets = (x, y) if batch is None else (jnp.asarray(x)[batch], y[batch])
        first, second = w[:-3].reshape(4, 3), w[-3:]
        return jnp.mean((jnp.tanh(inputs @ first) @ second - targets) ** 2) / 2

    return loss_fn, 0.7 * rng.normal(size=15), np.arange(8)


def test_pairs_on_one_mini_batch_penalise_the_mean_of_its_squared_gradient(x64):
    """Twice the same batch: -eta^2 E[H_B g_B], the gradient of E|g_B|^2 / 2."""
    (loss_fn, w, batches), eta = in_batches(), 1e-4

    def mean_square(w):
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(w, batches)
        return 0.5 * jnp.mean(jnp.sum(gradients**2, axis=1))

    pair = lambda i: penalty.pair_displacement(loss_fn, w, eta, i)
    pairs = jax.jit(jax.vmap(pair))(batches)
    expected = -(eta**2) * jax.jit(jax.grad(mean_square))(w)
    np.testing.assert_allclose(pairs.mean(0), expected, rtol=0, atol=2e-3 * eta**2)


def test_flooded_mini_batches_move_at_first_order_in_the_learning_rate(x64):
    """The mean step at the level is -eta grad E|L_B - b|; tangent to it, eta^0 of it.

    So it dwarfs eta/2 |P_T H g|, the penalty's drift: the ratio grows as 1 / eta.
    """
    loss_fn, w, batches = in_batches()
    level, g = map(np.asarray, jax.jit(jax.value_and_grad(loss_fn))(w))

    @jax.jit
    def mean_step(w):
        each = jax.vmap(jax.grad(flooded(loss_fn, level)), (None, 0))(w, batches)
        return each.mean(0), penalty.level_set_drift(loss_fn, w)

    def bound(w):
        losses = jax.vmap(loss_fn, (None, 0))(w, batches)
        return jnp.mean(jnp.abs(losses - level) + level)

    step, drift = map(np.asarray, mean_step(w))
    np.testing.assert_allclose(step, jax.jit(jax.grad(bound))(w), rtol=1e-12)
    tangent = step - g * (g @ step) / (g @ g)
    assert np.linalg.norm(tangent) > 1.0 * np.linalg.norm(drift)


MEAN, SIZE, DRAWS = 0.3, 5, 200_000  # protocol: losses Exp(0.3), five of them
EXACT = {
    0.20: 4.9404e-03,
    0.25: 5.6985e-03,
    0.30: 0.0,
    0.35: -1.6810e-02,
    0.45: -9.7802e-02,
}


FLOODED_BATCHES = jax.jit(jax.vmap(flood_mean, (0, None)))


def mean_gain(level):
    """4 (R - b) E[(b - Rh)+] in closed form, Rh ~ Gamma(SIZE, MEAN / SIZE)."""
    scale = MEAN / SIZE
    below = level * stats.gamma.cdf(level, SIZE, scale=scale)
    below -= MEAN * stats.gamma.cdf(level, SIZE + 1, scale=scale)
    return 4 * (MEAN - level) * below


@pytest.mark.parametrize("level", EXACT)
def test_theorem_1_is_an_identity(x64, level):
    """MSE(Rh) - MSE(Rt) = 4 (R - b) E[(b - Rh)+], draw by draw and in the mean."""
    losses = np.random.default_rng(5).exponential(MEAN, (DRAWS, SIZE))
    empirical = losses.mean(1)
    estimate = FLOODED_BATCHES(losses, level)
    gain = (empirical - MEAN) ** 2 - (np.asarray(estimate) - MEAN) ** 2
    identity = 4 * (MEAN - level) * np.maximum(level - empirical, 0)
    np.testing.assert_allclose(gain, identity, rtol=0, atol=1e-14)
    exact = mean_gain(level)
    np.testing.assert_allclose(exact, EXACT[level], rtol=1e-4, atol=1e-17)
    standard_error = gain.std() / DRAWS**0.5
    assert abs(gain.mean() - exact) <= 4 * standard_error + 1e-15
    if level != MEAN:  # the sign of the theorem, and of its converse
        assert np.sign(gain.mean()) == np.sign(MEAN - level)
        assert standard_error < 0.02 * abs(exact)


LOSSES = st.lists(st.floats(-2, 5), min_size=24, max_size=24)


@pytest.mark.parametrize("shape", forms.SHAPES.values(), ids=forms.SHAPES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(losses=LOSSES, level=st.floats(-3, 6))
def test_jensen_full_batch_below_mini_batches_below_examples(shape, losses, level):
    losses = np.float32(losses)
    full, mini, single = np.asarray(jensen(losses, level, shape, 6))
    assert full <= mini + 1e-5
    assert mini <= single + 1e-5
    signs = np.sign(losses - np.float32(level))
    if shape is forms.SHAPES["reflect"] and (signs == signs[0]).all():
        np.testing.assert_allclose([mini, single], full, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnums=(2, 3))
def jensen(losses, level, shape, parts):
    """The full batch, the mean of so many mini-batches, and that of the examples."""
    flooded_mean = functools.partial(flood_mean, level=level, shape=shape)
    return jnp.stack(
        [
            flooded_mean(losses),
            jax.vmap(flooded_mean)(losses.reshape(parts, -1)).mean(),
            flooded_mean(losses, over="example"),
        ]
    )


def test_jensen_is_strict_where_losses_lie_on_both_sides():
    losses = np.float32(np.random.default_rng(0).uniform(size=1000))
    full, mini, single = np.asarray(jensen(losses, 0.5, shapes.reflect(), 10))
    assert full < mini < single
    np.testing.assert_allclose(single, 0.75, atol=0.02)  # E|U - 1/2| + 1/2
