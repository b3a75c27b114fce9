"""A run of a method: its step, its validation on the way, and what it reaches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import training
from benchmarks.pools import Sets
from benchmarks.rivals.methods import Method, Recipe
from benchmarks.rivals.settings import Constants, Problem
from benchmarks.training import cross_entropy, grad, scan, value_and_grad
from flood_optax import flood_mean, levels, scale_by_flood

READOUTS = ("last", "averaged")  # of the weights, in the order of all that follows
COLUMNS = ("score", "accuracy", "loss", "ece")  # the first on noisy validation labels
TIE = 1e-6  # what validation loss counts beside validation accuracy


class Now(NamedTuple):
    """What a step is handed: indices of a batch, a key, and how far the run is."""

    batch: jax.Array
    key: jax.Array
    progress: jax.Array


class Run(NamedTuple):
    params: Any
    state: Any
    average: Any
    steps: jax.Array


def trainer(
    problem: Problem,
    method: Method,
    recipes: Sequence[Recipe],
    constants: Constants,
) -> training.Train:
    """From the number of a recipe and a key to what a run reaches.

    The key decides data, flips, initialisation and batches, the same for all methods.
    `last` and `best` are [2, 4], by READOUTS and COLUMNS: at the end of the run, and at
    the check at which the validation score of the readout was highest.
    """
    table = Recipe(*(jnp.array(column) for column in zip(*recipes, strict=True)))
    size = problem.size
    every = size.steps // constants.checks

    def train(number: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        recipe = Recipe(*(column[number.astype(int)] for column in table))
        keys = jax.random.split(key, 5)
        sets = problem.draw(keys[0], recipe.flips)
        params = problem.network.init(keys[1], sets.train[0][:1])
        fit = Fit(problem, method, recipe, constants, sets)
        fit.prepare(keys[4])
        optimizer = fit.optimizer()

        def step(run: Run, now: Now) -> tuple[Run, jax.Array]:
            grads, value = fit.gradient(run, now)
            updates, state = optimizer.update(grads, run.state, run.params, value=value)
            params = optax.apply_updates(run.params, updates)
            # a plain mean at first, so that the start is forgotten
            pace = jnp.maximum(1 - constants.average, 1 / (run.steps + 1))
            average = optax.incremental_update(params, run.average, pace)
            return Run(params, state, average, run.steps + 1), value

        def check(carry: Any, steps: Now) -> tuple[Any, jax.Array]:
            run, best, scores = carry
            run, values = scan(step, run, steps)
            now = fit.readouts(run)
            new = jnp.stack([fit.score(params) for params in now])
            best = tuple(
                jax.tree.map(
                    lambda a, b, i=i: jnp.where(new[i] > scores[i], a, b), *two
                )
                for i, two in enumerate(zip(now, best, strict=True))
            )
            return (run, best, jnp.maximum(scores, new)), values.mean()

        order = jax.vmap(lambda k: training.batches(k, size.train, size.batch))(
            jax.random.split(keys[2], -(-size.steps // (size.train // size.batch)))
        ).reshape(-1, size.batch)[: every * constants.checks]
        count = len(order)
        steps = Now(order, jax.random.split(keys[3], count), jnp.arange(count) / count)
        steps = jax.tree.map(
            lambda a: a.reshape(constants.checks, every, *a.shape[1:]), steps
        )
        run = Run(params, optimizer.init(params), params, jnp.int32(0))
        start = run, fit.readouts(run), jnp.full(len(READOUTS), -jnp.inf)
        (run, best, _), losses = scan(check, start, steps)
        return {
            "last": jnp.stack([fit.reached(params) for params in fit.readouts(run)]),
            "best": jnp.stack([fit.reached(params) for params in best]),
            "train_loss": losses[-1],
        }

    return train


class Fit:
    """A method on the data of a run; its recipe may be traced."""

    def __init__(
        self,
        problem: Problem,
        method: Method,
        recipe: Recipe,
        constants: Constants,
        sets: Sets,
    ):
        self.problem, self.method, self.recipe = problem, method, recipe
        self.constants, self.sets = constants, sets
        self.held_out: jax.Array | None = None

    def prepare(self, key: jax.Array) -> None:
        """What a method finds out before it trains."""
        if self.method.kind == "adaflood":
            self.held_out = held_out_losses(
                self.problem, self.constants, self.sets, key
            )

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        r = self.recipe
        if self.method.kind == "schedule_free":
            free = optax.contrib.schedule_free_adamw(r.rate)
            return optax.with_extra_args_support(free)

        steps = self.problem.size.steps

        def rate(step: Any) -> Any:
            half_cosine = 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
            return r.rate * jnp.where(r.cosine > 0, half_cosine, 1.0)

        adam = optax.adamw(rate, weight_decay=r.decay)
        return optax.chain(scale_by_flood(r.level, band=r.band), adam)

    def raw(self, params: Any, now: Now) -> tuple[jax.Array, Any]:
        """The loss of a batch and its gradient."""
        return value_and_grad(self.objective)(params, now)

    def gradient(self, run: Run, now: Now) -> tuple[Any, jax.Array]:
        """The gradient at the place that the method asks, and the loss of the run."""
        value, grads = self.raw(run.params, now)
        if self.method.kind == "sam":
            return self.raw(self.moved(run.params, grads), now)[1], value
        if self.method.kind == "msam":  # one gradient, and the loss where it is taken
            towards = optax.tree.scale(-1, optax.tree.get(run.state, "mu"))
            value, grads = self.raw(self.moved(run.params, towards), now)
        return grads, value

    def moved(self, params: Any, towards: Any) -> Any:
        """A radius away; where there is no direction, nowhere."""
        length = optax.tree.norm(towards)
        scale = self.recipe.strength / jnp.where(length > 0, length, 1.0)
        return optax.tree.add_scale(params, scale, towards)

    def objective(self, params: Any, now: Now) -> jax.Array:
        x, y = (array[now.batch] for array in self.sets.train)
        r, kind = self.recipe, self.method.kind
        if kind == "mixup":
            part_key, order_key = jax.random.split(now.key)
            part = jax.random.beta(part_key, r.strength, r.strength)
            other = jax.random.permutation(order_key, len(x))
            logits = self.logits(params, part * x + (1 - part) * x[other])
            mixed = part * self.losses(logits, y)
            return (mixed + (1 - part) * self.losses(logits, y[other])).mean()
        losses = self.losses(self.logits(params, x, now.key), y)
        if kind == "adaflood":
            assert self.held_out is not None
            theta = levels.adaflood(self.held_out[now.batch], r.strength)
            return flood_mean(losses, theta, over="example")
        return losses.mean()

    def logits(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> Any:
        network, share = self.problem.network, self.recipe.strength
        if self.method.kind != "dropout" or key is None:
            return network.logits(params, x)

        def drop(hidden: jax.Array, layer: int) -> jax.Array:
            at = jax.random.fold_in(key, layer)
            kept = jax.random.bernoulli(at, 1 - share, hidden.shape)
            return jnp.where(kept, hidden / (1 - share), 0.0)

        return network.logits(params, x, drop)

    def losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Cross-entropies of smoothed labels, or corrected for a known share of flips.

        With flips at the rate e the label's probability is that of the class times
        1 - e, and e / (c - 1) for each other class (Patrini et al., CVPR 2017,
        "forward").
        """
        r, others = self.recipe, self.problem.classes - 1
        log_probs = jax.nn.log_softmax(logits)
        of_label = -cross_entropy(logits, labels)
        wrong = r.assumed / others
        right = jnp.log(1 - r.assumed - wrong) + of_label
        losses = -jnp.logaddexp(right, jnp.log(wrong))
        evenly = -log_probs.mean(-1)
        return losses + r.smoothing * (evenly - losses)

    def readouts(self, run: Run) -> tuple[Any, Any]:
        """The last weights and the averaged ones."""
        if self.method.kind == "schedule_free":
            evaluated = optax.contrib.schedule_free_eval_params(run.state, run.params)
            return evaluated, evaluated
        return run.params, run.average

    def score(self, params: Any) -> jax.Array:
        """Validation accuracy; of equal ones the lower validation loss counts."""
        x, y = self.sets.validation
        logits = self.problem.network.logits(params, x)
        loss, accuracy = training.loss_and_accuracy(logits, y)
        return accuracy - TIE * loss

    def reached(self, params: Any) -> jax.Array:
        """The COLUMNS."""
        x, y = self.sets.test
        logits: Any = self.problem.network.logits(params, x)
        loss, accuracy = training.loss_and_accuracy(logits, y)
        flat = logits.reshape(-1, logits.shape[-1])
        ece = training.expected_calibration_error(flat, y.ravel(), self.constants.bins)
        return jnp.stack([self.score(params), accuracy, loss, ece])


def held_out_losses(
    problem: Problem, constants: Constants, sets: Sets, key: jax.Array
) -> jax.Array:
    """AdaFlood's: each example's loss under a model that has not seen it."""
    (x, y), size, network = sets.train, problem.size, problem.network
    steps = max(1, round(constants.held_out * size.steps))
    optimizer = optax.adam(constants.rate)

    def mean_loss(params: Any, at: jax.Array) -> jax.Array:
        return cross_entropy(network.logits(params, x[at]), y[at]).mean()

    def fit(indices: jax.Array, key: jax.Array) -> Any:
        init_key, batch_key = jax.random.split(key)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            at = jax.random.choice(key, indices, (size.batch,), replace=False)
            updates, state = optimizer.update(grad(mean_loss)(params, at), state)
            return (optax.apply_updates(params, updates), state), None

        params = network.init(init_key, x[:1])
        start = params, optimizer.init(params)
        return scan(step, start, jax.random.split(batch_key, steps))[0][0]

    def evaluate(params: Any, indices: jax.Array) -> jax.Array:
        return cross_entropy(network.logits(params, x[indices]), y[indices])

    return levels.held_out_losses(
        fit, evaluate, len(y), num_folds=constants.folds, key=key, vmap=True
    )
