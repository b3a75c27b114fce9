"""`raw_value`, for trainers that log and evaluate by their training loss; and Keras."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flood_optax import flooded, shapes
from tests import processes

# ---- keras, whose backend is chosen once per process: the real one ----

KERAS = textwrap.dedent("""
    import pathlib
    import keras
    import numpy as np
    from benchmarks.trainers import keras as ours, page, rows

    run = rows.Run(ours.SECTION, pathlib.Path(), smoke=True)


    def history(twice=False, sample_weight=None, **options):
        model = ours.made(run, **options)
        if twice:  # the end of the cell
            exec(page.blocks(ours.SECTION)[0].partition('loss="mse")')[2], names(model))
        model.compile(ours.adam(), "mse", metrics=["mse"])
        return ours.fit(model, 100, sample_weight=sample_weight)


    def names(model):
        import functools, flood_optax
        return {"model": model, "flooded": flood_optax.flooded, "functools": functools}


    shown = ours.fit(ours.plain(ours.FloodedLoss()), 100)
    assert shown["val_mse"].min() < 0.12, shown["val_mse"].min()
    assert shown["val_loss"].min() >= 0.2  # flooded: a floor under the criterion
    assert shown["val_loss"].argmin() != shown["val_mse"].argmin()
    assert abs(shown["mse"][-20:].mean() - 0.2) < 0.03

    shown = history(twice=True)
    np.testing.assert_allclose(shown["val_loss"], shown["val_mse"], rtol=1e-5)
    np.testing.assert_allclose(shown["loss"], shown["mse"], rtol=1e-5)  # raw, too
    assert abs(shown["mse"][-20:].mean() - 0.2) < 0.03

    # weights: Keras adds w l and divides by n, so weights of .25 make the mean .8
    shown = history(sample_weight=np.full(64, 0.25, "float32"))
    assert shown["mse"][-20:].min() > 0.3, shown["mse"][-20:]

    # a penalty of a layer is part of compute_loss, and counts
    shown = history(kernel_regularizer=keras.regularizers.L2(0.01))
    assert shown["mse"][-20:].mean() < 0.18, shown["mse"][-20:]
""")


@pytest.mark.slow  # it imports Keras
def test_keras_floods_evaluation_by_the_loss_and_not_by_compute_loss():
    process = processes.start(
        "-c", KERAS, filters=("error::UserWarning",), KERAS_BACKEND="jax"
    )
    code, _, err = processes.end(process)
    assert code == 0, err[-3000:]


# ---- the raw value itself; tests/modules/test_bend.py has its derivatives ----


@functools.cache
def with_raw_value(dtype):
    """Value, info and gradient of a loss at a level, with the raw value and without."""

    def cube(w, loss):
        return (loss * w**3).astype(dtype), loss

    def run(loss, level):
        options = {"has_aux": True, "return_info": True, "shape": shapes.soft(0.5)}
        for raw_value in (True, False):
            objective = flooded(cube, level, raw_value=raw_value, **options)
            yield jax.value_and_grad(objective, has_aux=True)(jnp.float32(1.0), loss)

    return jax.jit(lambda *given: list(run(*given)))


@pytest.mark.parametrize("level", [0.3, -np.inf])
@pytest.mark.parametrize("loss", [0.75, 0.3, 0.1, np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_raw_value_changes_the_value_and_nothing_else(loss, level, dtype):
    ((value, info), grad), ((bent, expected_info), expected) = with_raw_value(dtype)(
        np.float32(loss), np.float32(level)
    )
    assert value.dtype == bent.dtype == dtype
    rounded = np.float32(np.float32(loss).astype(dtype))
    np.testing.assert_array_equal(np.float32(value), rounded)
    np.testing.assert_array_equal(grad, expected)
    for got, other in zip(info, expected_info, strict=True):
        np.testing.assert_array_equal(np.float32(got), np.float32(other))
    np.testing.assert_array_equal(info.aux, np.float32(loss))


def test_raw_value_over_an_axis_is_the_global_mean():
    """Local losses .05 and .45: the mean, .25, is below the level, one of them not."""
    w, x = jnp.array([0.5]), jnp.array([[0.1], [0.9]])
    objective = flooded(lambda w, x: w @ x, 0.3, axis_name="data", raw_value=True)
    step = jax.value_and_grad(objective)
    values, grads = jax.jit(jax.vmap(step, (None, 0), axis_name="data"))(w, x)
    np.testing.assert_allclose(values, [0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(grads, -x, rtol=1e-6)

    def sharded(w, x):
        value, grads = step(jax.lax.pcast(w, "data", to="varying"), x[0])
        return jax.lax.pmean(value, "data"), jax.lax.pmean(grads, "data")

    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
    value, grads = jax.jit(jax.shard_map(sharded, mesh=mesh, **specs))(w, x[:1])
    np.testing.assert_allclose(value, 0.05, rtol=1e-6)
    np.testing.assert_allclose(grads, -x[0], rtol=1e-6)
