"""What the obvious code does, in numbers: docs/traps.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import flood_optax
from flood_optax import flood, flood_mean, flooded, scale_by_flood

# A regression whose loss falls from .1 to .002, steeper in one direction than another.
X = np.random.default_rng(0).normal(size=(64, 3)) * [1.0, 0.5, 0.2]
Y = X @ [1.0, -2.0, 0.5] + 0.05 * np.random.default_rng(1).normal(size=64)
START = jnp.array([0.8, -1.5, 0.0])
LEVEL, RATE = 0.04, 0.2


def losses(w, x=X, y=Y):
    return (jnp.asarray(x) @ w - jnp.asarray(y)) ** 2


def loss_fn(w, x=X, y=Y):
    return losses(w, x, y).mean()


def descend(optimizer, step, start=START, steps=400):
    """Trains; returns the raw loss at every step, last parameters and state."""

    def body(carry, _):
        w, state = carry
        grads, extra = step(w)
        updates, state = optimizer.update(grads, state, w, **extra)
        return (optax.apply_updates(w, updates), state), loss_fn(w)

    (w, state), curve = jax.lax.scan(body, (start, optimizer.init(start)), length=steps)
    return np.asarray(curve), w, state


def share_below(state):
    steps = optax.tree.get(state, "flood_step")
    return float(optax.tree.get(state, "flood_below") / steps)


def raw_step(w):
    value, grads = jax.value_and_grad(loss_fn)(w)
    return grads, {"value": value}


CHAIN = optax.chain(scale_by_flood(LEVEL), optax.sgd(RATE))


# ---- what to read in flood_below: the table of the page ----


def test_share_below_tends_to_a_half_at_the_level():
    curve, _, state = descend(CHAIN, raw_step)
    assert abs(curve[-50:].mean() - LEVEL) < 0.01
    assert 0.4 < share_below(state) < 0.55


def test_share_below_is_zero_where_the_level_is_not_reached():
    chain = optax.chain(scale_by_flood(1e-4), optax.sgd(RATE))
    curve, _, state = descend(chain, raw_step)
    plain, _, _ = descend(optax.sgd(RATE), lambda w: (jax.grad(loss_fn)(w), {}))
    np.testing.assert_array_equal(curve, plain)
    assert share_below(state) == 0


def test_share_below_is_a_half_at_once_where_the_level_is_above_the_start():
    level = float(loss_fn(START)) * 1.02
    chain = optax.chain(scale_by_flood(level), optax.sgd(RATE))
    curve, _, state = descend(chain, raw_step, steps=20)
    assert 0.4 < share_below(state) < 0.65
    assert curve.min() > 0.5 * level  # it does not train


def test_flooding_twice_is_plain_training_and_the_share_tends_to_one():
    def step(w):
        grads = jax.grad(flooded(loss_fn, LEVEL))(w)
        return grads, {"value": loss_fn(w)}

    twice, _, state = descend(CHAIN, step)
    plain, _, _ = descend(optax.sgd(RATE), lambda w: (jax.grad(loss_fn)(w), {}))
    np.testing.assert_allclose(twice, plain, rtol=1e-5)
    assert plain[-1] < LEVEL / 10
    assert share_below(state) == pytest.approx(np.mean(plain < LEVEL), abs=1e-6)
    assert share_below(state) > 0.95


def test_two_floods_in_a_chain_are_plain_training():
    double = optax.chain(scale_by_flood(LEVEL), scale_by_flood(LEVEL), optax.sgd(RATE))
    twice, _, _ = descend(double, raw_step)
    plain, _, _ = descend(optax.sgd(RATE), lambda w: (jax.grad(loss_fn)(w), {}))
    np.testing.assert_array_equal(twice, plain)


def test_flooded_value_handed_back_counts_nothing():
    def loss_form(w):
        value, grads = jax.value_and_grad(flooded(loss_fn, LEVEL))(w)
        return grads, {"value": value}

    def raw_gradient(w):
        return jax.grad(loss_fn)(w), {"value": flooded(loss_fn, LEVEL)(w)}

    curve, _, state = descend(CHAIN, loss_form)
    assert abs(curve[-50:].mean() - LEVEL) < 0.01  # it floods, in the loss form
    assert share_below(state) == 0  # and the state does not know
    curve, _, state = descend(CHAIN, raw_gradient)
    assert curve[-1] < LEVEL / 10  # it does not flood at all
    assert share_below(state) == 0


def test_loss_of_another_batch_decides_wrongly():
    # The gradient is that of the first half, the value that of the second, whose
    # labels are shifted and whose loss therefore cannot fall below .25.
    half = slice(None, 32), slice(32, None)

    def step(w):
        grads = jax.grad(loss_fn)(w, X[half[0]], Y[half[0]])
        return grads, {"value": loss_fn(w, X[half[1]], Y[half[1]] + 0.5)}

    _, w, state = descend(CHAIN, step)
    assert share_below(state) == 0
    assert np.mean((X[half[0]] @ np.float64(w) - Y[half[0]]) ** 2) < LEVEL / 10


def test_sum_instead_of_the_mean_floats_at_the_level_over_the_count():
    def step(w):
        value, grads = jax.value_and_grad(lambda w: losses(w).sum())(w)
        return grads, {"value": value}

    chain = optax.chain(scale_by_flood(1.0), optax.sgd(RATE / 64))
    curve, _, _ = descend(chain, step)
    assert abs(curve[-50:].mean() - 1 / 64) < 0.003


def test_shares_of_pause_tend_to_one_by_design():
    chain = optax.chain(
        scale_by_flood(LEVEL, shape=flood_optax.shapes.pause()), optax.sgd(RATE)
    )
    curve, _, state = descend(chain, raw_step)
    assert 0.5 * LEVEL < curve[-1] < LEVEL
    assert share_below(state) > 0.95


# ---- optax.microbatch adds by default ----


@pytest.mark.skipif(
    not hasattr(optax, "microbatch"), reason="optax.microbatch came with optax 0.2.7."
)
def test_microbatch_adds_losses_and_gradients_unless_told_to_average():
    w = jnp.array([0.5, 1.0, -1.0])
    residual = X @ np.float64(w) - Y
    gradient = 2 / 64 * X.T @ residual
    of = functools.partial(
        optax.microbatch,
        jax.value_and_grad(loss_fn),
        argnums=(1, 2),
        microbatch_size=16,
    )
    kind = optax.microbatching.AccumulationType
    for accumulated, factor in ((of(), 4), (of(accumulator=kind.MEAN), 1)):
        value, grads = accumulated(w, jnp.float32(X), jnp.float32(Y))
        np.testing.assert_allclose(value, factor * np.mean(residual**2), rtol=1e-5)
        np.testing.assert_allclose(grads, factor * gradient, rtol=1e-5)


# ---- one flooded function for more than one purpose ----


def test_flooded_loss_turns_an_adversarial_attack_around():
    w, x, y = jnp.array([0.9, -1.9, 0.3]), jnp.float32(X), jnp.float32(Y)
    clean = loss_fn(w, x, y)
    assert clean < LEVEL

    def attacked(function):
        step = 0.05 * jnp.sign(jax.grad(function, argnums=1)(w, x, y))
        return loss_fn(w, x + step, y)

    assert attacked(loss_fn) > 2 * clean
    assert attacked(flooded(loss_fn, LEVEL)) < clean


def test_vmap_of_the_gradient_of_a_flooded_loss_floods_each_example():
    w = jnp.array([0.9, -1.7, 0.0])
    residual = X @ np.float64(w) - Y
    each = residual**2
    assert each.min() < LEVEL < each.max()
    assert each.mean() < LEVEL
    gradients = 2 * residual[:, None] * X
    per_example = jax.vmap(jax.grad(flooded(loss_fn, LEVEL)), (None, 0, 0))
    got = per_example(w, jnp.float32(X), jnp.float32(Y)).mean(0)
    signs = np.where(each >= LEVEL, 1, -1)
    np.testing.assert_allclose(got, (signs[:, None] * gradients).mean(0), rtol=1e-4)
    # one sign for all: per-example gradients of the raw loss, then one flood
    transform = scale_by_flood(LEVEL)
    raw = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(w, jnp.float32(X), jnp.float32(Y))
    whole, _ = transform.update(raw.mean(0), transform.init(w), value=losses(w).mean())
    np.testing.assert_allclose(whole, -gradients.mean(0), rtol=1e-4)


def test_hessian_of_a_flooded_loss_is_minus_the_raw_one_below_the_level():
    w = jnp.array([0.9, -1.9, 0.3])
    hessian = 2 / 64 * X.T @ X
    assert loss_fn(w) < LEVEL
    np.testing.assert_allclose(jax.hessian(loss_fn)(w), hessian, rtol=1e-4)
    bent = jax.hessian(flooded(loss_fn, LEVEL))(w)
    np.testing.assert_allclose(bent, -hessian, rtol=1e-4)


# ---- an adapter ----


def test_adapter_of_nnx_floats_at_the_level_and_the_rest_stays():
    layer = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    model = nnx.LoRA(3, 2, 1, base_module=layer, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(
        model, optax.chain(scale_by_flood(0.2), optax.adam(0.02)), wrt=nnx.LoRAParam
    )
    frozen = np.asarray(layer.kernel[...])
    x, y = jnp.float32(X), jnp.float32(Y)[:, None]

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - y) ** 2)
        of_adapter = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=of_adapter)(model)
        optimizer.update(model, grads, value=value)
        return value

    assert step(model, optimizer) > 0.4
    curve = np.array([step(model, optimizer) for _ in range(300)])
    assert abs(curve[-50:].mean() - 0.2) < 0.02
    np.testing.assert_array_equal(layer.kernel[...], frozen)


# ---- losses of tokens, [B, T] ----

TOKENS = np.array([[0.1, 0.9, 0.2], [1.5, 0.3, 0.6], [0.0, 0.2, 0.1], [0.4, 0.4, 0.1]])
LENGTHS = np.array([3, 2, 1, 3])
MASK = np.arange(3) < LENGTHS[:, None]


def test_over_example_floods_each_token():
    expected = np.mean(np.abs(TOKENS - 0.35) + 0.35)
    got = flood_mean(jnp.float32(TOKENS), 0.35, over="example")
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_mean_over_time_first_floods_each_sequence():
    means = [TOKENS[i, : LENGTHS[i]].mean() for i in range(4)]
    expected = np.mean(np.abs(np.array(means) - 0.35) + 0.35)
    each = jnp.mean(jnp.float32(TOKENS), axis=-1, where=jnp.asarray(MASK))
    np.testing.assert_allclose(
        flood_mean(each, 0.35, over="example"), expected, rtol=1e-6
    )
    per_token = np.mean(np.abs(TOKENS[MASK] - 0.35) + 0.35)
    assert abs(per_token - expected) > 0.05


def test_levels_per_sequence_need_an_axis_and_are_taken_for_time_where_they_fit():
    by_sequence = np.array([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="broadcast"):
        flood_mean(jnp.float32(TOKENS), by_sequence, over="example")
    square, levels = TOKENS[:3], by_sequence[:3]
    silent = flood_mean(jnp.float32(square), levels, over="example")
    meant = flood_mean(jnp.float32(square), levels[:, None], over="example")
    for got, axis in ((silent, levels[None]), (meant, levels[:, None])):
        expected = np.mean(np.abs(square - axis) + axis)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert abs(float(silent) - float(meant)) > 0.01


# ---- what else counts towards the level ----


def test_regulariser_in_the_loss_counts_towards_the_level():
    def penalised(w):
        return loss_fn(w) + 0.01 * jnp.sum(w**2)

    def step(w):
        value, grads = jax.value_and_grad(penalised)(w)
        return grads, {"value": value}

    level = 0.08
    chain = optax.chain(scale_by_flood(level), optax.sgd(RATE))
    curve, w, _ = descend(chain, step)
    penalty = 0.01 * np.sum(np.float64(w) ** 2)
    assert penalty > 0.02
    assert abs(curve[-50:].mean() - (level - penalty)) < 0.01

    def apart(w):
        grads = jax.grad(flooded(loss_fn, level))(w)
        return jax.tree.map(lambda g, p: g + 0.02 * p, grads, w), {}

    curve, _, _ = descend(optax.sgd(RATE), apart)
    assert abs(curve[-50:].mean() - level) < 0.01


# ---- a scale that falls on a plateau ----


def test_reduce_on_plateau_takes_a_floating_loss_for_a_plateau():
    watching = optax.contrib.reduce_on_plateau(factor=0.5, patience=20)
    behind = optax.chain(scale_by_flood(LEVEL), optax.sgd(RATE), watching)
    inside = flood(optax.chain(optax.sgd(RATE), watching), LEVEL)
    for optimizer in (behind, inside):
        _, _, state = descend(optimizer, raw_step, steps=600)
        assert optax.tree.get(state, "scale") < 0.01


# ---- L-BFGS above 2 b - min ----


def bowl(w):
    return 0.5 * jnp.sum(w**2)


def search(optimizer, start, steps=60):
    def body(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(bowl)(w)
        updates, state = optimizer.update(
            grad, state, w, value=value, grad=grad, value_fn=bowl
        )
        return (optax.apply_updates(w, updates), state), None

    (w, state), _ = jax.lax.scan(body, (start, optimizer.init(start)), length=steps)
    return float(bowl(w)), state


@pytest.mark.parametrize("start", [0.2, 0.9, 1.2, 1.6, 1.9, 1.99])
def test_lbfgs_started_below_twice_the_level_ends_at_the_level(start):
    w = jnp.sqrt(2 * jnp.array([start]))
    end, _ = search(flood(optax.lbfgs(), 1.0), w)
    assert abs(end - 1.0) < 1e-3


def test_lbfgs_started_high_may_end_at_the_bare_minimum_and_the_state_shows_it():
    start = jnp.array([4.0])  # loss 8, level 1, minimum 0
    end, state = search(flood(optax.lbfgs(), 1.0), start)
    assert end < 1e-6
    assert optax.tree.get(state, "flood_value") < 1e-6
    assert share_below(state) > 0.9


def test_lbfgs_after_a_few_steps_of_descent_ends_at_the_level():
    w = jnp.array([4.0])
    optimizer = optax.chain(scale_by_flood(1.0), optax.adam(0.3))
    state = optimizer.init(w)
    while bowl(w) > 2 * 1.0:
        value, grad = jax.value_and_grad(bowl)(w)
        updates, state = optimizer.update(grad, state, w, value=value)
        w = optax.apply_updates(w, updates)
    end, _ = search(flood(optax.lbfgs(), 1.0), w)
    assert abs(end - 1.0) < 1e-3


# ---- changing the level: what is compiled again, and what has no effect ----


def counted(function):
    """`function` under jit, and how often it has been traced."""
    traces = []

    def traced(*args):
        traces.append(None)
        return function(*args)

    return jax.jit(traced), traces


def one_step(level, w):
    return jax.value_and_grad(flooded(loss_fn, level))(w)


def test_level_closed_over_by_a_compiled_step_stays_what_it_was():
    level = 0.04
    step, _ = counted(lambda w: one_step(level, w))
    before = step(START)[1]
    level = 5.0
    np.testing.assert_array_equal(step(START)[1], before)
    np.testing.assert_allclose(one_step(level, START)[1], -before, rtol=1e-6)


def test_levels_built_into_the_optimizer_are_a_trace_each():
    traces = []
    for level in (0.1, 0.2, 0.3):
        optimizer = optax.chain(scale_by_flood(level), optax.sgd(RATE))

        def step(state, w, optimizer=optimizer, level=level):
            traces.append(level)
            grads, extra = raw_step(w)
            return optimizer.update(grads, state, w, **extra)

        jax.jit(step)(optimizer.init(START), START)
    assert traces == [0.1, 0.2, 0.3]


def test_level_as_an_argument_of_the_step_is_traced_once():
    step, traces = counted(one_step)
    for level in (0.04, 5.0, 0.0):
        np.testing.assert_allclose(
            step(level, START)[1], one_step(level, START)[1], rtol=1e-6
        )
    assert len(traces) == 1
    step(jnp.float32(0.04), START)  # an array after Python floats: once more
    step(jnp.float32(0.5), START)
    assert len(traces) == 2


def test_level_as_a_schedule_or_an_injected_array_is_traced_once():
    injected = optax.inject_hyperparams(scale_by_flood)(level=0.04)
    scheduled = scale_by_flood(lambda count: jnp.where(count < 1, 0.04, 5.0))
    for transform, edited in ((injected, True), (scheduled, False)):

        def step(state, w, transform=transform):
            grads, extra = raw_step(w)
            return transform.update(grads, state, w, **extra)

        compiled, traces = counted(step)
        first, state = compiled(transform.init(START), START)
        if edited:
            state.hyperparams["level"] = jnp.float32(5.0)
        second, state = compiled(state, START)
        np.testing.assert_allclose(second, -first, rtol=1e-6)
        assert len(traces) == 1
        if edited:  # a Python number is another type: traced once more
            state.hyperparams["level"] = 0.04
            compiled(state, START)
            assert len(traces) == 2


def test_setting_the_recorded_level_has_no_effect():
    transform = scale_by_flood(0.04)
    state = optax.tree.set(transform.init(START), flood_level=jnp.float32(5.0))
    grads, extra = raw_step(START)
    updates, state = transform.update(grads, state, START, **extra)
    np.testing.assert_array_equal(updates, grads)  # .04 is still the level
    assert state.flood_level == jnp.float32(0.04)
