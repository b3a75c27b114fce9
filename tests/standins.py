"""Trainers in our own words, for the recipes of docs/trainers.md.

Of each what matters to flooding: what it passes on, drops, adds up and evaluates,
by the source of the named version. `python -m benchmarks trainers` runs the real ones.
"""

import dataclasses
import sys
import types
from types import SimpleNamespace as Namespace
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.trainers import page


def targets(x):
    return np.sin(x[:, 0]) + np.float32(0.3) * x[:, 1]


X = np.asarray(jax.random.normal(jax.random.key(0), (64, 4)))
EASY = np.float32(0.5) * X[::-1]
Y, VALID = targets(X), (EASY, targets(EASY))
START = np.zeros(4, np.float32)
STEPS = 120


def squares(w, x=X, y=Y):
    return jnp.mean((x @ w - y) ** 2)


def scaled(level, w, x=X, y=Y):
    """The loss that floats at this level where `squares` floats at .2."""
    return level / 0.2 * squares(w, x, y)


def sgd(level):
    """A rate that suits a loss whose level is .2 of its scale."""
    return optax.sgd(0.02 / level)


class Run(NamedTuple):
    """At each step what is logged and evaluated, and the parameters; and the end."""

    logged: np.ndarray
    evaluated: np.ndarray
    path: np.ndarray
    end: Any
    state: Any


def scanned(
    objective,
    optimizer,
    *,
    logs=lambda loss, aux: loss,
    evaluates=lambda w: jnp.nan,
    given=lambda loss, aux, grads: {},
    start=START,
    steps=STEPS,
):
    """Trains on `objective(w) -> (loss, aux)`; the optimizer sees what is given."""

    def step(carry, _):
        w, state = carry
        (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(w)
        updates, state = optimizer.update(grads, state, w, **given(loss, aux, grads))
        seen = logs(loss, aux), evaluates(w), w
        return (optax.apply_updates(w, updates), state), seen

    return jax.lax.scan(step, (start, optimizer.init(start)), length=steps)


def run(*given, **options):
    end, seen = jax.jit(lambda: scanned(*given, **options))()
    return Run(*map(np.asarray, seen), *end)


def module(monkeypatch, name, **contents):
    """Makes a module importable, and the packages that it is in."""
    parent, _, last = name.rpartition(".")
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    if parent and parent not in sys.modules:
        module(monkeypatch, parent)
    if parent:
        setattr(sys.modules[parent], last, made)
    return made


# ---- penzai 0.2.5: no value of the loss is ever seen ----


class Named(NamedTuple):
    """An array whose axes have names."""

    array: jax.Array

    def unwrap(self, *names):
        assert len(names) == self.array.ndim
        return self.array


def penzai(optimizer, loss_fn, steps=STEPS):
    """It logs what stands last of three."""

    def objective(w):
        model = lambda x: Named((x @ w)[:, None])
        loss, state, last = loss_fn(model=model, state=None, rng=None, x=X, y=Y)
        return loss, (state, last)

    return run(objective, optimizer, logs=lambda loss, aux: aux[1], steps=steps)


def penzai_by_recipe():
    def build(root_rng, model, optimizer_def, loss_fn):
        return optimizer_def, loss_fn

    trainer = Namespace(build=build)
    given = {"basic_training": Namespace(StatefulTrainer=trainer)}
    recipe = page.execute("Penzai", given | {"rng": None, "model": START})
    return recipe, penzai(*recipe["trainer"])


# ---- gpjax 1.0.0: the history is what is differentiated ----

GP_DATA = Namespace(n=64)


def gpjax(optimizer, objective, steps=STEPS):
    return run(lambda w: (objective(w, GP_DATA), None), optimizer, steps=steps)


def gpjax_by_recipe():
    def fit(*, model, objective, train_data, optim, num_iters):
        made = gpjax(optim, objective, num_iters)
        return made, made.logged

    likelihood = lambda w, data: -data.n * squares(w)
    gpx = Namespace(fit=fit, objectives=Namespace(conjugate_mll=likelihood))
    settings = {"optim": sgd(0.2), "num_iters": STEPS}
    given = {"posterior": START, "data": GP_DATA, "settings": settings}
    recipe = page.execute("GPJax", given | {"gpx": gpx})
    assert recipe["history"] is recipe["posterior"].logged
    return recipe, recipe["posterior"]


# ---- flowjax 19.1.2: stops early and chooses an epoch by the training loss ----


class Likelihood:
    """A callable without a `__name__`, as its loss is; here of a regression."""

    def __call__(self, params, static, x, condition=None, key=None):
        return scaled(2.0, params, x, Y if x is X else VALID[1])


def flowjax(optimizer, loss_fn, steps=STEPS):
    """The run, and the parameters whose evaluation is least."""
    made = run(
        lambda w: (loss_fn(w, None, X, key=None), None),
        optimizer,
        evaluates=lambda w: loss_fn(w, None, VALID[0], key=None),
        steps=steps,
    )
    return made.path[made.evaluated.argmin()], made


def flowjax_by_recipe():
    def fit_to_data(key, dist, x, *, loss_fn, optimizer):
        return flowjax(optimizer, loss_fn)

    given = {"MaximumLikelihoodLoss": Likelihood, "fit_to_data": fit_to_data}
    given |= {"key": None, "flow": START, "x": X, "settings": {"optimizer": sgd(2.0)}}
    recipe = page.execute("FlowJAX", given)
    return recipe, recipe["losses"]


# ---- brax 0.14.2: the loss is dropped, in ppo under pmap ----


def brax(optimizer, loss_fn, axis_name=None, steps=STEPS, train=run):
    """`gradients.gradient_update_fn`, which hands on no parameters, and the metrics."""

    def update(grads, state, params, **extra_args):
        if axis_name:
            grads = jax.lax.pmean(grads, axis_name)
        return optimizer.update(grads, state)

    dropping = optax.GradientTransformationExtraArgs(optimizer.init, update)
    logs = lambda loss, metrics: metrics["actor_loss"]
    return train(loss_fn, dropping, logs=logs, steps=steps)


def bc_loss(w):
    loss = scaled(0.05, w)
    return loss, {"actor_loss": loss}


def brax_module(monkeypatch, loss):
    """Its module of losses, after the recipe, twice: a notebook's cell, run again."""
    losses = module(monkeypatch, "brax.training.agents.bc.losses", bc_loss=loss)
    for _ in range(2):
        page.execute("Brax", {})
    return losses


# ---- marin-levanter 0.2.227.dev: `loss=`, the mean over micro-batches ----


class Levanter:
    """Its `Trainer`, with so many micro-batches for a configuration."""

    def __init__(self, parts, optimizer, loss_fn):
        self.parts, self.optimizer, self.loss_fn = parts, optimizer, loss_fn
        self.hooks = []

    def add_hook(self, hook):
        self.hooks.append(hook)

    def train(self, steps=STEPS):
        cut = [part.reshape(self.parts, -1, *part.shape[1:]) for part in (X, Y)]
        of_parts = jax.vmap(self.loss_fn, (None, 0, 0))
        whole = lambda w: self.loss_fn(w, X, Y)
        made = run(
            lambda w: (of_parts(w, *cut).mean(), None),
            self.optimizer,
            evaluates=lambda w: self.loss_fn(w, *VALID),
            given=lambda loss, aux, grads: {"obj_fn": whole, "loss": loss},
            steps=steps,
        )
        for hook in self.hooks:
            hook(Namespace(opt_state=made.state, step=steps))
        return made


# ---- maxtext 0.2.5: `loss=` if it skips spikes; sums over tokens by micro-batch ----


def skip_step_on_spikes(inner):
    """Keeps `loss` and `grad_norm` for itself."""

    def update(updates, state, params=None, *, loss=None, grad_norm=None, **extra_args):
        return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def token_loss(w, x, y, parts, *, is_train=True):
    """The mean, and the sum where it accumulates; aux holds the sum."""
    total = len(y) * scaled(1.0, w, x, y)
    return (total if parts > 1 else total / len(y)), {"xent_sum": total}


def maxtext(optimizer, loss_fn=token_loss, *, skips=False, parts=1, steps=STEPS):
    """It logs what it would give the optimizer: the raw mean where it adds up."""
    cut = [part.reshape(parts, -1, *part.shape[1:]) for part in (X, Y)]

    def objective(w):
        losses, aux = jax.vmap(loss_fn, (None, 0, 0, None))(w, *cut, parts)
        raw = jnp.sum(aux["xent_sum"]) / len(Y)
        loss = jnp.sum(losses) / (len(Y) if parts > 1 else 1)
        return loss, raw if parts > 1 else loss

    def given(loss, logged, grads):
        return {"loss": logged, "grad_norm": optax.tree.norm(grads)} if skips else {}

    return run(
        objective,
        optimizer,
        logs=lambda loss, logged: logged,
        evaluates=lambda w: loss_fn(w, *VALID, 1, is_train=False)[0],
        given=given,
        steps=steps,
    )


def maxtext_optimizer(monkeypatch, *, skips):
    """What MaxText makes after the recipe, twice."""

    def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
        plain = optax.sgd(learning_rate_schedule)
        return skip_step_on_spikes(plain) if config.skip_step_on_spikes else plain

    name = "maxtext.optimizers.optimizers"
    made = module(monkeypatch, name, get_optimizer=get_optimizer)
    for _ in range(2):
        page.execute("MaxText", {})
    config = Namespace(skip_step_on_spikes=skips)
    return made.get_optimizer(config, 0.02, None, mesh=None)


# ---- easydel 0.3.0: one part of the result is trained, another logged ----


@dataclasses.dataclass
class Outputs:
    loss: jax.Array

    def replace(self, **changed):
        return dataclasses.replace(self, **changed)


def llama():
    """A model, and the registry by which a resumed run finds the class last defined."""
    registry = []

    class LlamaForCausalLM:
        def __init_subclass__(cls):
            registry.append(cls)

        def compute_loss(self, *, w, x, y):
            loss = scaled(1.0, w, x, y)
            return Outputs(loss), Namespace(loss=loss)

    registry.append(LlamaForCausalLM)
    return Namespace(LlamaForCausalLM=LlamaForCausalLM, registry=registry)


def easydel(optimizer, model, start=START, steps=STEPS):
    def objective(w):
        outputs, metrics = model.compute_loss(w=w, x=X, y=Y)
        return outputs.loss, metrics.loss

    def update(grads, state, params):  # by the names of its arguments
        return optimizer.update(updates=grads, state=state, params=params)

    return run(
        objective,
        optax.GradientTransformation(optimizer.init, update),
        logs=lambda loss, metric: metric,
        evaluates=lambda w: model.compute_loss(w=w, x=VALID[0], y=VALID[1])[1].loss,
        start=start,
        steps=steps,
    )


# ---- big_vision at 0127fb6: losses by their names, which evaluators may share ----


def sigmoid_xent(*, logits, labels, reduction=True):
    each = jnp.sum(
        labels * jax.nn.softplus(-logits) + (1 - labels) * jax.nn.softplus(logits), -1
    )
    return jnp.mean(each) if reduction else each


ROWS = np.float32([[1.0, -0.5], [0.3, 1.0], [0.0, 0.7], [-0.6, 0.2]])
LABELS = np.float32(X @ ROWS > 0.0)


def big_vision(optimizer, loss, steps=200):
    objective = lambda w: (loss(logits=X @ w, labels=LABELS), None)
    return run(objective, optimizer, start=0 * ROWS, steps=steps)


# ---- kauldron 1.4.4: a loss is a sum and a count until it is computed ----


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    value: jax.Array
    count: jax.Array

    def merge(self, other):
        return type(self)(self.value + other.value, self.count + other.count)

    def compute(self):
        return self.value / self.count


class L2:
    State = State

    def state(self, w, x, y):
        values = (x @ w - y) ** 2
        return self.State(value=values.sum(), count=jnp.float32(values.size))


def kauldron(optimizer, loss, steps=STEPS):
    """`TrainStep`, and `Evaluator` on two batches of 40 and 24."""

    def evaluated(w):
        first, second = (
            loss.state(w, VALID[0][part], VALID[1][part])
            for part in (slice(40), slice(40, None))
        )
        return first.merge(second).compute()

    objective = lambda w: (loss.state(w, X, Y).compute(), None)
    return run(objective, optimizer, evaluates=evaluated, steps=steps)


def kauldron_loss():
    kd = Namespace(losses=Namespace(Loss=Namespace(State=State), L2=L2))
    return page.execute("Kauldron", {"kd": kd, "flax": flax})["FloodedL2"]()


# ---- tunix 0.1.7: one loss for training and evaluation; accumulates by MultiSteps ----


class PeftTrainer:
    def __init__(self, model, optimizer, training_config):
        if training_config.gradient_accumulation_steps is not None:
            often = training_config.gradient_accumulation_steps
            optimizer = optax.MultiSteps(optimizer, often)
        self.model = model
        self.optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        self.gen_model_input_fn = lambda inputs: inputs

    def with_loss_fn(self, loss_fn):
        self.loss_fn = self.eval_loss_fn = loss_fn
        return self

    def _train_step(self, model, optimizer, inputs):
        inputs = self.gen_model_input_fn(inputs)
        value, grads = nnx.value_and_grad(self.loss_fn)(model, **inputs)
        optimizer.update(model, grads)
        return value, None, optax.tree.norm(grads)

    def train(self, batches):
        held_out = {"x": VALID[0], "y": VALID[1]}

        @nnx.jit
        def step(model, optimizer, batch):
            before = model.kernel[...][:, 0]
            evaluated = self.eval_loss_fn(model, **held_out)
            return self._train_step(model, optimizer, batch)[0], evaluated, before

        seen = [step(self.model, self.optimizer, batch) for batch in batches]
        logged = (np.array(each) for each in zip(*seen, strict=True))
        return Run(*logged, np.asarray(self.model.kernel[...])[:, 0], None)


ALONE = Namespace(gradient_accumulation_steps=None)
TUNIX_BATCHES = [{"x": 1.5 * X, "y": 1.5 * Y}] * STEPS


def linear_loss(model, x, y):
    return jnp.mean((model(x)[:, 0] - y) ** 2)


def linear():
    zeros = nnx.initializers.zeros
    return nnx.Linear(4, 1, use_bias=False, kernel_init=zeros, rngs=nnx.Rngs(0))


def tunix(optimizer, loss_fn=linear_loss, kind=PeftTrainer, batches=None, parts=None):
    config = Namespace(gradient_accumulation_steps=parts)
    trainer = kind(linear(), optimizer, config).with_loss_fn(loss_fn)
    return trainer.train(TUNIX_BATCHES if batches is None else batches)


def tunix_recipe():
    given = {"peft_trainer": Namespace(PeftTrainer=PeftTrainer), "nnx": nnx}
    given |= {"model": linear(), "optimizer": optax.sgd(0.05), "config": ALONE}
    return page.execute("Tunix", given | {"loss_fn": linear_loss})
