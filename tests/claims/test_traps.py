"""What the obvious code does, in numbers: docs/traps.md; one-liners of the README."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flood_optax import flood, flood_loss, flood_mean, flooded, scale_by_flood, shapes

# A regression whose loss falls from .1 to .002, steeper in one direction than another.
X = np.random.default_rng(0).normal(size=(64, 3)) * [1.0, 0.5, 0.2]
Y = X @ [1.0, -2.0, 0.5] + 0.05 * np.random.default_rng(1).normal(size=64)
START = np.float32([0.8, -1.5, 0.0])
LEVEL, RATE = 0.04, 0.2


def losses(w, x=X, y=Y):
    return (jnp.asarray(x) @ w - jnp.asarray(y)) ** 2


def loss_fn(w, x=X, y=Y):
    return losses(w, x, y).mean()


def numpy_loss(w, x=X, y=Y):
    return np.mean((x @ np.float64(w) - y) ** 2)


def descend(optimizer, step, steps=400):
    """Trains; returns the raw loss at every step, last parameters and state."""

    def body(carry, _):
        w, state = carry
        value, grads = step(w)
        updates, state = optimizer.update(grads, state, w, value=value)
        return (optax.apply_updates(w, updates), state), loss_fn(w)

    def whole():
        start = jnp.asarray(START)
        return jax.lax.scan(body, (start, optimizer.init(start)), length=steps)

    (w, state), curve = jax.device_get(jax.jit(whole)())
    return curve, w, state


def chain(level, *more, rate=RATE, **options):
    return optax.chain(scale_by_flood(level, **options), *more, optax.sgd(rate))


def share_below(state):
    steps = optax.tree.get(state, "flood_step")
    return float(optax.tree.get(state, "flood_below") / steps)


raw_step = jax.value_and_grad(loss_fn)


@functools.cache
def plain():
    return descend(optax.with_extra_args_support(optax.sgd(RATE)), raw_step)[0]


# ---- what to read in flood_below: the table of the page, and that of one flood ----


def flooded_gradient(w):
    return loss_fn(w), jax.grad(flooded(loss_fn, LEVEL))(w)


def flooded_value(w):
    return flooded(loss_fn, LEVEL)(w), jax.grad(loss_fn)(w)


def of_another_batch(w):
    """The labels of the other half are shifted: its loss cannot fall below .25."""
    value = loss_fn(w, X[32:], Y[32:] + 0.5)
    return value, jax.grad(loss_fn)(w, X[:32], Y[:32])


HIGH = 1.02 * numpy_loss(START)
COURSES = {  # optimizer, step, steps; the share of steps below, where the raw loss ends
    "at the level": (chain(LEVEL), raw_step, 400, (0.4, 0.55), (LEVEL, 0.01)),
    "not reached": (chain(1e-4), raw_step, 400, (0, 0), "bit for bit plain"),
    "above the start": (chain(HIGH), raw_step, 20, (0.4, 0.65), (HIGH, HIGH / 2)),
    "both forms": (chain(LEVEL), flooded_gradient, 400, (0.95, 1), "plain"),
    "two in a chain": (
        *(chain(LEVEL, scale_by_flood(LEVEL)), raw_step, 400),
        *((0, 1), "bit for bit plain"),
    ),
    "the value of the loss form": (
        *(chain(LEVEL), jax.value_and_grad(flooded(loss_fn, LEVEL)), 400),
        *((0, 0), (LEVEL, 0.01)),
    ),
    "the flooded value alone": (chain(LEVEL), flooded_value, 400, (0, 0), "plain"),
    "another batch": (chain(LEVEL), of_another_batch, 400, (0, 0), None),
    "a sum": (
        *(chain(1.0, rate=RATE / 64), jax.value_and_grad(lambda w: losses(w).sum())),
        *(400, (0.4, 0.6), (1 / 64, 0.003)),
    ),
    "pause": (
        *(chain(LEVEL, shape=shapes.pause()), raw_step, 400),
        *((0.95, 1), (0.75 * LEVEL, 0.25 * LEVEL)),
    ),
}


@pytest.mark.parametrize("name", COURSES)
def test_share_below_and_raw_loss_tell_what_happened(name):
    optimizer, step, steps, (least, most), end = COURSES[name]
    curve, w, state = descend(optimizer, step, steps)
    if name != "two in a chain":
        assert least <= share_below(state) <= most
    if end == "plain":
        np.testing.assert_allclose(curve, plain(), rtol=1e-5)
        assert curve[-1] < LEVEL / 10
    elif end == "bit for bit plain":
        np.testing.assert_array_equal(curve, plain())
    elif end is None:
        assert numpy_loss(w, X[:32], Y[:32]) < LEVEL / 10
    else:
        assert abs(curve[-50:].mean() - end[0]) < end[1]
    if name == "both forms":
        assert share_below(state) == pytest.approx(np.mean(plain() < LEVEL), abs=1e-6)
    if name == "above the start":
        assert curve.min() > 0.5 * HIGH  # it does not train


# ---- one-liners ----


def test_one_liner_of_nan_ascends_where_ours_keeps_the_nan():
    naive = jax.jit(jax.grad(lambda loss: jnp.abs(loss - 0.2) + 0.2))
    assert naive(np.nan) == -1
    assert np.isnan(jax.jit(jax.grad(lambda loss: flood_loss(loss, 0.2)))(np.nan))


def test_one_liner_sign_broadcasts_a_value_per_example_promotes_and_stops_at_b():
    grads = np.ones((4, 3), jnp.bfloat16)
    flip = jax.jit(lambda value: jnp.sign(value - np.float32(0.2)) * grads)
    flipped = flip(np.float32([0.1, 0.3, 0.1]))
    np.testing.assert_array_equal(flipped[0], [-1, 1, -1])  # per coordinate
    assert flipped.dtype == np.float32
    assert (np.asarray(flip(np.float32(0.2))) == 0).all()


def test_step_that_climbs_can_explode_where_plain_training_converges():
    def ends(loss_fn):
        w, seen, slope = np.float32(0.9), [], jax.jit(jax.grad(loss_fn))
        with np.errstate(over="ignore"):
            for _ in range(4):
                w -= np.float32(0.4) * np.asarray(slope(w))
                seen.append(w**4)
        return seen

    quartic = lambda w: w**4
    assert ends(quartic)[-1] < 0.002
    bent = ends(flooded(quartic, 0.9))
    np.testing.assert_allclose(bent[:2], [18.233, 21092.7], rtol=1e-4)
    assert bent[-1] == np.inf


@pytest.mark.skipif(
    not hasattr(optax, "microbatch"), reason="optax.microbatch came with optax 0.2.7."
)
def test_microbatch_adds_losses_and_gradients_by_default():
    w = np.float32([0.5, 1.0, -1.0])
    adds = optax.microbatch(raw_step, argnums=(1, 2), microbatch_size=16)
    value, grads = jax.jit(adds)(w, jnp.float32(X), jnp.float32(Y))
    np.testing.assert_allclose(value, 4 * numpy_loss(w), rtol=1e-5)
    np.testing.assert_allclose(grads, 4 * 2 / 64 * X.T @ (X @ w - Y), rtol=1e-5)


# ---- one flooded function for more than one purpose ----


def test_flooded_loss_turns_an_adversarial_attack_around():
    w = np.float32([0.9, -1.9, 0.3])

    def attacked(function):
        slope = jax.jit(jax.grad(function, argnums=1))(w, jnp.float32(X), Y)
        return numpy_loss(w, X + 0.05 * np.sign(slope))

    assert numpy_loss(w) < LEVEL
    assert attacked(loss_fn) > 2 * numpy_loss(w)
    assert attacked(flooded(loss_fn, LEVEL)) < numpy_loss(w)


def test_vmap_of_the_gradient_of_a_flooded_loss_floods_each_example():
    w = np.float32([0.9, -1.7, 0.0])
    residual = X @ np.float64(w) - Y
    each, gradients = residual**2, 2 * residual[:, None] * X
    assert each.min() < each.mean() < LEVEL < each.max()
    per_example = jax.jit(jax.vmap(jax.grad(flooded(loss_fn, LEVEL)), (None, 0, 0)))
    got = np.mean(per_example(w, jnp.float32(X), jnp.float32(Y)), axis=0)
    signs = np.where(each >= LEVEL, 1, -1)
    np.testing.assert_allclose(got, (signs[:, None] * gradients).mean(0), rtol=1e-4)


def test_hessian_of_a_flooded_loss_is_minus_the_raw_one_below_the_level():
    w, hessian = np.float32([0.9, -1.9, 0.3]), 2 / 64 * X.T @ X
    assert numpy_loss(w) < LEVEL
    for function, expected in ((loss_fn, hessian), (flooded(loss_fn, LEVEL), -hessian)):
        bent = jax.jit(jax.hessian(function))(w)
        np.testing.assert_allclose(bent, expected, rtol=1e-4)


# ---- an adapter ----


def test_adapter_of_nnx_floats_at_the_level_and_the_rest_stays():
    layer = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    model = nnx.LoRA(3, 2, 1, base_module=layer, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(
        model, optax.chain(scale_by_flood(0.2), optax.adam(0.02)), wrt=nnx.LoRAParam
    )
    frozen = np.asarray(layer.kernel[...])
    x, y = np.float32(X), np.float32(Y)[:, None]

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - y) ** 2)
        of_adapter = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=of_adapter)(model)
        optimizer.update(model, grads, value=value)
        return value

    curve = np.array([step(model, optimizer) for _ in range(301)])
    assert curve[0] > 0.4
    assert abs(curve[-50:].mean() - 0.2) < 0.02
    np.testing.assert_array_equal(layer.kernel[...], frozen)


# ---- what counts towards the level ----


def test_levels_per_sequence_need_an_axis_and_are_taken_for_time_where_they_fit():
    tokens = np.array(
        [[0.1, 0.9, 0.2], [1.5, 0.3, 0.6], [0.0, 0.2, 0.1], [0.4, 0.4, 0.1]]
    )
    by_sequence = np.array([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="broadcast"):
        flood_mean(np.float32(tokens), by_sequence, over="example")
    by_token = jax.jit(functools.partial(flood_mean, over="example"))
    square, levels, seen = tokens[:3], by_sequence[:3], []
    for given, axis in ((levels, levels[None]), (levels[:, None], levels[:, None])):
        seen.append(float(by_token(np.float32(square), np.float32(given))))
        expected = np.mean(np.abs(square - axis) + axis)
        np.testing.assert_allclose(seen[-1], expected, rtol=1e-6)
    assert abs(seen[0] - seen[1]) > 0.01


def test_regulariser_in_the_loss_counts_towards_the_level():
    penalised = lambda w: loss_fn(w) + 0.01 * jnp.sum(w**2)
    curve, w, _ = descend(chain(0.08), jax.value_and_grad(penalised))
    penalty = 0.01 * np.sum(np.float64(w) ** 2)
    assert penalty > 0.02
    assert abs(curve[-50:].mean() - (0.08 - penalty)) < 0.01

    def apart(w):
        return 0.0, jax.grad(flooded(loss_fn, 0.08))(w) + 0.02 * w

    sgd = optax.with_extra_args_support(optax.sgd(RATE))
    assert abs(descend(sgd, apart)[0][-50:].mean() - 0.08) < 0.01


WATCHING = optax.contrib.reduce_on_plateau(factor=0.5, patience=20)
WATCHED = {
    "behind": optax.chain(chain(LEVEL), WATCHING),
    "inside": flood(optax.chain(optax.sgd(RATE), WATCHING), LEVEL),
}


@pytest.mark.parametrize("place", WATCHED)
def test_reduce_on_plateau_takes_a_floating_loss_for_a_plateau(place):
    _, _, state = descend(WATCHED[place], raw_step, steps=600)
    assert optax.tree.get(state, "scale") < 0.01


# ---- L-BFGS above 2 b - min ----


def bowl(w):
    return 0.5 * jnp.sum(w**2)


@jax.jit
@jax.vmap
def search(start):
    """Where flooded L-BFGS at level 1 ends, from a point on the line."""
    optimizer = flood(optax.lbfgs(), 1.0)

    def body(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(bowl)(w)
        updates, state = optimizer.update(
            grad, state, w, value=value, grad=grad, value_fn=bowl
        )
        return (optax.apply_updates(w, updates), state), None

    w = start[None]
    (w, state), _ = jax.lax.scan(body, (w, optimizer.init(w)), length=60)
    fields = ("flood_value", "flood_below", "flood_step")
    return bowl(w), *(optax.tree.get(state, name) for name in fields)


BELOW = [0.2, 0.9, 1.2, 1.6, 1.9, 1.99]  # losses at the start, below twice the level


def adam_until_below_twice_the_level(w):
    optimizer = optax.chain(scale_by_flood(1.0), optax.adam(0.3))

    def step(carry):
        w, state = carry
        value, grad = jax.value_and_grad(bowl)(w)
        updates, state = optimizer.update(grad, state, w, value=value)
        return optax.apply_updates(w, updates), state

    high = lambda carry: bowl(carry[0]) > 2
    return jax.lax.while_loop(high, step, (w, optimizer.init(w)))[0]


@functools.cache
def searched():
    descended = jax.jit(adam_until_below_twice_the_level)(np.float32(4.0))
    starts = [*np.sqrt(2 * np.float32(BELOW)), descended, 4.0]
    return np.transpose(jax.device_get(search(np.float32(starts))))


@pytest.mark.parametrize("place", range(7), ids=[*map(str, BELOW), "after Adam"])
def test_lbfgs_started_below_twice_the_level_ends_at_the_level(place):
    assert abs(searched()[place][0] - 1.0) < 1e-3


def test_lbfgs_started_high_may_end_at_the_bare_minimum_and_the_state_shows_it():
    end, value, below, steps = searched()[-1]  # from loss 8; level 1, minimum 0
    assert max(end, value) < 1e-6
    assert below / steps > 0.9


# ---- changing the level: what is compiled again, and what has no effect ----


def counted(function):
    """`function` under jit, and how often it has been traced."""
    traces = []

    def traced(*args):
        traces.append(None)
        return function(*args)

    return jax.jit(traced), traces


GRADIENT = np.float64(2 / 64 * X.T @ (X @ START - Y))  # .04 is below its loss, 5 above


def assert_is(sign, gradient):
    np.testing.assert_allclose(gradient, sign * GRADIENT, rtol=1e-5)


def test_level_closed_over_by_a_compiled_step_stays_what_it_was():
    level = 0.04
    step = jax.jit(lambda w: jax.grad(flooded(loss_fn, level))(w))
    assert_is(1, step(START))
    level = 5.0
    assert_is(1, step(START))


def test_levels_built_into_the_optimizer_are_a_trace_each():
    traces = []

    def step(w, optimizer, level):
        traces.append(level)
        value, grads = raw_step(w)
        return optimizer.update(grads, optimizer.init(w), w, value=value)

    compiled = jax.jit(step, static_argnums=(1, 2))
    for level in 2 * (0.1, 0.2, 0.3):
        compiled(START, CHAINS[level], level)
    assert traces == [0.1, 0.2, 0.3]


CHAINS = {level: chain(level) for level in (0.1, 0.2, 0.3)}


def test_level_as_an_argument_of_the_step_is_traced_once():
    step, traces = counted(lambda level, w: jax.grad(flooded(loss_fn, level))(w))
    for level, sign in ((0.04, 1), (5.0, -1), (0.0, 1)):
        assert_is(sign, step(level, START))
    assert len(traces) == 1
    for level, sign in ((0.04, 1), (5.0, -1)):  # arrays after Python floats: once more
        assert_is(sign, step(np.float32(level), START))
    assert len(traces) == 2


@pytest.mark.parametrize("by", ["schedule", "inject_hyperparams"])
def test_level_as_a_schedule_or_an_injected_array_is_traced_once(by):
    transform = {
        "schedule": scale_by_flood(lambda count: jnp.where(count < 1, 0.04, 5.0)),
        "inject_hyperparams": optax.inject_hyperparams(scale_by_flood)(level=0.04),
    }[by]

    def step(state, w):
        value, grads = raw_step(w)
        return transform.update(grads, state, w, value=value)

    compiled, traces = counted(step)
    first, state = compiled(transform.init(START), START)
    if by == "inject_hyperparams":
        state.hyperparams["level"] = np.float32(5.0)
    second, state = compiled(state, START)
    assert_is(1, first)
    assert_is(-1, second)
    assert len(traces) == 1
    if by == "inject_hyperparams":  # a Python number is another type: traced once more
        state.hyperparams["level"] = 0.04
        compiled(state, START)
        assert len(traces) == 2


def test_setting_the_recorded_level_has_no_effect():
    transform = scale_by_flood(0.04)
    state = optax.tree.set(transform.init(START), flood_level=jnp.float32(5.0))
    updates, state = transform.update(GRADIENT, state, START, value=0.1)
    assert_is(1, updates)  # .04 is still the level
    assert state.flood_level == np.float32(0.04)
