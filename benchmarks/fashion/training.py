"""One run of iFlood or SoftAD as its authors set it up, but for the epochs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import networks, pixels, training
from flood_optax import flood_mean, shapes

OBJECTIVES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "plain": lambda losses, _: losses.mean(),
    "iflood": lambda losses, b: flood_mean(losses, b, over="example"),
    "softad": lambda losses, b: flood_mean(
        losses, b, over="example", shape=shapes.soft()
    ),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Theirs, but for the epochs."""

    widths: tuple[int, ...] = (1000,)
    batch_norm: bool = True
    learning_rate: float = 0.1
    momentum: float = 0.9
    batch: int = 200
    epochs: int = 20
    looks: int = 5  # evaluations on the way, the last at the end


SMOKE = Protocol((8,), batch=50, epochs=4, looks=2)


def trainer(images: pixels.Images, name: str, protocol: Protocol) -> training.Train:
    """One run: (level, key) -> loss and accuracy of the three sets at every look.

    The key decides the split, initialisation and batches, the same for all methods.
    """
    net = networks.MLP(protocol.widths, 10, batch_norm=protocol.batch_norm)
    optimizer = optax.sgd(protocol.learning_rate, protocol.momentum)

    def evaluate(model: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return training.loss_and_accuracy(net.apply(model, x), y)

    def train(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        sets = pixels.draw(images, 0.0, keys[0])
        train_x, train_y = sets[0]
        start: Any = net.init(keys[1], train_x[:2], train=True)

        def objective(params: Any, stats: Any, batch: jax.Array) -> Any:
            model = {"params": params, "batch_stats": stats}
            out: Any = net.apply(
                model, train_x[batch], train=True, mutable=["batch_stats"]
            )
            logits, new = out
            losses = training.cross_entropy(logits, train_y[batch])
            return OBJECTIVES[name](losses, level), new["batch_stats"]

        def step(carry: Any, batch: jax.Array) -> Any:
            model, state = carry
            grads, stats = training.grad(objective, has_aux=True)(
                model["params"], model["batch_stats"], batch
            )
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(model["params"], updates)
            return ({"params": params, "batch_stats": stats}, state), None

        def epoch(carry: Any, key: jax.Array) -> Any:
            batches = training.batches(key, images.train_size, protocol.batch)
            return training.scan(step, carry, batches)

        def look(carry: Any, keys: jax.Array) -> Any:
            carry, _ = training.scan(epoch, carry, keys)
            model = carry[0]
            reached = jnp.stack([evaluate(model, *one) for one in sets])
            return carry, {"reached": reached, "norm": optax.tree.norm(model["params"])}

        model = {part: start[part] for part in ("params", "batch_stats")}
        run = (model, optimizer.init(model["params"]))
        epoch_keys = jax.random.split(keys[2], protocol.epochs)
        looks = epoch_keys.reshape(protocol.looks, -1)
        _, metrics = training.scan(look, run, looks)
        metrics["validation_accuracy"] = metrics["reached"][:, 1, 1]
        return metrics

    return train
