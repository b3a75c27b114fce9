"""Both forms against numpy in every numeric mode of JAX.

This file is also a script: a process for each group of modes, apart from all other
tests, runs every check in each and reports it by name.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from flood_optax import (
    average_params,
    averaged,
    flood,
    flood_loss,
    flood_mean,
    flooded,
    levels,
    metrics,
    scale_by_flood,
)
from tests import forms, oracles, processes
from tests.marks import slow_but

HALVES = (np.float16, ml_dtypes.bfloat16)


class Mode(NamedTuple):
    """How to enter a mode, what it refuses, whether it sees more op by op, dtypes."""

    context: Callable[[], contextlib.AbstractContextManager]
    refuses: dict[str, Callable[[], object]]
    eager: bool = False
    floats: tuple[type, ...] = (ml_dtypes.bfloat16, np.float32)
    levels: tuple[type, ...] = (np.float16, np.float32)


@contextlib.contextmanager
def strict():
    promotion = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with promotion[0], promotion[1], jax.enable_checks(True):
        yield


@contextlib.contextmanager
def guarded():
    with jax.checking_leaks(), jax.transfer_guard("disallow"):
        yield


def leak():
    kept = []
    jax.jit(lambda x: kept.append(x) or x)(jax.device_put(1.0))


ONE, MATRIX = np.ones(3, np.float32), np.ones((2, 3), np.float32)
MODES = {
    "guarded": Mode(guarded, {"leaks": leak, "transfers": lambda: jnp.ones(3) + 1.5}),
    "debug_nans": Mode(
        lambda: jax.debug_nans(True),
        {"naive off": lambda: jnp.abs(jnp.float32(0.5) + jnp.inf) - jnp.inf},
        eager=True,
        floats=(np.float32,),
    ),
    "strict": Mode(
        strict,
        {
            "mixed dtypes": lambda: jnp.add(ONE, ONE.astype(np.float16)),
            "mixed ranks": lambda: jnp.add(ONE, MATRIX),
        },
    ),
    "disable_jit": Mode(jax.disable_jit, {}),
    "plain": Mode(
        contextlib.nullcontext,
        {},
        floats=(*HALVES, np.float32),
        levels=(*HALVES, np.float32, np.int32),
    ),
    "x64": Mode(
        lambda: jax.enable_x64(True),
        {},
        floats=(*HALVES, np.float32, np.float64),
        levels=(*HALVES, np.float32, np.int32, np.float64),
    ),
}


EVERY_TIME = ("plain",)  # the other modes are slow, and have a process of their own


def in_mode(mode, function, *args):
    """The compiled result; where op by op finds more, the eager one must agree."""
    with mode.context():
        args = jax.device_put(args)
        compiled = jax.jit(function)(*args)
        eager = function(*args) if mode.eager else compiled
    jax.tree.map(lambda x, y: close(x, y, y.dtype, ulps=4), eager, compiled)
    return compiled


def same_bits(got, wanted):
    jax.tree.map(_same_bits, got, wanted)


def _same_bits(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    kind = f"u{got.dtype.itemsize}"
    nan = np.isnan(got.astype(np.float64)) & np.isnan(wanted.astype(np.float64))
    assert (nan | (got.view(kind) == wanted.view(kind))).all(), (got, wanted)


def close(got, wanted, dtype, ulps=2):
    got = np.asarray(got)
    assert got.dtype == dtype, f"dtype {got.dtype}, wanted {np.dtype(dtype)}"
    tolerance = ulps * float(jnp.finfo(dtype).eps)
    wanted = np.asarray(wanted).astype(np.float64)
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=tolerance)


def oracle(loss, level):
    """Multiplier and flooded value of flooding, in numpy."""
    work = np.float64 if loss.dtype == np.float64 else np.float32
    value, multiplier = oracles.bend(loss.astype(work), np.asarray(level).astype(work))
    return multiplier, value.astype(loss.dtype)


# ---- what is checked: every function runs in every mode ----


def check_the_mode_is_on(mode):
    with mode.context():
        assert mode is not MODES["x64"] or jnp.asarray(1.0).dtype == np.float64
        if mode is MODES["disable_jit"]:
            assert jax.jit(lambda x: bool(x > 0))(1.0) is True
    for name, act in mode.refuses.items():
        act()  # legal outside the mode
        try:
            with mode.context():
                act()
        except Exception:
            continue
        raise AssertionError(f"the mode does not refuse {name}")


def updates_of_every_dtype(mode):
    """Updates whose entries have a full mantissa, and leaves without gradient."""
    exact = np.array([[np.pi, -np.e], [0.1, -300.7]])
    tree = {np.dtype(dtype).name: exact.astype(dtype) for dtype in mode.floats}
    zero = np.array([0.0, -0.0], np.float32)
    return tree | {"int": np.array([3, -4], np.int32), "none": None, "zero": zero}


def times(multiplier, updates):
    """The oracle of an update, for each multiplier, in numpy; integer leaves pass."""

    def scaled(x):
        factor = np.ones_like if x.dtype == np.int32 else np.asarray
        return np.multiply.outer(factor(multiplier, x.dtype), x)

    return jax.tree.map(scaled, updates)


LOSSES = (0.3125, 0.2, -1.7, np.inf, -np.inf, np.nan)


def finite_in_mode(mode, losses):
    return [x for x in losses if not (mode is MODES["debug_nans"] and np.isnan(x))]


def check_mixed_dtypes_of_loss_level_and_updates(mode):
    updates = updates_of_every_dtype(mode)

    def both(loss, level):
        transform = scale_by_flood(level)
        by_chain, state = transform.update(updates, transform.init(updates), value=loss)
        wrapper = flood(optax.identity(), level)
        by_wrapper, _ = wrapper.update(updates, wrapper.init(updates), value=loss)
        bent = flooded(lambda x: x, level)
        value, slope = jax.value_and_grad(bent)(loss)
        return by_chain, by_wrapper, value, slope, flood_loss(loss, level), state

    pairs = [
        (number, (number if np.isfinite(number) else 0.5) + offset)
        for number in finite_in_mode(mode, LOSSES)
        for offset in (0.0, -0.5, 1e-3)
    ]
    numbers, bounds = np.array(pairs).T
    typed = [bounds.astype(dtype) for dtype in mode.levels]
    for loss_dtype in mode.floats:
        loss = numbers.astype(loss_dtype)
        run = lambda loss, bounds: [jax.vmap(both)(loss, level) for level in bounds]
        with mode.context():
            results = jax.jit(run)(*jax.device_put((loss, typed)))
        for got, level in zip(results, typed, strict=True):
            multiplier, value = oracle(loss, level)
            wanted = times(multiplier, updates)
            slope = multiplier.astype(loss_dtype)
            same_bits(got[:5], (wanted, wanted, value, slope, value))
            work = np.float64 if loss_dtype == np.float64 else np.float32
            used = level.astype(work).astype(np.float32), loss.astype(np.float32)
            below = (multiplier == -1).astype(np.int32)
            same_bits(tuple(got[5]), (np.ones_like(below), *used, below))


def check_eager_calls_with_python_numbers(mode):
    if mode is MODES["guarded"]:
        return  # a Python number is a transfer, as everywhere in JAX
    updates = updates_of_every_dtype(mode)
    with mode.context():
        for level, loss in ((0.5, 0.2), (-1, -2.25), (0.2, 0.2)):
            transform = scale_by_flood(level)
            got, _ = transform.update(updates, transform.init(updates), value=loss)
            same_bits(got, times(-1.0 if loss < level else 1.0, updates))
            value = flood_loss(loss, level)
            np.testing.assert_allclose(value, abs(loss - level) + level, rtol=1e-6)


def check_level_is_not_rounded_to_a_16_bit_loss(mode):
    # bf16 rounds .2 to .20019531: above the level .2, below the level .2002
    loss = np.asarray(0.2, ml_dtypes.bfloat16)
    for level, sign in ((0.2, 1.0), (0.2002, -1.0), (float(loss), 1.0)):
        slope = in_mode(mode, jax.grad(flooded(lambda x: x, level)), loss)
        same_bits(slope, np.asarray(sign, loss.dtype))


def check_16_bit_loss_is_rounded_before_the_compare(mode):
    # under jit XLA keeps more bits of a bf16 product than bf16 has: .22053, which is
    # below the level; rounded to bf16 it is .22070, above
    level, factor = 0.2206, jnp.asarray(1.1, jnp.bfloat16)
    transform = scale_by_flood(level)
    state = transform.init(None)

    def update(x):
        loss = x.astype(jnp.bfloat16) * factor
        scaled, _ = transform.update(jnp.float32(3.0), state, value=loss)
        return scaled, flood_loss(loss, level).astype(jnp.float32)

    scaled, value = in_mode(mode, update, np.float32(0.2001))
    same_bits(scaled, np.float32(3.0))
    same_bits(value, np.float32(np.asarray(0.2207, ml_dtypes.bfloat16)))


def check_off_is_the_identity(mode):
    updates = updates_of_every_dtype(mode)

    def off(loss, shape):
        transform = scale_by_flood(-np.inf, shape=shape)
        scaled, _ = transform.update(updates, transform.init(updates), value=loss)
        bent = flooded(lambda x: x, -np.inf, shape=shape)
        return scaled, jax.value_and_grad(bent)(loss)

    def off_in_every_shape(losses):
        return [
            jax.vmap(functools.partial(off, shape=shape))(losses)
            for shape in forms.SHAPES.values()
        ]

    numbers = finite_in_mode(mode, (0.3, -2.0, np.inf, -np.inf, np.nan))
    for dtype in mode.floats:
        losses = np.asarray(numbers, dtype)
        with mode.context():
            results = jax.jit(off_in_every_shape)(jax.device_put(losses))
        ones = np.ones_like(losses)
        for got in results:
            same_bits(got, (times(ones, updates), (losses, ones)))


def check_other_shapes(mode):
    one = np.float16(1)

    def bent_by_every_shape(losses, level):
        found = {}
        for name, shape in forms.SHAPES.items():
            call = functools.partial(flood_loss, level=level, shape=shape)
            transform = scale_by_flood(level, shape=shape)
            scale = lambda loss, t=transform: t.update(one, t.init(one), value=loss)[0]
            both = jax.vmap(jax.value_and_grad(call))(losses)
            found[name] = (*both, jax.vmap(scale)(losses))
        return found

    numbers = np.array([2.0, 0.53125, 0.25, 0.125])  # level .5: exact in every dtype
    for dtype in mode.floats:
        given = numbers.astype(dtype), np.float32(0.5)
        results = in_mode(mode, bent_by_every_shape, *given)
        for name, (value, slope, scaled) in results.items():
            exact, multiplier = oracles.bend(numbers, 0.5, oracles.SHAPES[name])
            close(value, exact, dtype, ulps=4)
            close(slope, multiplier, dtype, ulps=4)
            close(scaled, multiplier, np.float16)


def check_second_derivative(mode):
    # flooding x^3 below the level: -6x; above: 6x
    def bent(x, level):
        return flooded(lambda x: x**3, level)(x)

    second, sides = jax.grad(jax.grad(bent)), ((0.5, -1.0), (0.05, 1.0))
    for dtype, (level, sign) in itertools.product(mode.floats, sides):
        got = in_mode(mode, second, np.asarray(0.5, dtype), np.float32(level))
        close(got, sign * 6 * 0.5, dtype)


def check_means_are_taken_in_float32(mode):
    # 3000 f16 losses of about 100 overflow f16 when summed, and stall it when counted
    exact, level = 100.0 + np.sin(np.arange(3000.0)), 110.0
    groups = {"segment_ids": np.arange(3000) % 2, "num_segments": 2}
    calls = [
        functools.partial(flood_mean, level=level, over=over, **given)
        for over, given in (("batch", {}), ("example", {}), ("segment", groups))
    ]
    by_partition = lambda losses: [jax.value_and_grad(call)(losses) for call in calls]
    for dtype in mode.floats:
        losses = exact.astype(dtype)
        for value, slopes in in_mode(mode, by_partition, losses):
            # all are below; a sum of 3000 float32 terms may lose some bits
            close(value, 2 * level - losses.astype(np.float64).mean(), dtype, ulps=8)
            close(slopes, -1 / 3000, dtype)


def check_windows_accumulate_in_float32(mode):
    for dtype in mode.floats:
        grads = np.asarray([40000.0, 60000.0, 20000.0], dtype)  # sum overflows f16
        values = np.asarray([0.75, 0.25, 0.125], dtype)
        optimizer = flood(optax.identity(), 0.5, every_k=3)

        def window(grads, values, optimizer=optimizer):
            state = optimizer.init(grads[0])
            out = []
            for grad, value in zip(grads, values, strict=True):
                update, state = optimizer.update(grad, state, grads[0], value=value)
                out.append(update)
            return jnp.stack(out), optax.tree.get(state, "flood_value")

        updates, value = in_mode(mode, window, grads, values)
        mean = values.astype(np.float64).mean()  # .375, below the level
        close(value, mean, np.float32)
        close(updates, [0.0, 0.0, -grads.astype(np.float64).mean()], dtype)


def check_averages_are_taken_in_float32(mode):
    # rounded as the parameters are; a quarter of these moves is nothing in bf16
    optimizer = average_params(0.75)

    def run(start, moves):
        params, state, visited = start, optimizer.init(start), []
        for move in moves:
            _, state = optimizer.update(move, state, params)
            params = optax.apply_updates(params, move)
            visited.append(params)
        average = optax.tree.get(state, "flood_average")
        return average, jnp.stack(visited), averaged(state, params)

    for dtype in mode.floats:
        start = np.asarray([1.0, -300.7], dtype)
        moves = np.asarray([[0.3, -1.7], [0.01, 2.0], [-0.2, 1.1]] * 3, dtype)
        average, visited, given = in_mode(mode, run, start, moves)
        work = np.float64 if dtype == np.float64 else np.float32
        wanted = oracles.average(np.asarray(visited), 0.75)
        close(average, wanted, work, ulps=8)
        same_bits(given, np.asarray(average).astype(dtype))


def check_metrics_of_no_step_and_of_windows(mode):
    optimizer = flood(optax.sgd(1.0), 0.5, every_k=2)

    def run(values):
        states = [optimizer.init(values[0])]
        for value in values:
            _, state = optimizer.update(value, states[-1], values[0], value=value)
            states.append(state)
        logs = [metrics(state).values() for state in (states[0], states[-1])]
        return [jnp.stack([x.astype(jnp.float32) for x in log]) for log in logs]

    losses = np.float32([0.3, 0.5, 0.9, 0.3, 0.2, 0.4])
    before, after = in_mode(mode, run, losses)
    close(before, [0, 0, 0, 0], np.float32)
    close(after, [0.3, 0.5, 2 / 3, 3], np.float32)


def check_windows_of_weight_zero(mode):
    """Levels of each kind of parts that weigh nothing: 0/0 nowhere, eagerly too."""
    optimizer = flood(optax.identity(), 0.5, every_k=2)

    def run(values, weights):
        found = forms.course(optimizer, value=values, weight=weights)
        return found["multiplier"], found["flood_step"].astype(np.float32)

    weights = np.float32([0, 0, 0, 2, 2, 0])
    for dtype in mode.floats:
        values = np.asarray([0.25, 0.75, 0.25, 0.75, 0.25, 0.75], dtype)
        found, steps = in_mode(mode, run, values, weights)
        same_bits(found, np.float32([0, 0, 0, 1, 0, -1]))
        assert steps[-1] == 2


ROUNDED = ("accordance", "adaflood")


def check_levels_from_data(mode):
    # Zeros among the probabilities: 0 log 0 = 0, without a NaN on the way.
    rng = np.random.default_rng(0)
    probs = np.float32([[1, 0, 0], [0.25, 0.75, 0], [0, 0.5, 0.5], [0, 0, 1]])
    labels, losses = np.int32([0, 1, 1, 2]), np.float32([2, 0.5, 0.25, 0])
    matrix = np.float32([[0.75, 0.25, 0], [0, 1, 0], [0.5, 0, 0.5]])
    entropy = lambda p: -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    true, each = np.array([0.25, 0.5, 0.25]), entropy(matrix)
    a, b = (rng.normal(size=(2, 3)).astype("f4") for _ in range(2))
    best = functools.partial(levels.at_best, mode="min", window=2)
    floor = levels.noise_floor
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    frequencies, one, zero = np.float32(true @ matrix), np.float32(1), np.float32(0)
    rows = {
        # a call, its arrays, and what it gives
        "entropy_floor": (levels.entropy_floor, [probs], entropy(probs)),
        "noise_floor, matrix": (floor, [matrix], each),
        "noise_floor, frequencies": (
            lambda m, f: floor(m, label_frequencies=f),
            *([matrix, frequencies], each @ true),
        ),
        "noise_floor, all": (lambda rate: floor(rate, 3), [one], np.log(2)),
        "noise_floor, none": (lambda rate: floor(rate, 3), [zero], 0.0),
        # Class 0 reaches its threshold 1 once; class 1, .625, once, and class 2 twice.
        "noise_matrix": (
            *(levels.noise_matrix, [probs, labels]),
            np.float32([[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ),
        # of the two that are certain
        "noise_rate": (levels.noise_rate, [probs, np.int32([1, 1, 1, 0])], 1.0),
        "at_best, integers": (best, [losses, np.int32([9, 4, 3, 8])], 0.5),
        "at_best": (best, [losses, np.float32([9, 4, 3, 8])], 0.5),
        "accordance": (levels.gradient_accordance, [a, b], cosine),
        "accordance with 0": (levels.gradient_accordance, [a, 0 * b], 0.0),
        "adaflood": (
            lambda a: levels.adaflood(a, 0.5),
            *([losses], -np.log(0.5 * np.exp(-losses) + 0.5)),
        ),
        "wavebound": (levels.wavebound, [losses, np.float32(0.125)], losses - 0.125),
    }
    calls = {name: call for name, (call, _, _) in rows.items()}
    given = {name: arrays for name, (_, arrays, _) in rows.items()}
    run = lambda given: {name: calls[name](*given[name]) for name in calls}
    for name, got in in_mode(mode, run, given).items():
        exact = rows[name][2]
        assert got.dtype == np.float32 or "floor" in name, name
        rtol, atol = (1e-5, 1e-7) if "floor" in name else (9e-7 * (name in ROUNDED), 0)
        np.testing.assert_allclose(got, exact, rtol, atol, err_msg=name)


def check_schedules(mode):
    optimizer = scale_by_flood(levels.warmup(0.5, 2))
    run = lambda values: forms.course(optimizer, value=values)["multiplier"]
    values = np.float32([0.3, 0.3, 0.3, 0.7])
    same_bits(in_mode(mode, run, values), np.float32([1, 1, -1, 1]))


def check_vector_losses_are_refused(mode):
    vector = jnp.ones((1,))
    params = jnp.zeros(3)
    for optimizer in (scale_by_flood(0.5), flood(optax.sgd(1.0), 0.5, every_k=2)):
        state = optimizer.init(params)
        refused = pytest.raises(ValueError, match=r"must be a scalar, got shape \(1,\)")
        with mode.context(), refused:
            optimizer.update(params, state, params, value=vector)


CHECKS = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("mode", slow_but(EVERY_TIME, MODES))
def test_both_forms_equal_numpy_in_mode(mode, check):
    processes.assert_held(f"{mode}: {check}", __file__, mode in EVERY_TIME)


if __name__ == "__main__":
    processes.report(
        {
            f"{name}: {check}": functools.partial(function, mode)
            for name, mode in MODES.items()
            if str(name in EVERY_TIME) == sys.argv[1]
            for check, function in CHECKS.items()
        }
    )
