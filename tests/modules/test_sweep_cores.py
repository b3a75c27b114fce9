"""Runs of a sweep on the cores of a CPU: at once, and as if one after another."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from flood_optax import sweep
from flood_optax.sweep import cores

KEYS = jax.random.split(jax.random.key(0), 3)
LEVELS = [0.0, 0.125, 0.5]


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(cores, "number_of_cores", lambda: 2)


def meeting():
    """A function of a level that returns when two threads are in it."""
    barrier = threading.Barrier(2)

    def meet(level):
        barrier.wait(timeout=30)
        return level

    return lambda level: jax.pure_callback(
        meet, jax.ShapeDtypeStruct((), jnp.float32), level
    )


def test_map_runs_as_many_at_a_time_as_there_are_cores():
    meet = meeting()
    result = sweep.run(
        lambda level, key: {"level": meet(level)}, LEVELS, KEYS[:2], strategy="map"
    )
    np.testing.assert_array_equal(result.metrics["level"], np.transpose([LEVELS] * 2))


def test_forked_runs_as_many_branches_at_a_time_as_there_are_cores():
    meet = meeting()

    def step(w, rate, level):
        # the trunk is alone, and meets nobody
        alone = level == -1
        met = jax.lax.cond(alone, lambda level: level, meet, level)
        turned = jnp.where(w < met, -1.0, 1.0)
        return w - rate * turned, {"loss": w}

    levels = [-1.0, 0.25, 0.75]  # two branches of as many steps, at the end of the run
    rates = jnp.array([0.0, 0.0, 0.0, 2.0])
    result = sweep.forked(step, jnp.float32(1), rates, levels)
    assert result.steps_run == 4 + 2 * 2


def test_runs_with_ordered_effects_are_in_order():
    seen = []

    def note(level):
        seen.append(float(level))
        return level

    def train(level, key):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return {"level": io_callback(note, like, level, ordered=True)}

    levels = np.linspace(0, 1, 17, dtype=np.float32)
    sweep.run(train, levels, KEYS[:1], strategy="map")
    assert seen == levels.tolist()


def test_settings_of_the_calling_thread_hold_in_every_run():
    def train(level, key):
        return {"x": jnp.sin(level) + jnp.linspace(0, 1, 3)}

    levels = np.array(LEVELS) + 1e-12  # lost in float32
    with jax.enable_x64(True):
        result = sweep.run(train, levels, KEYS, strategy="map")
    expected = np.sin(levels)[:, None, None] + np.broadcast_to([0, 0.5, 1], (3, 3, 3))
    assert result.metrics["x"].dtype == np.float64
    np.testing.assert_allclose(result.metrics["x"], expected, rtol=1e-14)


def test_check_for_nan_of_the_calling_thread_is_made():
    def train(level, key):
        return {"x": jnp.log(level - 0.25)}

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        sweep.run(train, LEVELS, KEYS, strategy="map")


def test_error_in_a_run_ends_the_sweep():
    def refuse(level):
        if level == 0.125:
            raise ValueError("no such level")
        return level

    def train(level, key):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return {"level": jax.pure_callback(refuse, like, level)}

    with pytest.raises(jax.errors.JaxRuntimeError, match="no such level"):
        sweep.run(train, LEVELS, KEYS, strategy="map")
