"""One run of any method of the family: what all share, and where they differ."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from benchmarks import networks, pixels, training
from benchmarks.training import cross_entropy, grad, scan


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all methods share."""

    widths: tuple[int, ...] = (64,)
    learning_rate: float = 0.1
    momentum: float = 0.9
    batch: int = 100
    epochs: int = 100
    folds: int = 5  # of AdaFlood
    held_out_epochs: int = 20  # of its auxiliary models
    decay: float = 0.99  # of WaveBound's moving average
    warm_epochs: int = 10  # before the average lags behind
    patience: int = 3  # of the level on the plateau, in epochs


# 60 times as many images, so fewer rounds of them
FULL = Protocol(epochs=10, held_out_epochs=2, warm_epochs=1, patience=1)
SMOKE = Protocol((8,), batch=50, epochs=2, held_out_epochs=1, warm_epochs=1, patience=1)


Loss = Callable[[Any, jax.Array], jax.Array]  # (params, batch of indices) -> loss


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network and how it is trained."""

    net: networks.MLP
    protocol: Protocol

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        return self.net.init(key, x)

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        return cast(jax.Array, self.net.apply(params, x))

    def losses(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(self.logits(params, x), y)

    def evaluate(self, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return training.loss_and_accuracy(self.logits(params, x), y)

    def features(self, params: Any, x: jax.Array) -> jax.Array:
        """What the last layer sees."""
        _, seen = cast(Any, self.net.apply)(params, x, capture_intermediates=True)
        last_hidden = f"Dense_{len(self.protocol.widths) - 1}"
        return jax.nn.relu(seen["intermediates"][last_hidden]["__call__"][0])

    def optimizer(self) -> optax.GradientTransformation:
        return optax.sgd(self.protocol.learning_rate, self.protocol.momentum)

    def batches(self, key: jax.Array, size: int) -> jax.Array:
        """One epoch of indices, [steps, batch]."""
        return training.batches(key, size, self.protocol.batch)

    def fit(
        self, loss_fn: Loss, params: Any, key: jax.Array, *, size: int, epochs: int
    ) -> Any:
        """Plain training on indices below `size`."""
        optimizer = self.optimizer()

        def step(carry: Any, batch: jax.Array) -> Any:
            params, state = carry
            updates, state = optimizer.update(grad(loss_fn)(params, batch), state)
            return (optax.apply_updates(params, updates), state), None

        def epoch(carry: Any, key: jax.Array) -> Any:
            return scan(step, carry, self.batches(key, size))

        carry = (params, optimizer.init(params))
        return scan(epoch, carry, jax.random.split(key, epochs))[0][0]


class Start(NamedTuple):
    """What a method may use before it trains; the key is its own."""

    model: Classifier
    params: Any
    x: jax.Array
    y: jax.Array
    number: jax.Array
    key: jax.Array


class Known(NamedTuple):
    """What it finds out there: losses of models that left the example out, a level."""

    held_out: jax.Array
    level: jax.Array


class Seen(NamedTuple):
    """What an objective may use of a batch."""

    logits: jax.Array
    labels: jax.Array
    losses: jax.Array
    held_out: jax.Array  # losses under models that left the example out (AdaFlood)
    frequency: jax.Array  # of each class in the training set, of the largest
    target_loss: jax.Array  # of the moving average of the model (WaveBound)
    level: jax.Array  # one that is found on the way
    epoch: jax.Array


Objective = Callable[[Seen, jax.Array], jax.Array]  # (batch, the method's number)
Watch = Callable[[Any, jax.Array], tuple[jax.Array, Any]]  # (state, validation loss)


def plain(seen: Seen, _: jax.Array) -> jax.Array:
    return seen.losses.mean()


def nothing(start: Start) -> Known:
    return Known(jnp.zeros(len(start.y)), jnp.float32(0))


def unchanged(
    _: jax.Array, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    return inner


def newest(params: Any, _: Any, __: jax.Array, ___: Protocol) -> Any:
    return params


def constant(level: jax.Array, _: jax.Array, __: Protocol) -> tuple[Any, Watch]:
    return level, lambda state, _: (state, state)


@dataclasses.dataclass(frozen=True)
class Method:
    """An objective with one number to choose, and hooks for what else a method does.

    Attributes:
      title: what the tables call it.
      number: what they call its number; "-" if it has none.
      candidates: the numbers to choose from, or these by the share of flipped labels.
      objective: what is descended on a batch.
      prepare: what is found out before it trains.
      optimizer: from the number and plain SGD to what takes its place.
      deploy: from the new parameters, the model deployed so far, the epoch and the
        protocol to the model deployed from now on.
      watch: from the first level, the number and the protocol to a state, and what
        makes of that and the validation loss of an epoch a level and the next state.
    """

    title: str
    number: str
    candidates: Sequence[float] | Mapping[float, Sequence[float]]
    objective: Objective = plain
    prepare: Callable[[Start], Known] = nothing
    optimizer: Callable[
        [jax.Array, optax.GradientTransformation], optax.GradientTransformation
    ] = unchanged
    deploy: Callable[[Any, Any, jax.Array, Protocol], Any] = newest
    watch: Callable[[jax.Array, jax.Array, Protocol], tuple[Any, Watch]] = constant

    def numbers(self, noise: float) -> tuple[float, ...]:
        """The numbers to choose from."""
        given = self.candidates
        return tuple(given[noise] if isinstance(given, Mapping) else given)


class Run(NamedTuple):
    """What changes from step to step."""

    params: Any
    state: Any
    target: Any  # what is deployed: the model itself, but for WaveBound
    level: jax.Array


def trainer(
    images: pixels.Images, noise: float, method: Method, protocol: Protocol
) -> training.Train:
    """One run of a method: (its number, key) -> what it reaches.

    The key decides images, flips, initialisation and batches, the same for all methods.
    Test labels are clean, validation labels as noisy as those trained on.
    """
    n = images.train_size
    model = Classifier(networks.MLP(protocol.widths, pixels.CLASSES), protocol)

    def train(number: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        (train_x, train_y), validation, test = pixels.draw(images, noise, keys[0])
        counts = jnp.bincount(train_y, length=pixels.CLASSES)
        start = model.init(keys[1], train_x)
        known = method.prepare(Start(model, start, train_x, train_y, number, keys[3]))
        optimizer = optax.with_extra_args_support(
            method.optimizer(number, model.optimizer())
        )
        watching, watch = method.watch(known.level, number, protocol)

        def objective(
            params: Any, run: Run, epoch: jax.Array, batch: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            x, y = train_x[batch], train_y[batch]
            logits = model.logits(params, x)
            losses = cross_entropy(logits, y)
            target_loss = model.losses(run.target, x, y).mean()
            seen = Seen(
                logits=logits,
                labels=y,
                losses=losses,
                held_out=known.held_out[batch],
                frequency=counts / counts.max(),
                target_loss=jnp.where(
                    epoch < protocol.warm_epochs, -jnp.inf, target_loss
                ),
                level=run.level,
                epoch=epoch,
            )
            return method.objective(seen, number), losses.mean()

        def step(carry: tuple[Run, jax.Array], batch: jax.Array) -> Any:
            run, epoch = carry

            def gradient(params: Any, _: Any) -> Any:  # SAM asks for a second one
                return grad(objective, has_aux=True)(params, run, epoch, batch)[0]

            grads, loss = grad(objective, has_aux=True)(run.params, run, epoch, batch)
            updates, state = optimizer.update(
                grads, run.state, run.params, grad_fn=gradient
            )
            params = optax.apply_updates(run.params, updates)
            target = method.deploy(params, run.target, epoch, protocol)
            return (Run(params, state, target, run.level), epoch), loss

        def one_epoch(carry: Any, now: tuple[jax.Array, jax.Array]) -> Any:
            (run, watching), (number_of, shuffle) = carry, now
            (run, _), losses = scan(step, (run, number_of), model.batches(shuffle, n))
            reached = model.evaluate(run.target, *validation)
            level, watching = watch(watching, reached[0])
            run = run._replace(level=level)
            seen = {"train_loss": losses.mean(), "validation_accuracy": reached[1]}
            new = (run.target, reached[1])
            return (run, watching), new, seen | {"level": level}

        run = Run(start, optimizer.init(start), start, known.level)
        epochs = jnp.arange(protocol.epochs), jax.random.split(keys[2], protocol.epochs)
        (run, _), best, metrics = training.last_and_best(
            one_epoch, (run, watching), (start, jnp.float32(-1)), over=epochs
        )
        metrics["last"] = model.evaluate(run.target, *test)
        metrics["best"] = model.evaluate(best, *test)
        return metrics

    return train
