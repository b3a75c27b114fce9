"""A run of a method: its step, its validation on the way, and what it reaches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from benchmarks import training
from benchmarks.pools import Sets
from benchmarks.rivals import problems, stops
from benchmarks.rivals.before import Known
from benchmarks.rivals.methods import Recipe
from benchmarks.rivals.settings import Constants, Problem
from benchmarks.training import cross_entropy, scan, value_and_grad
from flood_optax import flood_mean, levels, scale_by_flood

READOUTS = ("last", "averaged")  # of the weights, in the order of all that follows
COLUMNS = ("validation", "validation_loss", "accuracy", "loss")  # of noisy, true labels


class Now(NamedTuple):
    """What a step is handed: indices of a batch, a key, and how far the run is."""

    batch: jax.Array
    key: jax.Array
    progress: jax.Array


class Run(NamedTuple):
    """What changes from step to step; `memory` is ELR's targets."""

    params: Any
    state: Any
    average: Any
    memory: Any
    steps: jax.Array


def stops_of(kind: str) -> tuple[str, ...]:
    """Where runs of a kind are read off: at the end, at the best check, by rules."""
    return ("last", "best", *(("wave", "evidence") if kind == "stops" else ()))


def trainer(problem: Problem, kind: str, constants: Constants) -> Callable[..., Any]:
    """From recipes, a key, a share of flips and what is known to what runs reach.

    The key decides data, flips, initialisation and batches, the same for all methods.
    The result is [recipes, stops, READOUTS, COLUMNS]; the stop "best" is the check at
    which the readout had the highest validation accuracy, of equal ones the least loss.
    """

    @jax.jit
    def train(
        recipes: Recipe, key: jax.Array, flips: jax.Array, known: Known
    ) -> jax.Array:
        one = functools.partial(
            run_of, problem, kind, constants, key=key, flips=flips, known=known
        )
        if problem.size.lanes < len(recipes.rate):
            return jax.lax.map(one, recipes, batch_size=problem.size.lanes)
        return jax.vmap(one)(recipes)

    return train


def stacked(recipes: Sequence[Recipe]) -> Recipe:
    """Recipes as one of arrays."""
    columns = zip(*recipes, strict=True)
    return Recipe(*(jnp.array(column, jnp.float32) for column in columns))


def run_of(
    problem: Problem,
    kind: str,
    constants: Constants,
    recipe: Recipe,
    *,
    key: jax.Array,
    flips: jax.Array,
    known: Known,
) -> jax.Array:
    """What a run reaches, [stops, READOUTS, COLUMNS]."""
    size = problem.size
    every = size.steps // constants.checks
    keys = jax.random.split(key, 5)
    sets = problem.draw(keys[0], flips)
    params = problem.network.init(keys[1], sets.train[0][:1])
    fit = Fit(problem, kind, constants, recipe, sets=sets, known=known)
    optimizer = fit.optimizer()

    def step(run: Run, now: Now) -> tuple[Run, None]:
        grads, value, memory = fit.gradient(run, now)
        updates, state = optimizer.update(grads, run.state, run.params, value=value)
        params = optax.apply_updates(run.params, updates)
        # a plain mean at first, so that the start is forgotten
        pace = jnp.maximum(1 - constants.average, 1 / (run.steps + 1))
        average = optax.incremental_update(params, run.average, pace)
        return Run(params, state, average, memory, run.steps + 1), None

    def check(carry: Any, steps: Now) -> tuple[Any, None]:
        run, best, scores, rules = carry
        run, _ = scan(step, run, steps)
        now = fit.readouts(run)
        new = jnp.stack([fit.score(params) for params in now])
        best = tuple(
            stops.keep(b, a, new[i] > scores[i])
            for i, (a, b) in enumerate(zip(now, best, strict=True))
        )
        return (run, best, jnp.maximum(scores, new), fit.followed(rules, now)), None

    order = training.order(keys[2], size.train, size.batch, size.steps)
    order = order[: every * constants.checks]
    count = len(order)
    steps = Now(order, jax.random.split(keys[3], count), jnp.arange(count) / count)
    steps = jax.tree.map(
        lambda a: a.reshape(constants.checks, every, *a.shape[1:]), steps
    )
    run = Run(params, optimizer.init(params), params, fit.targets(), jnp.int32(0))
    models = fit.readouts(run)
    start = run, models, jnp.full(len(READOUTS), -jnp.inf), fit.rules(models)
    (run, best, _, rules), _ = scan(check, start, steps)
    ends = [fit.readouts(run), best, *(rule.models for rule in rules)]
    return jnp.stack([jnp.stack([fit.reached(one) for one in end]) for end in ends])


class Fit:
    """A method on the data of a run; its recipe may be traced."""

    def __init__(
        self,
        problem: Problem,
        kind: str,
        constants: Constants,
        recipe: Recipe,
        *,
        sets: Sets,
        known: Known,
    ):
        self.problem, self.kind, self.recipe = problem, kind, recipe
        self.constants, self.sets, self.known = constants, sets, known

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        r, steps = self.recipe, self.problem.size.steps

        def rate(step: Any) -> Any:
            half_cosine = 0.5 * (1 + jnp.cos(jnp.pi * step / steps))
            return r.rate * jnp.where(r.cosine > 0, half_cosine, 1.0)

        if self.kind == "schedule_free":
            free = optax.contrib.schedule_free_adamw(cast(Any, rate))
            return optax.with_extra_args_support(free)
        # an infinite level has no band
        band = jnp.where(self.level > -jnp.inf, r.band * self.level, 0.0)
        adam = optax.adamw(rate, weight_decay=r.decay)
        return optax.chain(scale_by_flood(self.level, band=band), adam)

    @property
    def level(self) -> jax.Array:
        """As given, or a part of the noise floor at the estimated share."""
        r = self.recipe
        floor = levels.noise_floor(self.known.rate, self.problem.classes)
        return jnp.where(r.of_estimate > 0, r.of_estimate * floor, r.level)

    def gradient(self, run: Run, now: Now) -> tuple[Any, jax.Array, Any]:
        """The gradient where the method asks, the loss of the run, ELR's targets."""
        raw = value_and_grad(self.objective, has_aux=True)
        if self.kind == "msam":  # one gradient, and the loss where it is taken
            towards = optax.tree.scale(-1, optax.tree.get(run.state, "mu"))
            at = self.moved(run.params, towards)
            (value, memory), grads = raw(at, now, run.memory)
            return grads, value, memory
        (value, memory), grads = raw(run.params, now, run.memory)
        if self.kind == "sam":
            _, grads = raw(self.moved(run.params, grads), now, run.memory)
        return grads, value, memory

    def moved(self, params: Any, towards: Any) -> Any:
        """A radius away; where there is no direction, nowhere."""
        length = optax.tree.norm(towards)
        scale = self.recipe.strength / jnp.where(length > 0, length, 1.0)
        return optax.tree.add_scale(params, scale, towards)

    def targets(self) -> Any:
        """ELR's, before the first step."""
        if self.kind != "elr":
            return ()
        return jnp.zeros((*self.sets.train[1].shape, self.problem.classes))

    def objective(
        self, params: Any, now: Now, memory: Any = ()
    ) -> tuple[jax.Array, Any]:
        """The mean loss of a batch, and ELR's targets after it."""
        x, y = (array[now.batch] for array in self.sets.train)
        r, key = self.recipe, now.key
        if self.problem.shift:
            shift_key, key = jax.random.split(key)
            x = problems.shifted(shift_key, x, self.problem.shift)
        if self.kind == "mixup":
            part_key, order_key = jax.random.split(key)
            part = jax.random.beta(part_key, r.strength, r.strength)
            other = jax.random.permutation(order_key, len(x))
            logits = self.logits(params, part * x + (1 - part) * x[other])
            mixed = part * self.losses(logits, y)
            return (mixed + (1 - part) * self.losses(logits, y[other])).mean(), memory
        logits = self.logits(params, x, key)
        losses = self.losses(logits, y)
        if self.kind == "adaflood":
            theta = levels.adaflood(self.known.held_out[now.batch], r.strength)
            return flood_mean(losses, theta, over="example"), memory
        if self.kind == "elr":
            probs = jnp.clip(jax.nn.softmax(logits), 1e-4, 1 - 1e-4)
            fixed = jax.lax.stop_gradient(probs)
            new = fixed / fixed.sum(-1, keepdims=True)
            targets = r.memory * memory[now.batch] + (1 - r.memory) * new
            agreement = (targets * probs).sum(-1)
            losses = losses + r.strength * jnp.log(1 - agreement)
            return losses.mean(), memory.at[now.batch].set(targets)
        weights = jnp.where(
            r.kept > 1.5,
            self.known.confident[now.batch],
            jnp.where(r.kept > 0.5, self.known.upheld[now.batch], 1.0),
        ).reshape(-1, *(1,) * (losses.ndim - 1))
        weights = jnp.broadcast_to(weights, losses.shape)
        return (weights * losses).sum() / jnp.maximum(weights.sum(), 1), memory

    def logits(self, params: Any, x: jax.Array, key: jax.Array | None = None) -> Any:
        network, share = self.problem.network, self.recipe.strength
        if self.kind != "dropout" or key is None:
            return network.logits(params, x)

        def drop(hidden: jax.Array, layer: int) -> jax.Array:
            at = jax.random.fold_in(key, layer)
            kept = jax.random.bernoulli(at, 1 - share, hidden.shape)
            return jnp.where(kept, hidden / (1 - share), 0.0)

        return network.logits(params, x, drop)

    def losses(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Cross-entropies of smoothed labels, or corrected, or generalised.

        With flips at the rate e the label's probability is that of the class times
        1 - e, and e / (c - 1) for each other class (Patrini et al., CVPR 2017,
        "forward"). Generalised with the exponent q it is (1 - p^q) / q of the label's
        probability p (Zhang and Sabuncu, NeurIPS 2018).
        """
        r, others = self.recipe, self.problem.classes - 1
        log_probs = jax.nn.log_softmax(logits)
        of_label = -cross_entropy(logits, labels)
        wrong = r.assumed / others
        right = jnp.log(1 - r.assumed - wrong) + of_label
        losses = -jnp.logaddexp(right, jnp.log(wrong))
        evenly = -log_probs.mean(-1)
        losses = losses + r.smoothing * (evenly - losses)
        q = jnp.where(r.exponent > 0, r.exponent, 1.0)
        return jnp.where(r.exponent > 0, -jnp.expm1(q * of_label) / q, losses)

    def readouts(self, run: Run) -> tuple[Any, Any]:
        """The last weights and the averaged ones."""
        if self.kind == "schedule_free":
            evaluated = optax.contrib.schedule_free_eval_params(run.state, run.params)
            return evaluated, evaluated
        return run.params, run.average

    def rules(self, models: Any) -> tuple[stops.Stop, ...]:
        """Label Wave and the gradients' evidence before the first step."""
        if self.kind != "stops":
            return ()
        return (
            stops.wave_start(models, self.predicted(models[0])),
            stops.evidence_start(models),
        )

    def followed(self, rules: tuple[stops.Stop, ...], models: Any) -> Any:
        """The rules after a check; both judge the last weights."""
        if not rules:
            return rules
        n = self.constants.probed
        examples = tuple(array[:n] for array in self.sets.train)
        criterion = stops.evidence_criterion(self.of_example, models[0], examples)
        patience = self.constants.patience
        return (
            stops.wave(rules[0], models, self.predicted(models[0]), patience),
            stops.evidence(rules[1], models, criterion),
        )

    def predicted(self, params: Any) -> jax.Array:
        x, _ = self.sets.train
        return self.problem.network.logits(params, x).argmax(-1)

    def of_example(self, params: Any, example: Any) -> jax.Array:
        x, y = (part[None] for part in example)
        return self.losses(self.problem.network.logits(params, x), y).mean()

    def seen(self, params: Any, part: Any) -> jax.Array:
        """Accuracy and loss on a set."""
        logits: Any = self.problem.network.logits(params, part[0])
        return training.loss_and_accuracy(logits, part[1])[::-1]

    def score(self, params: Any) -> jax.Array:
        """Validation accuracy; of equal ones the lower validation loss counts."""
        accuracy, loss = self.seen(params, self.sets.validation)
        return accuracy - 1e-6 * loss

    def reached(self, params: Any) -> jax.Array:
        """The COLUMNS."""
        parts = self.sets.validation, self.sets.test
        return jnp.concatenate([self.seen(params, part) for part in parts])
