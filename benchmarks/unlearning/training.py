"""The models before unlearning, the golds and the shadows, and a run of a method."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks import timing, training
from benchmarks.training import cross_entropy, order, scan, value_and_grad
from benchmarks.unlearning import measures
from benchmarks.unlearning.measures import Lira
from benchmarks.unlearning.methods import Known, Method, Recipe, Seen
from benchmarks.unlearning.problems import Data, Problem, Set, fit, per_example
from benchmarks.unlearning.settings import Constants

MODELS = ("before", "gold", "other gold")


class Prepared(NamedTuple):
    """What a seed begins with.

    Attributes:
      models: the parameters of MODELS, [3, parameters].
      lira_mean, lira_sd: see `Lira`; of no use without shadows.
    """

    models: jax.Array
    lira_mean: jax.Array
    lira_sd: jax.Array


def data_of(problem: Problem, key: jax.Array) -> Data:
    """The data of a seed, of which preparation and unlearning see the same."""
    return problem.draw(jax.random.fold_in(key, 0))


def preparer(problem: Problem, constants: Constants) -> training.Train:
    """From a seed's key to `Prepared`, and to what is measured of the three MODELS."""
    setting = problem.setting
    seen, known = setting.retain + setting.forget, setting.retain

    def train(number: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        del number
        data = data_of(problem, key)
        everything = joined(data.retain, measures.challenge(data))
        keys = jax.random.split(jax.random.fold_in(key, 1), 4)
        sizes = [seen, known, known] + [seen] * setting.shadows
        orders = [
            order(one, size, setting.train_batch, setting.steps)
            for one, size in zip(
                jax.random.split(keys[0], len(sizes)), sizes, strict=True
            )
        ]
        inside = shadow_members(keys[1], setting.forget, setting.shadows)
        members = [jnp.arange(size) for size in sizes[:3]]
        for row in inside:
            chosen = jnp.flatnonzero(row, size=setting.forget)
            members.append(jnp.concatenate([jnp.arange(known), known + chosen]))
        batches = jnp.stack(
            [who[rows] for who, rows in zip(members, orders, strict=True)]
        )
        if setting.pretrain:  # one model that has read other text, for all
            start = problem.start(keys[2])
            begin = jax.tree.map(lambda a: jnp.stack([a] * len(sizes)), start)
        else:
            begin = jax.vmap(problem.start)(jax.random.split(keys[2], len(sizes)))
        fitted: Any = jax.vmap(
            lambda params, batches: fit(
                problem, constants.train_rate, params, everything, batches
            )
        )(begin, batches)
        models = [jax.tree.map(lambda a, i=i: a[i], fitted) for i in range(3)]
        shadows = jax.tree.map(lambda a: a[3:], fitted)
        lira = lira_of(problem, data, shadows, inside)
        reader = Reader(problem, constants, data, models, lira)
        return {
            "models": jnp.stack([ravel_pytree(model)[0] for model in models]),
            "lira_mean": lira.mean,
            "lira_sd": lira.sd,
            "readings": jnp.stack([reader.readings(model) for model in models]),
            "deep": jnp.stack([reader.deep(model) for model in models]),
            "tau": reader.known.tau,
        }

    return train


def joined(a: Set, b: Set) -> Set:
    return jnp.concatenate([a[0], b[0]]), jnp.concatenate([a[1], b[1]])


def shadow_members(key: jax.Array, forget: int, shadows: int) -> jax.Array:
    """Which of the `measures.challenge` each shadow sees, [shadows, 2 forget].

    Every second one sees what the one before it has not, so that each example is seen
    by exactly half of them.
    """
    half = jnp.arange(2 * forget) < forget
    keys = jax.random.split(key, max(1, shadows // 2))
    drawn = jax.vmap(lambda one: jax.random.permutation(one, half))(keys)
    both = jnp.stack([drawn, ~drawn], 1).reshape(-1, 2 * forget)
    return both[:shadows]


def lira_of(problem: Problem, data: Data, shadows: Any, inside: jax.Array) -> Lira:
    """What the shadows tell; zeros and ones where there are none."""
    x, y = measures.challenge(data)
    if not len(inside):
        return Lira(jnp.zeros((2, len(y))), jnp.ones(2))
    losses = jax.vmap(lambda params: cross_entropy(problem.logits(params, x), y))
    seen = measures.confidence(losses(shadows))
    member = jnp.stack([~inside, inside])  # [2, shadows, n]
    counts = member.sum(1)
    mean = (member * seen).sum(1) / counts
    variance = (member * (seen - mean[:, None]) ** 2).sum((1, 2))
    return Lira(mean, jnp.sqrt(variance / (member.sum((1, 2)) - counts.shape[1])))


class Reader:
    """The measures of a seed, beside its golds, which no method is shown."""

    def __init__(
        self,
        problem: Problem,
        constants: Constants,
        data: Data,
        models: Sequence[Any],
        lira: Lira,
    ):
        self.problem, self.constants, self.data = problem, constants, data
        self.lira = lira
        x, y = data.forget
        self.known = known_of(problem, data, models[0])
        logits = [problem.logits(gold, x) for gold in models[1:]]
        self.gold_logs = jax.nn.log_softmax(jnp.stack(logits))
        half = len(y) // 2
        base = cross_entropy(problem.logits(models[0], x[half:]), y[half:]).mean()
        # half of the way from the level to what it was
        self.back = (base + self.known.tau) / 2

    def readings(self, params: Any) -> jax.Array:
        return measures.readings(self.problem, self.data, self.gold_logs, params)

    def deep(self, params: Any) -> jax.Array:
        """The DEEP measures, NaN where a setting has none."""
        problem, data = self.problem, self.data
        steps = measures.relearned(problem, self.constants, data, self.back, params)
        nothing = jnp.float32(np.nan)
        lira = nothing
        if problem.setting.shadows:
            lira = measures.attack(problem, data, self.lira, params)
        text = data.forget[1].ndim > 1
        continued = measures.verbatim(problem, data, params) if text else nothing
        return jnp.stack([steps, lira, continued])


def known_of(problem: Problem, data: Data, params: Any) -> Known:
    """What the model before unlearning tells a method."""
    (x, y), (other_x, other_y) = data.forget, data.held_out
    losses = cross_entropy(problem.logits(params, x), y)
    logits = problem.logits(params, other_x)
    held_out = per_example(cross_entropy(logits, other_y))
    probs = jax.nn.softmax(logits).reshape(-1, problem.classes)
    labels = other_y.ravel()
    by_label = jax.ops.segment_sum(probs, labels, problem.classes)
    counts = jnp.bincount(labels, length=problem.classes)[:, None]
    # a character that is in no held-out passage gets the mean over all
    by_class = jnp.where(counts > 0, by_label / jnp.maximum(counts, 1), probs.mean(0))
    ranks = (jnp.argsort(jnp.argsort(per_example(losses))) + 0.5) / len(y)
    return Known(
        held_out.mean(),
        jnp.quantile(held_out, ranks),
        losses.reshape(len(y), -1).sum(-1),
        by_class,
    )


class Run(NamedTuple):
    """A run so far; `stopped` are its weights when it was to stop, after `stop` steps.

    `stop` is -1 before.
    """

    params: Any
    state: Any
    stopped: Any
    stop: jax.Array


class Fit:
    """A method on the data of a seed; its recipe may be traced."""

    def __init__(
        self,
        problem: Problem,
        method: Method,
        recipe: Recipe,
        constants: Constants,
        *,
        data: Data,
        known: Known,
    ):
        self.problem, self.method, self.recipe = problem, method, recipe
        self.constants, self.data, self.known = constants, data, known
        self.optimizer = optax.chain(
            optax.scale_by_adam(), optax.scale_by_learning_rate(recipe.rate)
        )

    def begin(self, params: Any) -> Run:
        return Run(params, self.optimizer.init(params), params, jnp.int32(-1))

    def objective(
        self, params: Any, retain: jax.Array, forget: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Of two batches of indices; and the loss of what is to be forgotten."""
        x, y = (array[retain] for array in self.data.retain)
        if self.method.term is None:
            losses = cross_entropy(self.problem.logits(params, x), y)
            return losses.mean(), jnp.float32(-jnp.inf)
        forget_x, labels = (array[forget] for array in self.data.forget)
        both = self.problem.logits(params, jnp.concatenate([x, forget_x]))
        kept, logits = both[: len(x)], both[len(x) :]
        known = self.known._replace(
            ranked=self.known.ranked[forget], summed=self.known.summed[forget]
        )
        losses = cross_entropy(logits, labels)
        seen = Seen(logits, labels, losses, known, jnp.asarray(self.recipe.factor))
        term = self.method.term(seen, self.constants)
        return cross_entropy(kept, y).mean() + term, seen.examples.mean()

    def step(
        self, run: Run, count: jax.Array, retain: jax.Array, forget: jax.Array
    ) -> Run:
        """The step after `count` others."""
        (_, loss), grads = value_and_grad(self.objective, has_aux=True)(
            run.params, retain, forget
        )
        now = (loss >= self.known.tau) & (run.stop < 0)
        stopped = jax.tree.map(
            lambda new, old: jnp.where(now, new, old), run.params, run.stopped
        )
        updates, state = self.optimizer.update(grads, run.state, run.params)
        params = optax.apply_updates(run.params, updates)
        return Run(params, state, stopped, jnp.where(now, count, run.stop))


def step_flops(problem: Problem, method: Method, constants: Constants) -> float:
    """What XLA counts for one step of a method."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(problem.start, key)
    params = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    data, setting = problem.draw(key), problem.setting
    known = known_of(problem, data, params)
    fit = Fit(
        problem, method, Recipe(constants.middle), constants, data=data, known=known
    )
    batches = jnp.arange(setting.batch), jnp.arange(setting.forget_batch)
    at = (fit.begin(params), jnp.int32(0), *batches)
    return timing.compiled_cost(fit.step, *at)["flops"]


def unlearner(
    problem: Problem,
    method: Method,
    recipes: Sequence[Recipe],
    constants: Constants,
    *,
    prepared: Prepared,
    keys: jax.Array,
) -> training.Train:
    """From the number of a seed to what all recipes of a method reach.

    `course` is [recipes, checks, COLUMNS]; `stopped` [recipes, COLUMNS] and `stop`
    [recipes]: when the loss of a batch to forget first reached tau, or at the end;
    `deep` is [recipes, horizons + 1, DEEP], the last one of the stopped run.
    """
    setting = problem.setting
    table = Recipe(*(jnp.array(column) for column in zip(*recipes, strict=True)))
    horizons = jnp.array(constants.horizons)
    ends = jnp.array(constants.checks)
    begins = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    total = constants.checks[-1]

    def train(number: jax.Array, _: jax.Array) -> dict[str, jax.Array]:
        seed = number.astype(int)
        key, mine = keys[seed], Prepared(*(jnp.asarray(a)[seed] for a in prepared))
        data = data_of(problem, key)
        like = jax.eval_shape(problem.start, key)
        unravel = ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape), like))[1]
        models = [unravel(model) for model in mine.models]
        reader = Reader(
            problem, constants, data, models, Lira(mine.lira_mean, mine.lira_sd)
        )
        retain_key, forget_key = jax.random.split(jax.random.fold_in(key, 2))
        retain = order(retain_key, setting.retain, setting.batch, total)
        forget = order(forget_key, setting.forget, setting.forget_batch, total)

        def course(recipe: Recipe) -> dict[str, jax.Array]:
            fit = Fit(problem, method, recipe, constants, data=data, known=reader.known)

            def check(
                carry: tuple[Run, jax.Array], bounds: tuple[jax.Array, jax.Array]
            ) -> tuple[Any, jax.Array]:
                run, kept = carry
                begin, end = bounds
                run = jax.lax.fori_loop(
                    begin,
                    end,
                    lambda i, run: fit.step(run, i, retain[i], forget[i]),
                    run,
                )
                flat = ravel_pytree(run.params)[0]
                kept = jnp.where((horizons == end)[:, None], flat, kept)
                return (run, kept), reader.readings(run.params)

            start = fit.begin(models[0])
            kept = jnp.zeros((len(horizons), mine.models.shape[1]))
            (run, kept), seen = scan(check, (start, kept), (begins, ends))
            never = run.stop < 0
            stopped = jax.tree.map(
                lambda end, old: jnp.where(never, end, old), run.params, run.stopped
            )
            ended = jnp.concatenate([kept, ravel_pytree(stopped)[0][None]])
            return {
                "course": seen,
                "stopped": reader.readings(stopped),
                "stop": jnp.where(never, total, run.stop),
                "deep": jax.lax.map(lambda flat: reader.deep(unravel(flat)), ended),
            }

        return jax.vmap(course)(table)

    return train
