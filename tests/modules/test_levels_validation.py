"""Levels from a validation metric, against a search and a second full run."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import FloodWarning, flooded, levels, sweep

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
@pytest.mark.parametrize(
    ("compile_", "window"),
    [(lambda f: f, 3), *((jax.jit, window) for window in (1, 2, 3, 8))],
)
@pytest.mark.filterwarnings("ignore::flood_optax.FloodWarning")
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
        assert call(loss, np.float32(metric)) == expected


KINDS = [np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64]


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::flood_optax.FloodWarning")
def test_at_best_compares_integers_of_any_width_exactly(kind, mode):
    # Of neighbours at the ends of the range, which float32 and wrapped 64 bits confuse.
    ends, loss = np.iinfo(kind), np.linspace(2, 0, 12, dtype=np.float32)
    rng = np.random.default_rng(0)
    run = functools.partial(levels.at_best, mode=mode, window=3)
    compiled = jax.jit(run)
    for end in (ends.min, ends.max - 5, (ends.max + 1) // 2 - 3):
        metric = np.array([end + int(i) for i in rng.integers(0, 6, 12)], kind)
        sums = [sum(map(int, metric[i : i + 3])) for i in range(10)]
        expected = loss[sums.index(max(sums) if mode == "max" else min(sums)) + 1]
        assert run(loss, metric) == expected  # 64 bits too, without x64
        with jax.enable_x64(metric.itemsize == 8):
            assert compiled(loss, metric) == expected


def test_at_best_sums_integers_over_a_long_window_exactly():
    """The best window has a sum of its lower 16 bits that 32 bits do not hold."""
    window = 40_000
    metric = np.zeros(window + 3, np.int32)
    metric[3 : 3 + 2**15] = 2**16 - 1
    metric[-3:] = 30_000, 30_000, -9
    sums = [sum(map(int, metric[i : i + window])) for i in range(4)]
    assert sums[1] < 2**31 < sums[2] == max(sums)
    losses = np.arange(metric.size, dtype=np.float32)
    found = levels.at_best(losses, metric, mode="max", window=window)
    assert found == (window - 1) // 2 + 2


def test_at_best_compares_a_list_of_large_integers():
    # Float32 takes the first two for one; a half is lost where int32 wraps.
    losses, accuracies = [0.75, 0.5, 0.25], [20_000_000, 20_000_001, 20_000_000]
    assert levels.at_best(losses, accuracies, mode="max") == 0.5
    assert levels.at_best(losses, [1, 2**40, 2**40 + 1], mode="max") == 0.25
    assert levels.at_best(losses, [False, True, False], mode="max") == 0.5
    assert levels.at_best(losses, [jnp.int32(3), 5, jnp.int32(4)], mode="max") == 0.5


@pytest.mark.parametrize(("dtype", "large"), [("float16", 2048), ("bfloat16", 256)])
def test_at_best_adds_a_metric_of_16_bits_in_float32(dtype, large):
    metric = jnp.asarray([large, 0.5, large, 1.0], dtype)  # added in 16 bits all equal
    level = levels.at_best([2.0, 1.5, 0.75, 0.5], metric, mode="max", window=2)
    assert level == 0.75


def test_at_best_of_integers_leaves_out_a_loss_that_is_not_finite():
    losses = [np.nan, 0.5, 0.25]
    assert levels.at_best(losses, [1, 2, 3], mode="min") == 0.5
    assert levels.at_best(losses, [-1, -3, -4], mode="max") == 0.5


def test_at_best_at_the_last_step_keeps_the_dtype():
    losses = jnp.array([0.75, 0.5, 0.25, 0.125], jnp.bfloat16)
    level = levels.at_best(losses, [0, 0, 0, 7], mode="max")
    assert (level, level.dtype) == (losses[3], jnp.bfloat16)


def test_at_best_warns_where_the_first_window_is_the_best():
    losses = [2.0, 0.75, 0.5]
    with pytest.warns(FloodWarning, match="mode='max'.* is best in the first window"):
        level = levels.at_best(losses, [0.9, 0.5, 0.4], mode="max")  # it is a loss
    assert level == 2
    assert levels.at_best(losses, [0.9, 0.5, 0.4], mode="min") == 0.5  # the remedy
    levels.at_best([2.0], [0.9], mode="min")  # of one window none is the first
    levels.at_best(losses, [np.nan] * 3, mode="min")


def test_at_best_without_a_number_is_off():
    nan = [np.nan, np.nan]
    assert levels.at_best([0.5, 0.25], nan, mode="max") == -np.inf
    assert levels.at_best(nan, [0.5, 0.25], mode="min") == -np.inf
    # The worst there is goes before none.
    assert levels.at_best([0.5, 0.25], [np.nan, -np.inf], mode="max") == 0.25
    assert levels.at_best([0.5, 0.25], [np.nan, np.inf], mode="min") == 0.25


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
