"""Levels from a validation metric, against rules read off the whole history."""

import functools
import re
from fractions import Fraction

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import flooded, levels, scale_by_flood, sweep


def plateau_rule(metrics, initial, step, patience, *, maximum):
    """The rule read off the whole history, one window at a time."""
    level, path = np.float32(initial), []
    best_at, start, judged = None, 0, True
    for now, metric in enumerate(metrics):
        if best_at is None or metric > metrics[best_at]:
            best_at, start, judged = now, now + 1, True
        elif now - start + 1 == patience:
            best = metrics[best_at]
            window = max(metrics[start : now + 1])
            preceding = metrics[max(start - patience, best_at) : start]
            decays = window < max(preceding) or start == best_at + 1
            move = 1 if window == best or decays else -1
            judged = judged or window == best
            if judged:
                level = np.float32(np.clip(level + move * np.float32(step), 0, maximum))
            start, judged = now + 1, not judged
        path.append(level)
    return path


def run_plateau(metrics, *args, **kwargs):
    init, update = levels.on_plateau(*args, **kwargs)

    def body(state, metric):
        level, state = update(state, metric)
        return state, level

    return jax.lax.scan(body, init(), jnp.asarray(metrics, jnp.float32))[1]


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_on_plateau_follows_its_rule(seed, patience):
    rng = np.random.default_rng(seed)
    metrics = rng.integers(0, 12, 200).astype(np.float32) - 0.02 * np.arange(200)
    metrics = metrics.astype(np.float32)
    expected = plateau_rule(metrics, 0.25, 0.125, patience, maximum=0.5)
    result = run_plateau(
        metrics, 0.25, step=0.125, patience=patience, mode="max", maximum=0.5
    )
    np.testing.assert_array_equal(result, expected)
    assert len(set(expected)) > 2, "the rule hardly moved"
    mirrored = run_plateau(
        -metrics, 0.25, step=0.125, patience=patience, mode="min", maximum=0.5
    )
    np.testing.assert_array_equal(mirrored, expected)


def test_on_plateau_keeps_the_level_while_the_metric_improves():
    np.testing.assert_array_equal(
        run_plateau(np.arange(20), 0.1, step=0.05, patience=1, mode="max"),
        np.float32(0.1),
    )


def test_on_plateau_raises_to_the_maximum_while_it_costs_nothing():
    result = run_plateau(
        np.ones(20), 0.0, step=0.25, patience=3, mode="max", maximum=0.6
    )
    assert result[3] == 0.25
    assert result[2] == 0.0
    assert result[-1] == np.float32(0.6)


def test_on_plateau_nan_is_never_a_new_best():
    metrics = [0.5, np.nan, 0.4, 0.6, np.nan, np.nan]
    result = run_plateau(metrics, 0.0, step=0.25, patience=2, mode="max")
    np.testing.assert_array_equal(result, [0, 0, 0.25, 0.25, 0.25, 0.5])


@pytest.mark.parametrize("start", [0.0, 1.0], ids=["from_below", "from_above"])
def test_on_plateau_hovers_at_the_lowest_level_that_stops_the_decay(start):
    # a model that overfits by 0.3 - level each epoch, and underfits above that level
    init, update = levels.on_plateau(start, step=0.05, patience=3, mode="max")

    def epoch(carry, _):
        state, damage = carry
        gap = 0.3 - state.level
        damage = jnp.maximum(damage + 0.1 * gap, 0.0)
        metric = 1 - damage - jnp.maximum(-gap, 0.0)
        level, state = update(state, metric)
        return (state, damage), level

    peak = update(init(), 1.0)[1]  # the metric has been better once
    _, path = jax.lax.scan(epoch, (peak, 0.0), length=300)
    assert path[-100:].min() > 0.2
    assert path[-100:].max() < 0.4


def test_on_plateau_state_is_stable_under_jit():
    init, update = levels.on_plateau(0.1, step=0.05, patience=2, mode="max")
    before = jax.tree.map(jax.typeof, init())
    _, state = jax.jit(update)(init(), jnp.float16(0.5))
    assert jax.tree.map(jax.typeof, state) == before
    _, eager = update(init(), 0.5)
    chex.assert_trees_all_equal(eager, state)


def test_on_plateau_state_may_be_donated():
    # Two fields that are one array crash a train step that donates its state.
    init, update = levels.on_plateau(0.5, step=0.25, patience=1, mode="min")
    step = jax.jit(update, donate_argnums=0)
    state, path = init(), []
    for loss in (1.0, 2.0, 3.0):
        level, state = step(state, jnp.float32(loss))
        path.append(float(level))
    assert path == [0.5, 0.75, 0.75]


def test_on_plateau_as_good_as_its_best_after_decay_moves_up():
    # 1 is best, the window .9 is worse: up. Then 1 again, a tie with the best, in the
    # first window after a move, which moves the level in this case alone: up.
    path = run_plateau([1, 0.9, 1, 0.9], 0.0, step=0.25, patience=1, mode="max")
    np.testing.assert_array_equal(path, [0, 0.25, 0.5, 0.5])
    # The same where the window before at this level was worse: up, and not down.
    path = run_plateau([1, 0.9, 0.8, 1], 0.0, step=0.25, patience=1, mode="max")
    np.testing.assert_array_equal(path, [0, 0.25, 0.25, 0.5])


def test_live_edit_of_the_level_neither_recompiles_nor_resets():
    make = optax.inject_hyperparams(scale_by_flood, hyperparam_dtype=jnp.float32)
    optimizer = optax.chain(make(level=0.2), optax.sgd(1.0))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    grads, value = jnp.ones(2), jnp.float32(0.5)
    state, signs = optimizer.init(grads), []
    for level in (0.2, 0.7, -np.inf, 0.5):
        state[0].hyperparams["level"] = jnp.float32(level)
        updates, state = update(grads, state, value=value)
        signs.append(float(updates[0]))
    assert signs == [-1, 1, -1, -1]
    assert optax.tree.get(state, "flood_below") == 1
    assert optax.tree.get(state, "flood_step") == 4


# The best step of a plain run


def best_step(metric, loss, mode, window):
    """The step by a search in Python, in exact arithmetic."""
    best = None
    for start in range(len(metric) - window + 1):
        values = metric[start : start + window]
        step = start + (window - 1) // 2
        if any(np.isnan(v) for v in values) or not np.isfinite(loss[step]):
            continue
        mean = sum(map(Fraction, map(float, values))) / window
        score = mean if mode == "max" else -mean
        if best is None or score > best[0]:
            best = (score, step)
    return None if best is None else best[1]


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_at_best_equals_a_search(mode, window, compile_):
    rng = np.random.default_rng(window)
    call = compile_(functools.partial(levels.at_best, mode=mode, window=window))
    for _ in range(20):
        metric = rng.integers(0, 6, 40) / 8  # many ties; sums are exact
        metric[rng.random(40) < 0.05] = np.nan
        loss = np.linspace(2, 0, 40) + rng.random(40) / 9
        loss[rng.integers(0, 40, 3)] = [np.nan, np.inf, -np.inf]
        loss = loss.astype(np.float32)
        step = best_step(metric, loss, mode, window)
        expected = -np.inf if step is None else loss[step]
        assert call(loss, jnp.asarray(metric, jnp.float32)) == expected


@pytest.mark.parametrize("step", [0, 3])
def test_at_best_at_the_first_and_the_last_step(step):
    metric = np.zeros(4).astype(np.int32)
    metric[step] = 7
    losses = jnp.array([0.75, 0.5, 0.25, 0.125], jnp.bfloat16)
    level = levels.at_best(losses, metric, mode="max")
    assert (level, level.dtype) == (losses[step], jnp.bfloat16)


def test_at_best_without_a_number_is_off():
    nan = [np.nan, np.nan]
    assert levels.at_best([0.5, 0.25], nan, mode="max") == -np.inf
    assert levels.at_best(nan, [0.5, 0.25], mode="min") == -np.inf
    # The worst there is goes before none.
    assert levels.at_best([0.5, 0.25], [np.nan, -np.inf], mode="max") == 0.25
    assert levels.at_best([0.5, 0.25], [np.nan, np.inf], mode="min") == 0.25


BAD_AT_BEST = {
    "mode": ({"mode": "best"}, '(mode=...)` must be "max" or "min", got \'best\'.'),
    "window": ({"mode": "min", "window": 0}, "(window=...)` must be at least 1, got 0"),
    "long": ({"mode": "min", "window": 3}, "must be at most the 2 steps, got 3."),
    "shape": (
        {"metric": [1.0], "mode": "min"},
        "`at_best(losses, metric)` must be of one shape [steps], got (2,) and (1,).",
    ),
}


@pytest.mark.parametrize("case", BAD_AT_BEST)
def test_at_best_refuses(case):
    options, message = BAD_AT_BEST[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        levels.at_best(**({"losses": [0.5, 0.25], "metric": [1.0, 2.0]} | options))


def test_stop_and_flood_is_the_second_full_run_bit_for_bit():
    # The plain run is the trunk; its level is the loss at the best validation step.
    x = jnp.array([[1.0, 0.3], [0.4, -1.0], [0.9, 0.8]])
    y, valid_y = jnp.array([1.0, -0.5, 0.25]), jnp.array([0.6, -0.1, 0.3])

    def step(w, _, level):
        def loss_fn(w):
            return ((x @ w - y) ** 2).mean()

        objective = flooded(loss_fn, level, return_info=True)
        (_, info), grad = jax.value_and_grad(objective, has_aux=True)(w)
        valid = ((x @ w - valid_y) ** 2).mean()
        return w - 0.1 * grad, {"loss": info.loss, "valid": valid}

    def level_of(metrics):
        return levels.at_best(metrics["loss"], metrics["valid"], mode="min")

    start, batches = jnp.array([-1.0, -1.0]), jnp.zeros(150)
    result = sweep.forked(step, start, batches, level_of)

    @jax.jit
    def run(level):
        return jax.lax.scan(lambda w, b: step(w, b, level), start, batches)[1]

    plain = run(jnp.float32(-np.inf))
    level = plain["loss"][np.argmin(plain["valid"])]
    assert plain["loss"][-1] < level < plain["loss"][0]
    np.testing.assert_array_equal(result.levels, [-np.inf, level])
    for name, rows in run(level).items():
        assert result.metrics[name][1].tobytes() == np.asarray(rows).tobytes()
    assert result.steps_run in range(151, 300)
    # It has stopped nearer to the best validation loss than the plain run.
    assert result.metrics["valid"][1, -1] < result.metrics["valid"][0, -1]
