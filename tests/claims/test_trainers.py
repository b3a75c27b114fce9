"""`raw_value`, for trainers that log and evaluate by their training loss; and Keras."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flood_optax import flooded, shapes
from tests import processes

X = jax.random.normal(jax.random.key(0), (64, 4))
Y = jnp.sin(X[:, 0]) + 0.3 * X[:, 1]
START = jnp.zeros(4)


def loss_fn(w, x, y):
    return jnp.mean((x @ w - y) ** 2)


@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["below", "above"])
def test_raw_value_has_the_gradient_of_the_flooded_loss(scale):
    w = START + scale * jnp.array([0.9, 0.3, 0.1, -0.1])
    value, grads = jax.value_and_grad(flooded(loss_fn, 0.3, raw_value=True))(w, X, Y)
    assert value == loss_fn(w, X, Y)
    residual = np.asarray(X @ w - Y, np.float64)
    loss, gradient = np.mean(residual**2), 2 / 64 * np.asarray(X).T @ residual
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    sign = 1 if loss >= 0.3 else -1
    np.testing.assert_allclose(grads, sign * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", [0.3, -jnp.inf])
@pytest.mark.parametrize("loss", [0.75, 0.3, 0.1, jnp.nan, jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_raw_value_changes_the_value_and_nothing_else(loss, level, dtype):
    def cube(w, aux):
        return (loss * w**3).astype(dtype), aux

    def both(raw_value):
        objective = flooded(
            cube, level, has_aux=True, return_info=True, raw_value=raw_value,
            shape=shapes.soft(0.5),
        )  # fmt: skip
        return jax.value_and_grad(objective, has_aux=True)(jnp.float32(1.0), "aux")

    (value, info), grad = both(raw_value=True)
    (bent, expected_info), expected = both(raw_value=False)
    assert value.dtype == bent.dtype == dtype
    np.testing.assert_array_equal(
        np.float32(value), np.float32(jnp.asarray(loss, dtype))
    )
    np.testing.assert_array_equal(grad, expected)
    np.testing.assert_array_equal(info[:3], expected_info[:3])
    assert info.aux == "aux"
    second, expected = (
        jax.grad(jax.grad(flooded(lambda w: w**3, 0.3, shape=shapes.soft(), **kind)))
        for kind in ({"raw_value": True}, {})
    )
    assert second(0.5) == expected(0.5)


def test_raw_value_over_an_axis_is_the_global_mean():
    """Local losses .05 and .45: the mean, .25, is below the level, one of them not."""
    w, x = jnp.array([0.5]), jnp.array([[0.1], [0.9]])
    objective = flooded(lambda w, x: w @ x, 0.3, axis_name="data", raw_value=True)
    step = jax.value_and_grad(objective)
    mapped = jax.vmap(step, (None, 0), axis_name="data")
    values, grads = mapped(w, x)
    np.testing.assert_allclose(values, [0.25, 0.25], rtol=1e-6)
    np.testing.assert_allclose(grads, -x, rtol=1e-6)

    def sharded(w, x):
        value, grads = step(jax.lax.pcast(w, "data", to="varying"), x[0])
        return jax.lax.pmean(value, "data"), jax.lax.pmean(grads, "data")

    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    split = jax.shard_map(
        sharded, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P())
    )
    value, grads = jax.jit(split)(w, x[:1])
    np.testing.assert_allclose(value, 0.05, rtol=1e-6)
    np.testing.assert_allclose(grads, -x[0], rtol=1e-6)


# ---- keras, whose backend is chosen once per process ----

KERAS = textwrap.dedent("""
    import functools
    import jax
    import keras
    import numpy as np
    from flood_optax import flood_loss, flooded

    LEVEL = 0.2


    class FloodedLoss(keras.losses.MeanSquaredError):
        def __call__(self, y_true, y_pred, sample_weight=None):
            loss = super().__call__(y_true, y_pred, sample_weight)
            return flood_loss(loss, LEVEL)


    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 4)).astype("float32")
    y = np.sin(x[:, :1]) + 0.3 * x[:, 1:2]
    easy = (0.5 * x[:32], np.sin(0.5 * x[:32, :1]) + 0.15 * x[:32, 1:2])


    def history(loss, flood=False, sample_weight=None, **options):
        keras.utils.set_random_seed(1)
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(16, activation="tanh", **options)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
        if flood:
            for level in (9.0, LEVEL):  # the cell of docs/trainers.md, run twice
                plain = functools.partial(type(model).compute_loss, model)
                model.compute_loss = flooded(plain, level, raw_value=True)
            try:
                flooded(model.compute_loss, LEVEL, raw_value=True)
            except ValueError as error:
                assert "is flooded already" in str(error), error
            else:
                raise AssertionError("flooded twice")
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss, metrics=["mse"])
        done = model.fit(
            x, y, epochs=100, batch_size=96, verbose=0,
            validation_data=easy, sample_weight=sample_weight,
        )
        return {name: np.array(values) for name, values in done.history.items()}

    shown = history(FloodedLoss())
    assert shown["val_mse"].min() < LEVEL / 2, shown["val_mse"].min()
    assert shown["val_loss"].min() >= LEVEL  # flooded: a floor under the criterion
    assert shown["val_loss"].argmin() != shown["val_mse"].argmin()
    assert abs(shown["mse"][-20:].mean() - LEVEL) < 0.03

    shown = history("mse", flood=True)
    np.testing.assert_allclose(shown["val_loss"], shown["val_mse"], rtol=1e-5)
    assert abs(shown["mse"][-20:].mean() - LEVEL) < 0.03
    np.testing.assert_allclose(shown["loss"], shown["mse"], rtol=1e-5)  # raw, too

    # weights: Keras adds w l and divides by n, so weights of .25 make the mean .8
    shown = history("mse", flood=True, sample_weight=np.full(96, 0.25, "float32"))
    assert shown["mse"][-20:].min() > 1.5 * LEVEL, shown["mse"][-20:]

    # a penalty of a layer is part of compute_loss, and counts
    penalty = keras.regularizers.L2(0.01)
    shown = history("mse", flood=True, kernel_regularizer=penalty)
    assert shown["mse"][-20:].mean() < LEVEL - 0.02, shown["mse"][-20:]
""")


def test_keras_floods_evaluation_by_the_loss_and_not_by_compute_loss():
    process = processes.start(
        "-c", KERAS, filters=("error::UserWarning",), KERAS_BACKEND="jax"
    )
    code, _, err = processes.end(process)
    assert code == 0, err[-3000:]
