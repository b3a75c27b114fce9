"""The recipes of docs/trainers.md hold to what their trainers do, without the trainers.

A stand-in passes on, drops, adds up and evaluates what the source of the named version
does, in our own words and no more than matters to flooding. The recipe is the page's
own code. `python -m benchmarks trainers` runs the same code in the trainers themselves.
"""

import dataclasses
from types import SimpleNamespace as Namespace

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from benchmarks.trainers import page
from flood_optax import flood, flood_loss, flooded
from tests.standins import (
    START,
    STEPS,
    VALID,
    X,
    Y,
    refuses_a_flood_in_the_optimizer,
    settles,
    squares,
)

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


def kauldron_train(losses, optimizer, steps=STEPS):
    """`TrainStep`, and `Evaluator` on two batches of 40 and 24 before each step."""

    def total(w):
        states = [loss.state(w, X, Y) for loss in losses]
        return sum(state.compute() for state in states), states

    def step(carry, _):
        w, state = carry
        grads, states = jax.grad(total, has_aux=True)(w)
        first, second = (
            losses[0].state(w, VALID[0][part], VALID[1][part])
            for part in (slice(40), slice(40, None))
        )
        updates, state = optimizer.update(grads, state, w)
        logs = states[0].compute(), first.merge(second).compute(), w
        return (optax.apply_updates(w, updates), state), logs

    carry, logs = jax.lax.scan(step, (START, optimizer.init(START)), length=steps)
    return carry[0], *logs


def test_kauldron_floods_the_mean_of_a_loss_and_evaluates_it_raw():
    kd = Namespace(losses=Namespace(Loss=Namespace(State=State), L2=L2))
    recipe = page.execute("Kauldron", {"kd": kd, "flax": flax})
    loss = recipe["FloodedL2"]()
    _, train, valid, path = kauldron_train([loss], optax.sgd(0.1))
    settles(train, 0.2)
    expected = jax.vmap(lambda w: squares(w, *VALID))(path)
    np.testing.assert_allclose(valid, expected, rtol=1e-5)
    assert valid.min() < 0.1

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Floor(State):
        def compute(self):
            return flood_loss(super().compute(), 0.2)

    class Naive(L2):
        State = Floor

    _, _, shown, _ = kauldron_train([Naive()], optax.sgd(0.1))
    assert shown.min() >= 0.2
    refuses_a_flood_in_the_optimizer(
        lambda optimizer: kauldron_train([L2()], optimizer, steps=1), optax.sgd(0.1)
    )


def test_kauldron_leaves_the_other_losses_alone():
    kd = Namespace(losses=Namespace(Loss=Namespace(State=State), L2=L2))
    loss = page.execute("Kauldron", {"kd": kd, "flax": flax})["FloodedL2"]()

    class Decay(L2):
        def state(self, w, x, y):
            return State(value=0.1 * jnp.sum(w**2), count=jnp.float32(1.0))

    near = jnp.array([0.6, 0.3, 0.0, 0.0])  # below the level
    grads = jax.grad(
        lambda w: loss.state(w, X, Y).compute() + Decay().state(w, X, Y).compute()
    )(near)
    residual = np.asarray(X @ near - Y, np.float64)
    assert np.mean(residual**2) < 0.2
    due = -2 / 64 * np.asarray(X).T @ residual + 0.2 * np.asarray(near)
    np.testing.assert_allclose(grads, due, rtol=1e-4, atol=1e-6)


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

    def train(self, batches, held_out=None):
        step, evaluate = nnx.jit(self._train_step), nnx.jit(self.eval_loss_fn)
        train, valid, raw = [], [], []
        for batch in batches:
            loss, _, _ = step(self.model, self.optimizer, batch)
            train.append(float(loss))
            if held_out:
                valid.append(float(evaluate(self.model, **held_out)))
                raw.append(float(tunix_loss(self.model, **held_out)))
        return train, valid, raw


PLAIN = Namespace(gradient_accumulation_steps=None)
HELD_OUT = {"x": VALID[0], "y": VALID[1]}


def tunix_loss(model, x, y):
    return jnp.mean((model(x)[:, 0] - y) ** 2)


def linear():
    return nnx.Linear(4, 1, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))


def tunix_recipe():
    return page.execute(
        "Tunix",
        {
            "peft_trainer": Namespace(PeftTrainer=PeftTrainer),
            "nnx": nnx,
            "model": linear(),
            "optimizer": optax.sgd(0.05),
            "config": PLAIN,
            "loss_fn": tunix_loss,
        },
    )


def test_tunix_evaluates_the_raw_loss_by_the_recipe_and_not_without():
    batches = [{"x": 1.5 * X, "y": 1.5 * Y}] * STEPS
    train, valid, raw = tunix_recipe()["trainer"].train(batches, HELD_OUT)
    settles(train, 0.5)
    np.testing.assert_allclose(valid, raw, rtol=1e-5)
    assert min(raw) < 0.2

    naive = PeftTrainer(linear(), optax.sgd(0.05), PLAIN)
    _, valid, raw = naive.with_loss_fn(flooded(tunix_loss, 0.5)).train(
        batches[:20], HELD_OUT
    )
    assert min(valid) >= 0.5
    assert min(raw) < 0.2
    refuses_a_flood_in_the_optimizer(
        lambda tx: (
            PeftTrainer(linear(), tx, PLAIN).with_loss_fn(tunix_loss).train(batches[:1])
        ),
        optax.sgd(0.05),
    )


def test_tunix_floods_the_window_by_the_recipe_and_micro_batches_without():
    order = np.argsort(-np.abs(np.asarray(Y))).reshape(4, 16)
    parts = [{"x": X[rows], "y": Y[rows]} for rows in order]
    losses = [float(np.mean(np.square(part["y"]))) for part in parts]
    level = float(np.mean(losses)) * 0.999  # the whole batch descends
    assert losses[0] > level > losses[-1]
    due = 0.1 * 2 / 64 * np.asarray(X, np.float64).T @ np.asarray(Y)

    def moved(kind, optimizer, config, loss_fn):
        trainer = kind(linear(), optimizer, config).with_loss_fn(loss_fn)
        trainer.train(parts)
        return np.asarray(trainer.model.kernel[...])[:, 0]

    sgd = optax.sgd(0.1)
    window = flood(sgd, level, every_k=4)
    by_flood = moved(tunix_recipe()["Accumulating"], window, PLAIN, tunix_loss)
    np.testing.assert_allclose(by_flood, due, rtol=1e-4, atol=1e-7)

    four = Namespace(gradient_accumulation_steps=4)
    objective = flooded(tunix_loss, level, raw_value=True)
    each = moved(PeftTrainer, sgd, four, objective)
    signs = [1 if loss >= level else -1 for loss in losses]
    assert -1 in signs
    bent = sum(
        sign * np.asarray(part["x"], np.float64).T @ np.asarray(part["y"])
        for sign, part in zip(signs, parts, strict=True)
    )
    np.testing.assert_allclose(each, 0.1 * 2 / 64 * bent, rtol=1e-4, atol=1e-7)
    assert not np.allclose(each, due, rtol=0.1)


# ---- flax 0.12.12: a plain checkpoint goes on in a flooded optimizer ----


def test_nnx_optimizer_state_moves_behind_a_flood():
    recipe = page.execute("Flax NNX", {})
    model, plain = nnx.Linear(4, 1, rngs=nnx.Rngs(3)), recipe["plain"]
    plain = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    loss_fn = lambda model: tunix_loss(model, X, Y)
    for _ in range(3):
        plain.update(model, nnx.grad(loss_fn)(model))
    code = page.blocks("Flax NNX")[1].splitlines()
    moving = "\n".join(line for line in code if not line.startswith("plain ="))
    names = recipe | {"model": model, "plain": plain}
    twin, unmoved = nnx.clone((model, plain))  # the moved state is shared, not copied
    exec(moving, names)
    optimizer = names["optimizer"]
    assert int(optimizer.step[...]) == 3
    value, grads = nnx.value_and_grad(loss_fn)(model)
    assert value > 0.2  # above the level, so that plain training goes on
    optimizer.update(model, grads, value=value)
    unmoved.update(twin, grads)
    np.testing.assert_array_equal(model.kernel[...], twin.kernel[...])
    assert float(optax.tree.get(optimizer.opt_state, "flood_value")) == value
    with pytest.raises(TypeError, match="unsupported format string"):
        f"{optax.tree.get(optimizer.opt_state, 'flood_value'):.3f}"
