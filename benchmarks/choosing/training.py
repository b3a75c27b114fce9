"""One step of training, and the runs of a seed that are made of it."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from benchmarks import networks, training
from benchmarks.choosing.settings import Constants, Sets
from benchmarks.own_rules import on_plateau
from benchmarks.training import cond, cross_entropy, grad, scan
from flood_optax import flood_loss, flood_mean, levels, scale_by_flood

OFF = -jnp.inf


class Batch(NamedTuple):
    """Indices of the training set [batch], and what is to be done after the step."""

    indices: jax.Array
    check: jax.Array
    last: jax.Array


class State(NamedTuple):
    """The data with the run, so that one compiled step serves every seed."""

    sets: Sets
    params: Any
    optimizer: Any
    average: Any  # of the weights
    predicted: jax.Array  # classes of the training set at the last check


class Rival(NamedTuple):
    """What a run does beside or instead of flooding at one level; scalars."""

    decay: Any = 0.0
    smoothing: Any = 0.0
    gamma: Any = 1.0  # of AdaFlood, where every level is 0: off below 1
    initial: Any = OFF  # where a level on the plateau starts


@dataclasses.dataclass(frozen=True)
class Model:
    """A network and how it is trained; equal ones share their programs."""

    classes: int
    optimizer_name: str
    batch: int | None
    constants: Constants

    @property
    def net(self) -> networks.MLP:
        return networks.MLP(self.constants.widths, self.classes)

    def logits(self, params: Any, x: jax.Array) -> jax.Array:
        return cast(jax.Array, self.net.apply(params, x))

    def optimizer(self, decay: Any = None) -> Any:
        c = self.constants
        adam = self.optimizer_name == "adam"
        plain = optax.adam(c.adam) if adam else optax.sgd(c.sgd, c.momentum)
        if decay is None:
            return plain
        return optax.chain(optax.add_decayed_weights(decay), plain)

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, sets: Sets, key: jax.Array) -> State:
        params: Any = self.net.init(key, sets.train[0])
        return State(
            sets=sets,
            params=params,
            optimizer=self.optimizer().init(params),
            average=params,
            predicted=self.logits(params, sets.train[0]).argmax(-1).astype(jnp.int32),
        )

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def batches(self, size: int, key: jax.Array) -> Batch:
        """All steps of a run; a full batch is in another order in every step."""
        steps, batch = self.constants.steps, self.batch or size
        keys = jax.random.split(key, math.ceil(steps / (size // batch)))
        epochs = jax.vmap(lambda k: training.batches(k, size, batch))(keys)
        number = jnp.arange(1, steps + 1)
        return Batch(
            epochs.reshape(-1, batch)[:steps],
            number % self.constants.every == 0,
            number == steps,
        )

    def seen(self, params: Any, sets: Sets) -> jax.Array:
        """Validation loss and accuracy, test accuracy, loss and calibration error."""
        logits = self.logits(params, sets.test[0])
        ece = training.expected_calibration_error(
            logits, sets.test[1], self.constants.ece_bins
        )
        loss, accuracy = training.loss_and_accuracy(logits, sets.test[1])
        valid = self.logits(params, sets.validation[0])
        valid = training.loss_and_accuracy(valid, sets.validation[1])
        return jnp.stack([*valid, accuracy, loss, ece])

    def flooded_step(
        self, state: State, batch: Batch, level: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        """An update at a level, and whether the halves of its batch agree."""
        halves = batch.indices.reshape(2, -1)

        def raw_loss(params: Any, half: jax.Array) -> tuple[jax.Array, jax.Array]:
            x, y = (array[half] for array in state.sets.train)
            loss = cross_entropy(self.logits(params, x), y).mean()
            return loss, loss

        both = jax.vmap(grad(raw_loss, has_aux=True), in_axes=(None, 0))
        grads, losses = both(state.params, halves)
        first, second = (jax.tree.map(lambda g, i=i: g[i], grads) for i in range(2))
        accordance = levels.gradient_accordance(first, second)
        mean = jax.tree.map(lambda g, h: (g + h) / 2, first, second)
        raw = losses.mean()
        flood = scale_by_flood(level)
        mean, _ = flood.update(mean, flood.init(state.params), value=raw)
        state, metrics = self.after(state, batch, mean)
        return state, metrics | {"loss": raw, "accordance": accordance}

    def after(
        self, state: State, batch: Batch, grads: Any, decay: Any = None
    ) -> tuple[State, dict[str, jax.Array]]:
        """The update by a gradient; between the checks what they read off is NaN."""
        updates, optimizer = self.optimizer(decay).update(
            grads, state.optimizer, state.params
        )
        params: Any = optax.apply_updates(state.params, updates)
        pace = 1 - self.constants.average
        average = optax.incremental_update(params, state.average, pace)
        nothing = jnp.full(5, jnp.nan, jnp.float32)

        def check() -> Any:
            now = self.logits(params, state.sets.train[0]).argmax(-1).astype(jnp.int32)
            changed = (now != state.predicted).sum().astype(jnp.float32)
            return now, changed, self.seen(params, state.sets)

        def none() -> Any:
            return state.predicted, jnp.float32(jnp.nan), nothing

        predicted, changed, seen = cond(batch.check, check, none)
        averaged = cond(
            batch.last, lambda: self.seen(average, state.sets), lambda: nothing
        )
        metrics = {"changed": changed, "seen": seen, "averaged": averaged}
        return State(state.sets, params, optimizer, average, predicted), metrics

    @functools.partial(jax.jit, static_argnums=0)
    def rivals(
        self, start: State, batches: Batch, held_out: jax.Array, rivals: Rival
    ) -> jax.Array:
        """What the last check has seen, [rivals, 5], of fields that are [rivals]."""

        def run(rival: Rival) -> jax.Array:
            optimizer = self.optimizer(rival.decay)
            theta = levels.adaflood(held_out, rival.gamma)
            theta = jnp.where(rival.gamma < 1, theta, OFF)
            init, update = on_plateau(
                step=self.constants.rise * math.log(self.classes),
                patience=self.constants.patience,
            )

            def objective(params: Any, batch: Batch, level: Any) -> jax.Array:
                x, y = (array[batch.indices] for array in start.sets.train)
                logits = self.logits(params, x)
                evenly = -jax.nn.log_softmax(logits).mean(-1)
                losses = cross_entropy(logits, y)
                losses += rival.smoothing * (evenly - losses)
                loss = flood_mean(losses, theta[batch.indices], over="example")
                return flood_loss(loss, level)

            def step(carry: Any, batch: Batch) -> Any:
                state, plateau = carry
                moving = rival.initial > OFF
                level = jnp.where(moving, plateau.level, OFF)
                grads = grad(objective)(state.params, batch, level)
                state, metrics = self.after(state, batch, grads, rival.decay)
                plateau = cond(
                    batch.check,
                    lambda: update(plateau, metrics["seen"][0])[1],
                    lambda: plateau,
                )
                return (state, plateau), metrics["seen"]

            first = init()._replace(level=jnp.maximum(rival.initial, 0.0))
            state = start._replace(optimizer=optimizer.init(start.params))
            return scan(step, (state, first), batches)[1][-1]

        return jax.lax.map(run, rivals)

    @functools.partial(jax.jit, static_argnums=0)
    def held_out(self, start: State, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Losses [n] under models without the example, and the level of the noise."""
        x, y = start.sets.train
        number = self.held_out_steps

        def fit(indices: jax.Array, key: jax.Array) -> Any:
            size = len(indices)
            batch = min(self.batch or size, size)
            keys = jax.random.split(key, math.ceil(number / (size // batch)))
            epochs = jax.vmap(lambda k: training.batches(k, size, batch))(keys)

            def step(carry: Any, batch: jax.Array) -> Any:
                params, state = carry
                at = indices[batch]

                def loss_fn(params: Any) -> jax.Array:
                    return cross_entropy(self.logits(params, x[at]), y[at]).mean()

                updates, state = self.optimizer().update(grad(loss_fn)(params), state)
                return (optax.apply_updates(params, updates), state), None

            first = start.params, self.optimizer().init(start.params)
            return scan(step, first, epochs.reshape(-1, batch)[:number])[0][0]

        def evaluate(params: Any, indices: jax.Array) -> Any:
            logits = self.logits(params, x[indices])
            return jax.nn.softmax(logits), cross_entropy(logits, y[indices])

        probs, losses = levels.held_out(
            fit, evaluate, len(y), num_folds=self.constants.folds, key=key, vmap=True
        )
        matrix = levels.noise_matrix(probs, y)
        frequencies = jnp.bincount(y, length=self.classes) / len(y)
        return losses, levels.noise_floor(matrix, label_frequencies=frequencies)

    @property
    def held_out_steps(self) -> int:
        return max(1, round(self.constants.held_out * self.constants.steps))
