"""What some methods find out before they train: held-out losses, or a level."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from benchmarks import networks, pixels
from benchmarks.family.training import Classifier, Known, Start
from benchmarks.own_rules import accordance_level
from benchmarks.training import scan, value_and_grad
from flood_optax import levels


def left_out(model: Classifier, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
    """AdaFlood's auxiliary losses, all folds in one program."""
    folds, epochs = model.protocol.folds, model.protocol.held_out_epochs
    size = len(x) - len(x) // folds

    def fit(indices: jax.Array, key: jax.Array) -> Any:
        init_key, batch_key = jax.random.split(key)

        def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
            return model.losses(params, x[indices[batch]], y[indices[batch]]).mean()

        start = model.init(init_key, x)
        return model.fit(loss_fn, start, batch_key, size=size, epochs=epochs)

    def evaluate(params: Any, indices: jax.Array) -> jax.Array:
        return model.losses(params, x[indices], y[indices])

    return levels.held_out_losses(
        fit, evaluate, len(x), num_folds=folds, key=key, vmap=True
    )


def held_out(start: Start) -> Known:
    """AdaFlood: from a model for each fold."""
    return Known(left_out(start.model, start.x, start.y, start.key), jnp.float32(0))


def held_out_by_last_layer(start: Start) -> Known:
    """From one network, trained on everything but its re-fitted last layer."""
    model, x, y = start.model, start.x, start.y
    init_key, batch_key, fold_key = jax.random.split(start.key, 3)

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        return model.losses(params, x[batch], y[batch]).mean()

    epochs = model.protocol.held_out_epochs
    first = model.init(init_key, x)
    whole = model.fit(loss_fn, first, batch_key, size=len(x), epochs=epochs)
    last_layer = Classifier(networks.MLP((), pixels.CLASSES), model.protocol)
    losses = left_out(last_layer, model.features(whole, x), y, fold_key)
    return Known(losses, jnp.float32(0))


def level_from_accordance(start: Start) -> Known:
    """Trains plainly once, watching the two halves of every batch."""
    model, x, y = start.model, start.x, start.y
    optimizer = model.optimizer()

    def loss_fn(params: Any, indices: jax.Array) -> jax.Array:
        return model.losses(params, x[indices], y[indices]).mean()

    def mean(a: Any, b: Any) -> Any:
        return (a + b) / 2

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        first, second = jnp.split(batch, 2)
        loss_a, grads_a = value_and_grad(loss_fn)(params, first)
        loss_b, grads_b = value_and_grad(loss_fn)(params, second)
        updates, state = optimizer.update(jax.tree.map(mean, grads_a, grads_b), state)
        accordance = levels.gradient_accordance(grads_a, grads_b)
        params = optax.apply_updates(params, updates)
        return (params, state), (mean(loss_a, loss_b), accordance)

    def epoch(carry: Any, key: jax.Array) -> Any:
        carry, (losses, accordances) = scan(step, carry, model.batches(key, len(x)))
        return carry, (losses.mean(), accordances.mean())

    keys = jax.random.split(start.key, model.protocol.epochs)
    first = (start.params, optimizer.init(start.params))
    _, (losses, accordances) = scan(epoch, first, keys)
    threshold = cast(float, start.number)
    level = accordance_level(losses, accordances, threshold=threshold)
    return Known(jnp.zeros(len(y)), level)
