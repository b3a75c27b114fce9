"""The synthetic problems, and one run on one of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flood_optax
from benchmarks import networks, training
from benchmarks.points import Set, draw
from benchmarks.training import loss_and_accuracy
from flood_optax import sharpness


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all runs share. Points are per class, for the sinusoid in total or half."""

    train_points: int = 100
    validation_points: int = 100
    test_points: int = 10_000
    widths: tuple[int, ...] = (500, 500, 500, 500)
    learning_rate: float = 1e-3
    epochs: int = 500  # of one full batch each


SMOKE = Protocol(test_points=50, widths=(8, 8), epochs=3)


def draw_splits(
    key: jax.Array, problem: str, noise: float, protocol: Protocol
) -> tuple[Set, Set, Set]:
    """Training, validation and test set, all with flipped labels."""
    test = protocol.test_points * (2 if problem == "sinusoid" else 1)
    sizes = (protocol.train_points, protocol.validation_points, test)
    keys = jax.random.split(key, 3)
    train, validation, test = (
        draw(k, problem, noise, n) for k, n in zip(keys, sizes, strict=True)
    )
    return train, validation, test


def trainer(
    problem: str, noise: float, protocol: Protocol, *, follow_test: bool = False
) -> training.Train:
    """One run: (level, key) -> curves, and what the last and best epoch reach.

    The key decides data, flips and initialisation. The best epoch is the first of
    highest validation accuracy, epoch 0 (before training) included; its parameters are
    kept on the way. With `follow_test` the test loss of every epoch is a metric too.
    """
    net = networks.MLP(protocol.widths, 2, batch_norm=True)
    optimizer = optax.adam(protocol.learning_rate)

    def train(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        data_key, init_key = jax.random.split(key)
        sets = draw_splits(data_key, problem, noise, protocol)
        train_set, validation_set, test_set = sets
        variables: Any = net.init(init_key, train_set.x, train=True)

        def loss_fn(params: Any, batch_stats: Any) -> tuple[jax.Array, Any]:
            seen = {"params": params, "batch_stats": batch_stats}
            out: Any = net.apply(seen, train_set.x, train=True, mutable=["batch_stats"])
            logits, new = out
            return loss_and_accuracy(logits, train_set.noisy)[0], new["batch_stats"]

        flooded_fn = flood_optax.flooded(loss_fn, level, has_aux=True, return_info=True)

        def raw_loss(params: Any, batch_stats: Any) -> jax.Array:
            return loss_fn(params, batch_stats)[0]

        def evaluate(model: Any, at: Set) -> jax.Array:
            logits: Any = net.apply(model, at.x)
            return jnp.stack([loss_and_accuracy(logits, y) for y in at[1:]])

        def curves(model: Any) -> dict[str, jax.Array]:
            seen = {"validation_accuracy": evaluate(model, validation_set)[0, 1]}
            if follow_test:
                seen["test_loss"] = evaluate(model, test_set)[0, 0]
            return seen

        def epoch(run: Any, _: None) -> Any:
            model, state = run
            (_, info), grads = training.value_and_grad(flooded_fn, has_aux=True)(
                model["params"], model["batch_stats"]
            )
            updates, state = optimizer.update(grads, state)
            params = optax.apply_updates(model["params"], updates)
            model = {"params": params, "batch_stats": info.aux}
            seen = curves(model)
            new = (model, seen["validation_accuracy"])
            return (model, state), new, {"loss": info.loss, **seen}

        before = curves(variables)
        (last, _), best, after = training.last_and_best(
            epoch,
            (variables, optimizer.init(variables["params"])),
            (variables, before["validation_accuracy"]),
            length=protocol.epochs,
        )
        metrics: dict[str, jax.Array] = {
            "train_loss": after.pop("loss"),
            **{k: jnp.append(before[k], after[k]) for k in before},
        }
        for name, model in {"last": last, "best": best}.items():
            metrics[name] = jnp.stack([evaluate(model, one) for one in sets])
            metrics[f"gradient_norm_{name}"] = sharpness.gradient_norm(
                raw_loss, model["params"], model["batch_stats"]
            )
        return metrics

    return train
