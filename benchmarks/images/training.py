"""One run of the paper's network on images, and what is measured of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flood_optax
from benchmarks import networks, pixels, training
from flood_optax import sharpness


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The paper's setting, but for the number of images and epochs (there 500)."""

    widths: tuple[int, ...] = (1000, 1000)
    learning_rate: float = 0.1
    momentum: float = 0.9
    batch: int = 200
    epochs: int = 60
    ece_bins: int = 15
    flatness_points: int = 250
    flatness_probes: int = 8
    flatness_iterations: int = 15


SMOKE = Protocol((16,), batch=50, epochs=2, flatness_points=20, flatness_probes=2)


def trainer(images: pixels.Images, noise: float, protocol: Protocol) -> training.Train:
    """One run: (level, key) -> what it reaches, and flatness before and after.

    The key decides the training images, the flips, initialisation and batches. Before
    flooding is where the loss of a batch first falls below the level: until there the
    run is plain training.
    """
    net = networks.MLP(protocol.widths, pixels.CLASSES)
    optimizer = optax.sgd(protocol.learning_rate, protocol.momentum)

    def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return training.cross_entropy(net.apply(params, x), y).mean()

    def evaluate(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Loss, accuracy and calibration error."""
        logits: Any = net.apply(params, x)
        ece = training.expected_calibration_error(logits, y, protocol.ece_bins)
        return jnp.append(training.loss_and_accuracy(logits, y), ece)

    def flatness(params: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> jax.Array:
        batch = (x[: protocol.flatness_points], y[: protocol.flatness_points])
        trace, _ = sharpness.hessian_trace(
            loss_fn, params, *batch, key=key, num_samples=protocol.flatness_probes
        )
        top, _ = sharpness.top_eigenvalue(
            loss_fn,
            params,
            *batch,
            key=key,
            num_iterations=protocol.flatness_iterations,
        )
        return jnp.stack([sharpness.gradient_norm(loss_fn, params, *batch), trace, top])

    def train(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        (train_x, train_y), validation, test = pixels.draw(images, noise, keys[0])
        start: Any = net.init(keys[1], train_x)
        value_and_grad = training.value_and_grad(
            flood_optax.flooded(loss_fn, level, return_info=True), has_aux=True
        )

        def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
            params, state, before, entered = carry
            (_, info), grads = value_and_grad(params, train_x[batch], train_y[batch])
            enters = ~entered & (info.loss < level)
            before = training.cond(enters, lambda: params, lambda: before)
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(params, updates)
            return (params, state, before, entered | enters), info.loss

        def epoch(run: Any, key: jax.Array) -> Any:
            batches = training.batches(key, images.train_size, protocol.batch)
            run, losses = training.scan(step, run, batches)
            accuracy = evaluate(run[0], *validation)[1]
            seen = {"train_loss": losses.mean(), "validation_accuracy": accuracy}
            share = (losses < level).mean()
            return run, (run[0], accuracy), seen | {"share_below": share}

        run, best, metrics = training.last_and_best(
            epoch,
            (start, optimizer.init(start), start, jnp.array(False)),
            (start, evaluate(start, *validation)[1]),
            over=jax.random.split(keys[2], protocol.epochs),
        )
        metrics["last"] = evaluate(run[0], *test)
        metrics["best"] = evaluate(best, *test)
        metrics["entered"] = run[3]
        batch = (train_x, train_y, keys[3])
        metrics["flatness_before"] = flatness(run[2], *batch)
        metrics["flatness_after"] = flatness(run[0], *batch)
        return metrics

    return train
