"""The recipes of docs/trainers.md hold to what their trainers do, without the trainers.

A stand-in passes on, drops, adds up and evaluates what the source of the named version
does, in our own words and no more than matters to flooding. The recipe is the page's
own code. `python -m benchmarks trainers` runs the same code in the trainers themselves.
"""

import dataclasses
import functools
import sys
from types import SimpleNamespace as Namespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.trainers import page
from flood_optax import flooded
from tests.standins import (
    START,
    STEPS,
    VALID,
    X,
    Y,
    module,
    refuses_a_flood_in_the_optimizer,
    scaled,
    settles,
    sgd,
    squares,
)

# ---- penzai 0.2.5: no value of the loss is ever seen ----


@dataclasses.dataclass
class Named:
    """An array whose axes have names."""

    array: jax.Array

    def unwrap(self, *names):
        assert len(names) == self.array.ndim
        return self.array


@dataclasses.dataclass
class StatefulTrainer:
    w: jax.Array
    state: object
    optimizer_def: object
    loss_fn: object

    @classmethod
    def build(cls, root_rng, model, optimizer_def, loss_fn):
        return cls(model, optimizer_def.init(model), optimizer_def, loss_fn)

    def step(self, **batch):
        def three(w):
            model = lambda x: Named((x @ w)[:, None])
            loss, state, last = self.loss_fn(model=model, state=None, rng=None, **batch)
            return loss, (state, last)

        grads, (_, last) = jax.grad(three, has_aux=True)(self.w)
        updates, self.state = self.optimizer_def.update(grads, self.state, self.w)
        self.w = optax.apply_updates(self.w, updates)
        return last


def test_penzai_floods_in_the_loss_function_and_hands_out_the_raw_loss():
    toolshed = Namespace(StatefulTrainer=StatefulTrainer)
    recipe = page.execute(
        "Penzai", {"basic_training": toolshed, "rng": None, "model": START}
    )
    trainer = recipe["trainer"]
    expected, shown = np.transpose(
        [(squares(trainer.w), trainer.step(x=X, y=Y)) for _ in range(STEPS)]
    )
    np.testing.assert_allclose(shown, expected, rtol=1e-5)
    settles(shown, 0.2)

    def train(optimizer):
        StatefulTrainer.build(None, START, optimizer, recipe["loss_fn"]).step(x=X, y=Y)

    refuses_a_flood_in_the_optimizer(train, optax.sgd(0.1))
    three = flooded(recipe["loss_fn"], 0.2, has_aux=True)
    with pytest.raises(TypeError, match="3"):
        StatefulTrainer.build(None, START, optax.sgd(0.1), three).step(x=X, y=Y)


# ---- gpjax 1.0.0: the history is what is differentiated ----


def gpjax_fit(*, model, objective, train_data, optim, num_iters):
    def step(carry, _):
        w, state = carry
        value, grads = jax.value_and_grad(objective)(w, train_data)
        updates, state = optim.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), value

    carry, history = jax.lax.scan(step, (model, optim.init(model)), length=num_iters)
    return carry[0], history


def test_gpjax_history_is_raw_by_the_recipe_and_has_a_floor_without():
    likelihood = lambda w, data: -data.n * squares(w)
    gpx = Namespace(fit=gpjax_fit, objectives=Namespace(conjugate_mll=likelihood))
    settings = {"optim": sgd(0.2), "num_iters": STEPS}
    given = {"posterior": START, "data": Namespace(n=64), "settings": settings}
    recipe = page.execute("GPJax", {"gpx": gpx, **given})
    np.testing.assert_allclose(recipe["history"][0], squares(START), rtol=1e-5)
    settles(recipe["history"], 0.2)

    def train(optimizer, objective=recipe["nll"], num_iters=STEPS):
        return gpjax_fit(
            model=START,
            objective=objective,
            train_data=given["data"],
            optim=optimizer,
            num_iters=num_iters,
        )

    w, history = train(sgd(0.2), flooded(recipe["nll"], 0.2))
    assert history.min() >= 0.2
    np.testing.assert_allclose(w, recipe["posterior"], rtol=1e-4)
    refuses_a_flood_in_the_optimizer(train, sgd(0.2))


# ---- flowjax 19.1.2: stops early and chooses an epoch by the training loss ----


def fit_to_data(key, dist, x, *, loss_fn, optimizer, max_epochs=STEPS):
    w, state = dist, optimizer.init(dist)
    losses, best = {"train": [], "val": []}, dist

    @jax.jit
    def step(w, state):
        value, grads = jax.value_and_grad(loss_fn)(w, None, x, key=key)
        updates, state = optimizer.update(grads, state, params=w)
        return optax.apply_updates(w, updates), state, value

    evaluate = jax.jit(lambda w: loss_fn(w, None, VALID[0], key=key))
    for _ in range(max_epochs):
        w, state, value = step(w, state)
        losses["train"].append(float(value))
        losses["val"].append(float(evaluate(w)))
        if losses["val"][-1] == min(losses["val"]):
            best = w
    return best, losses


class Likelihood:
    """A callable without a `__name__`, as its loss is; here of a regression."""

    def __call__(self, params, static, x, condition=None, key=None):
        return scaled(2.0, params, x, Y if x is X else VALID[1])


def test_flowjax_chooses_by_the_raw_loss_by_the_recipe_and_not_without():
    given = {
        "MaximumLikelihoodLoss": Likelihood,
        "fit_to_data": fit_to_data,
        "key": None,
        "flow": START,
        "x": X,
    }
    settings = {"optimizer": sgd(2.0)}
    recipe = page.execute("FlowJAX", given | {"settings": settings})
    losses = recipe["losses"]
    settles(losses["train"], 2.0)
    lowest = scaled(2.0, recipe["flow"], *VALID)
    np.testing.assert_allclose(min(losses["val"]), lowest, rtol=1e-5)
    assert lowest < 1.0

    wrong = flooded(Likelihood(), 2.0)
    chosen, seen = fit_to_data(None, START, X, loss_fn=wrong, **settings)
    assert min(seen["val"]) >= 2.0
    assert scaled(2.0, chosen, *VALID) > 1.2 * lowest
    refuses_a_flood_in_the_optimizer(
        lambda optimizer: fit_to_data(
            None, START, X, loss_fn=Likelihood(), optimizer=optimizer, max_epochs=1
        ),
        sgd(2.0),
    )


# ---- brax 0.14.2: the loss is dropped, in ppo under pmap ----


def brax_train(loss_fn, optimizer, axis_name=None, steps=STEPS):
    """`gradients.gradient_update_fn`, and the metrics of each step."""

    def step(carry, _):
        w, state = carry
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
        if axis_name:
            grads = jax.lax.pmean(grads, axis_name)
        updates, state = optimizer.update(grads, state)  # without the parameters
        return (optax.apply_updates(w, updates), state), metrics["actor_loss"]

    return jax.lax.scan(step, (START, optimizer.init(START)), length=steps)


def test_brax_floods_by_the_loss_of_the_module_and_logs_the_raw_one(monkeypatch):
    def bc_loss(w):
        loss = scaled(0.05, w)
        return loss, {"actor_loss": loss}

    losses = module(monkeypatch, "brax.training.agents.bc.losses", bc_loss=bc_loss)
    for _ in range(2):  # a notebook's cell, run again
        page.execute("Brax", {})
    _, shown = brax_train(losses.bc_loss, sgd(0.05))
    np.testing.assert_allclose(shown[0], scaled(0.05, START), rtol=1e-5)
    settles(shown, 0.05)
    refuses_a_flood_in_the_optimizer(
        lambda optimizer: brax_train(bc_loss, optimizer, steps=1), optax.sgd(0.1)
    )


def test_recipe_run_twice_keeps_a_penalty_that_wraps_the_loss(monkeypatch):
    """Its wrapper names the bare loss, so `inspect.unwrap` would strip the penalty."""

    def bare(w):
        loss = scaled(0.05, w)
        return loss, {"actor_loss": loss}

    @functools.wraps(bare)
    def penalised(w):
        loss = bare(w)[0] + 0.5 * jnp.sum(w**2)
        return loss, {"actor_loss": loss}

    losses = module(monkeypatch, "brax.training.agents.bc.losses", bc_loss=penalised)
    for _ in range(2):
        page.execute("Brax", {})
    w = jnp.array([1.0, -2.0, 0.5, 0.0])
    residual = np.asarray(X, np.float64) @ np.asarray(w) - np.asarray(Y)
    due = 0.25 * 2 / 64 * np.asarray(X).T @ residual + np.asarray(w)  # far above .05
    grads, _ = jax.grad(losses.bc_loss, has_aux=True)(w)
    np.testing.assert_allclose(grads, due, rtol=1e-5)


def test_brax_under_pmap_floods_the_mean_over_devices_given_its_axis():
    """Two shards of different losses, .9 and .3 of the level at the end of training."""
    order = jnp.argsort(Y)
    shards = X[order].reshape(2, 32, 4), Y[order].reshape(2, 32)

    def train(axis):
        def device(x, y):
            def ppo_loss(w):
                return squares(w, x, y), {"actor_loss": squares(w, x, y)}

            loss = flooded(ppo_loss, 0.2, has_aux=True, axis_name=axis)
            return brax_train(loss, sgd(0.2), "i")

        (w, _), shown = jax.vmap(device, axis_name="i")(*shards)
        return w[0], shown.mean(axis=0)

    _, shown = train("i")
    (_, _), whole = brax_train(
        flooded(lambda w: (squares(w), {"actor_loss": squares(w)}), 0.2, has_aux=True),
        sgd(0.2),
    )
    np.testing.assert_allclose(shown[:30], whole[:30], rtol=1e-4)
    settles(shown, 0.2)
    _, each = train(None)
    assert not np.allclose(each[:30], whole[:30], rtol=1e-2)


# ---- marin-levanter 0.2.227.dev: `loss=`, the mean over micro-batches ----


class Trainer:
    def __init__(self, parts, optimizer, loss_fn):
        self.parts, self.optimizer, self.loss_fn = parts, optimizer, loss_fn
        self.hooks = []

    def add_hook(self, hook):
        self.hooks.append(hook)

    def train(self, steps=STEPS):
        """The losses, their evaluation and the last parameters."""
        cut = [part.reshape(self.parts, -1, *part.shape[1:]) for part in (X, Y)]

        @jax.jit
        def step(w, state):
            mean = lambda tree: jax.tree.map(lambda part: jnp.mean(part, axis=0), tree)
            in_parts = jax.vmap(jax.value_and_grad(self.loss_fn), (None, 0, 0))
            loss, grads = mean(in_parts(w, *cut))
            updates, state = self.optimizer.update(
                grads,
                state,
                params=w,
                obj_fn=lambda w: self.loss_fn(w, X, Y),
                loss=loss,
            )
            return optax.apply_updates(w, updates), state, loss

        w, state = START, self.optimizer.init(START)
        losses, evaluation = [], []
        for number in range(steps):
            w, state, loss = step(w, state)
            losses.append(loss)
            evaluation.append(self.loss_fn(w, *VALID))
            for hook in self.hooks:
                hook(Namespace(opt_state=state, step=number))
        return losses, evaluation, w


@pytest.fixture
def levanter(monkeypatch):
    """The recipe's trainer on so many micro-batches, and what its hook logs."""
    logged = []

    def log_optimizer_hyperparams(opt_state, prefix=None, *, step=None):
        if hasattr(opt_state, "hyperparams"):
            logged.append((prefix, step, opt_state.hyperparams["learning_rate"]))

    module(
        monkeypatch,
        "levanter.tracker",
        log_optimizer_hyperparams=log_optimizer_hyperparams,
    )
    build = lambda steps: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)

    def made(parts):
        given = {"config": Namespace(build=build), "steps": STEPS, "Trainer": Trainer}
        return page.execute(
            "Levanter", given | {"trainer_config": parts, "loss_fn": squares}
        )["trainer"]

    return made, logged


def test_levanter_floods_the_batch_of_micro_batches_and_no_evaluation(levanter):
    made, logged = levanter
    losses, evaluation, w = made(1).train()
    settles(losses, 0.2)
    assert min(evaluation) < 0.1
    assert logged[:2] == [("optim", 0, pytest.approx(0.1)), ("optim", 1, logged[1][2])]
    in_parts, _, _ = made(4).train(30)
    np.testing.assert_allclose(in_parts, losses[:30], rtol=1e-4)

    wrong = lambda parts: Trainer(parts, optax.sgd(0.1), flooded(squares, 0.2))
    whole, evaluation, w = wrong(1).train()
    assert min(evaluation) >= 0.2
    assert min(whole) >= 0.2
    _, _, parted = wrong(4).train()
    assert not np.allclose(parted, w, rtol=1e-2)


def test_levanter_finds_no_learning_rate_outside_of_the_flood(levanter):
    made, logged = levanter
    trainer = made(1)
    state = trainer.optimizer.init(START)
    sys.modules["levanter.tracker"].log_optimizer_hyperparams(state, "optim", step=0)
    assert not logged
    trainer.hooks[0](Namespace(opt_state=state, step=0))
    assert len(logged) == 1
