"""Keras 3 on JAX: `fit` with validation and callbacks."""

import functools
from typing import Any

import keras
import numpy as np

from benchmarks.trainers import problem, rows
from flood_optax import flood_loss, flooded

TITLE = "Keras 3 on JAX"
SECTION = "Keras"
REQUIREMENTS = ("keras==3.15.1", "jax==0.12.0.1", "optax==0.2.8")
VARIABLES = {"KERAS_BACKEND": "jax"}
LEVEL = problem.LEVEL
X, Y = problem.X, problem.Y[:, None]
VALID = problem.VALID_X, problem.VALID_Y[:, None]


def network(**options: Any) -> dict[str, Any]:
    """The inputs and outputs of a small network, the same each time."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(32, activation="tanh", **options)(inputs)
    return {"inputs": inputs, "outputs": keras.layers.Dense(1, dtype="float32")(hidden)}


def fit(model: Any, epochs: int, **options: Any) -> dict[str, np.ndarray]:
    """What `fit` logs in training by whole batches, or as the options say."""
    options = {"batch_size": len(X), "validation_data": VALID, "verbose": 0} | options
    done = model.fit(X, Y, epochs=epochs, **options)
    return {name: np.array(values) for name, values in done.history.items()}


def adam(**options: Any) -> Any:
    return keras.optimizers.Adam(0.01, **options)


class FloodedLoss(keras.losses.MeanSquaredError):
    """The wrong place: validation calls it, too."""

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return flood_loss(super().__call__(y_true, y_pred, sample_weight), LEVEL)


class FloodedCall(keras.losses.MeanSquaredError):
    """The wrong place: before the mean over the batch."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return flood_loss(super().call(y_true, y_pred), LEVEL)


def plain(loss: Any) -> Any:
    model = keras.Model(**network())
    model.compile(optimizer=adam(), loss=loss, metrics=["mse"])
    return model


def end(values: np.ndarray) -> float:
    return float(values[-rows.LAST :].mean())


def made(run: rows.Run, **options: Any) -> Any:
    """The model of the recipe."""
    return run.recipe(keras=keras, **network(**options))["model"]


def window() -> float:
    """How far four accumulated micro-batches are from the step of the whole batch.

    The level is just below the loss of the whole batch, so that one descends.
    """

    def step(size: int) -> np.ndarray:
        model: Any = keras.Model(**network())
        model.compile(loss="mse")
        level = model.evaluate(X, Y, verbose=0) * 0.999
        often = len(X) // size
        sgd = keras.optimizers.SGD(
            0.01, gradient_accumulation_steps=often if often > 1 else None
        )
        model.compile(sgd, "mse")
        plain = functools.partial(type(model).compute_loss, model)
        model.compute_loss = flooded(plain, level, raw_value=True)
        before = model.get_weights()
        model.fit(X, Y, batch_size=size, shuffle=False, verbose=0)
        moved = zip(model.get_weights(), before, strict=True)
        return np.concatenate([(after - start).ravel() for after, start in moved])

    whole = step(64)
    return float(np.linalg.norm(step(16) - whole) / np.linalg.norm(whole))


def measure(run: rows.Run) -> rows.Row:
    steps = run.steps(200)
    model = made(run)
    raw: list[float] = []

    def evaluate(*_: Any) -> None:
        raw.append(float(np.mean((np.asarray(model(VALID[0])) - VALID[1]) ** 2)))

    best = run.work / "best.keras"
    watch = [
        keras.callbacks.LambdaCallback(on_epoch_end=evaluate),
        keras.callbacks.EarlyStopping(patience=steps),
        keras.callbacks.ModelCheckpoint(str(best), save_best_only=True),
    ]
    log = fit(model, steps, callbacks=watch)
    stopped: Any = watch[1]
    assert stopped.best_epoch == int(np.argmin(raw))
    chosen: Any = keras.models.load_model(best)
    assert abs(chosen.evaluate(*VALID, verbose=0) - min(raw)) < 1e-6

    # steps_per_execution, on four batches an epoch, unshuffled
    def in_parts(together: int) -> Any:
        other = made(run)
        other.compile(adam(), "mse", steps_per_execution=together)
        fit(other, 20, batch_size=16, shuffle=False)
        return other.get_weights()

    assert rows.distance(in_parts(1), in_parts(4)) < 1e-6

    # mixed precision: the loss is scaled after `compute_loss`
    half = made(run, dtype="mixed_float16")
    half.compile(keras.optimizers.LossScaleOptimizer(adam()), "mse")
    mixed = end(fit(half, steps)["loss"])
    assert abs(mixed - LEVEL) < 0.2 * LEVEL, mixed

    # a run that is resumed from a saved model
    whole = made(run)
    fit(whole, 40)
    first = made(run)
    fit(first, 20)
    first.save(run.work / "half.keras")
    second: Any = keras.models.load_model(run.work / "half.keras")
    original = functools.partial(type(second).compute_loss, second)
    second.compute_loss = flooded(original, LEVEL, raw_value=True)
    fit(second, 20)

    shown = fit(plain(FloodedLoss()), steps)
    each = fit(plain(FloodedCall()), steps)
    weighted = made(run)
    weighted.compile(adam(), "mse", metrics=["mse"])
    by_weight = fit(weighted, steps, sample_weight=np.full(len(X), 0.5, np.float32))
    summed = made(run)
    summed.compile(adam(), keras.losses.MeanSquaredError("sum"), metrics=["mse"])
    by_sum = fit(summed, steps)
    return rows.Row(
        form="loss form, raw value",
        line="`model.compute_loss = flooded(plain, b, raw_value=True)`",
        logs="`loss` and `val_loss`, raw",
        level=LEVEL,
        losses=log["loss"].tolist(),
        value="it takes no optax",
        evaluation=log["val_loss"].tolist(),
        evaluation_raw=raw,
        evaluates_flooded=bool(shown["val_loss"].min() >= LEVEL > min(raw)),
        accumulates="each micro-batch",
        resume=rows.distance(whole.get_weights(), second.get_weights()),
        wrong=[
            rows.Wrong(
                "a loss class with a flooded `__call__`",
                "`val_loss` is {floor:.3f} at its least, the raw one {raw:.3f}; its "
                "best epoch is {epoch}, the raw one's {raw_epoch}",
                {
                    "floor": float(shown["val_loss"].min()),
                    "raw": float(shown["val_mse"].min()),
                    "epoch": int(shown["val_loss"].argmin()),
                    "raw_epoch": int(shown["val_mse"].argmin()),
                },
            ),
            rows.Wrong(
                "a loss class with a flooded `call`",
                "each example is flooded: raw loss {last:.3f}",
                {"last": end(each["mse"])},
            ),
            rows.Wrong(
                "`gradient_accumulation_steps=4`",
                "each micro-batch is flooded: the step is off the whole batch's by "
                "{off:.0%} of its length",
                {"off": window()},
            ),
            rows.Wrong(
                "`sample_weight` of .5 everywhere",
                "the weighted sum is divided by the number of examples: raw loss "
                "{last:.3f}",
                {"last": end(by_weight["mse"])},
            ),
            rows.Wrong(
                '`MeanSquaredError("sum")`',
                "the sum of 64 losses meets the level: raw loss {last:.4f}",
                {"last": end(by_sum["mse"])},
            ),
        ],
    )
