"""The recipes of docs/trainers.md hold to what their trainers do, without the trainers.

A stand-in passes on, drops, adds up and evaluates what the source of the named version
does, in our own words and no more than matters to flooding. The recipe is the page's
own code. `python -m benchmarks trainers` runs the same code in the trainers themselves.
"""

import dataclasses
from types import SimpleNamespace as Namespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.trainers import page
from flood_optax import flood_loss, flooded
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
)

# ---- maxtext 0.2.5: `loss=` if it skips spikes; sums over tokens by micro-batch ----


def skip_step_on_spikes(inner, limit=1e3):
    """Keeps `loss` and `grad_norm` for itself; without a loss it does nothing."""

    def init(params):
        return {"inner_state": inner.init(params), "is_skipped": jnp.array(False)}

    def update(updates, state, params=None, **extra_args):
        loss = extra_args.pop("loss", None)
        extra_args.pop("grad_norm", None)
        step = lambda: inner.update(updates, state["inner_state"], params, **extra_args)
        if loss is None:
            new, inner_state = step()
            return new, {"inner_state": inner_state, "is_skipped": jnp.array(False)}
        skip = lambda: (jax.tree.map(jnp.zeros_like, updates), state["inner_state"])
        new, inner_state = jax.lax.cond(loss < limit, step, skip)
        return new, {"inner_state": inner_state, "is_skipped": loss >= limit}

    return optax.GradientTransformationExtraArgs(init, update)


def token_loss(w, x, y, parts, *, is_train=True):
    """The mean, and the sum where it accumulates; aux holds the sum and the count."""
    total = len(y) * scaled(1.0, w, x, y)
    aux = {"xent_sum": total, "total_weights": len(y)}
    return (total if parts > 1 else total / len(y)), aux


def maxtext_train(loss_fn, optimizer, *, skips, parts=1, steps=STEPS):
    """Training losses, what is evaluated after each step, and the raw mean loss."""
    cut = [part.reshape(parts, -1, *part.shape[1:]) for part in (X, Y)]

    def step(carry, _):
        w, state = carry
        values = jax.value_and_grad(loss_fn, has_aux=True)
        (losses, aux), grads = jax.vmap(values, (None, 0, 0, None))(w, *cut, parts)
        lm_loss = jnp.sum(aux["xent_sum"]) / len(Y)
        loss, share = (lm_loss, 1 / len(Y)) if parts > 1 else (losses[0], 1.0)
        grads = share * jnp.sum(grads, axis=0)
        given = {"loss": loss, "grad_norm": optax.tree.norm(grads)} if skips else {}
        updates, state = optimizer.update(grads, state, w, **given)
        w = optax.apply_updates(w, updates)
        return (w, state), (loss, loss_fn(w, *VALID, 1, is_train=False)[0], lm_loss)

    carry = START, optimizer.init(START)
    (_, state), logged = jax.lax.scan(step, carry, length=steps)
    return *np.asarray(logged), state


@pytest.fixture
def maxtext(monkeypatch):
    """What makes MaxText's optimizer, with the recipe."""

    def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
        plain = optax.sgd(learning_rate_schedule)
        return skip_step_on_spikes(plain) if config.skip_step_on_spikes else plain

    made = module(
        monkeypatch, "maxtext.optimizers.optimizers", get_optimizer=get_optimizer
    )
    for _ in range(2):  # a notebook's cell, run again
        page.execute("MaxText", {})

    def optimizer(*, skips=True):
        config = Namespace(skip_step_on_spikes=skips)
        return made.get_optimizer(config, 0.02, None, mesh=None)

    return optimizer


def test_maxtext_floods_the_mean_over_all_tokens_and_no_evaluation(maxtext):
    loss, evaluation, raw, _ = maxtext_train(token_loss, maxtext(), skips=True)
    settles(loss, 1.0)
    np.testing.assert_allclose(loss, raw, rtol=1e-6)
    assert evaluation.min() < 0.5
    in_parts, _, _, state = maxtext_train(token_loss, maxtext(), skips=True, parts=4)
    np.testing.assert_allclose(in_parts[:30], loss[:30], rtol=1e-4)
    below = np.sum(in_parts < 1.0)
    assert abs(int(optax.tree.get(state, "flood_below")) - below) <= 1
    with pytest.raises(ValueError, match="needs the current loss"):
        maxtext_train(token_loss, maxtext(skips=False), skips=False, steps=1)


def test_maxtext_loss_form_meets_a_sum_over_tokens_where_it_accumulates():
    raw_value = flooded(token_loss, 1.0, has_aux=True, raw_value=True)
    loss, evaluation, raw, _ = maxtext_train(raw_value, sgd(1.0), skips=False)
    settles(loss, 1.0)
    np.testing.assert_allclose(loss, raw, rtol=1e-6)
    assert evaluation.min() < 0.5
    flooded_both = flooded(token_loss, 1.0, has_aux=True)
    _, evaluation, _, _ = maxtext_train(flooded_both, sgd(1.0), skips=False)
    assert evaluation.min() >= 1.0
    _, _, raw, _ = maxtext_train(raw_value, sgd(1.0), skips=False, parts=4, steps=300)
    least = 5 * np.linalg.lstsq(np.asarray(X), np.asarray(Y))[1][0] / len(Y)
    assert 1 / 16 < least + 0.05 < 0.3  # its level of 1/16 is below what can be reached
    assert raw[-20:].mean() < least + 0.05


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


def easydel_train(model, optimizer, w=START, steps=STEPS):
    """The log, the evaluation, and where it ended."""

    def step(carry, _):
        w, state = carry

        def loss_fn(w):
            outputs, metrics = model.compute_loss(w=w, x=X, y=Y)
            return outputs.loss, metrics.loss

        (_, logged), grads = jax.value_and_grad(loss_fn, has_aux=True)(w)
        updates, state = optimizer.update(updates=grads, state=state, params=w)
        w = optax.apply_updates(w, updates)
        _, metrics = model.compute_loss(w=w, x=VALID[0], y=VALID[1])
        return (w, state), (logged, metrics.loss)

    (w, _), (log, evaluation) = jax.lax.scan(step, (w, optimizer.init(w)), length=steps)
    return np.asarray(log), np.asarray(evaluation), w


def test_easydel_trains_on_one_loss_and_logs_and_evaluates_the_other():
    ed = llama()
    for _ in range(2):  # a notebook's cell, run again
        page.execute("EasyDeL", {"ed": ed})
    log, evaluation, w = easydel_train(ed.LlamaForCausalLM(), sgd(1.0))
    settles(log, 1.0)
    np.testing.assert_allclose(evaluation[-1], scaled(1.0, w, *VALID), rtol=1e-5)
    assert evaluation.min() < 0.5

    class Metric(llama().LlamaForCausalLM):
        def compute_loss(self, **batch):
            outputs, metrics = super().compute_loss(**batch)
            return outputs, Namespace(loss=flood_loss(metrics.loss, 1.0))

    log, _, w = easydel_train(Metric(), sgd(1.0))
    assert log.min() >= 1.0  # it looks flooded, and is not
    assert scaled(1.0, w) < 0.5
    refuses_a_flood_in_the_optimizer(
        lambda optimizer: easydel_train(llama().LlamaForCausalLM(), optimizer, steps=1),
        optax.sgd(0.1),
    )


def test_easydel_resumes_with_the_class_defined_last():
    ed = llama()

    class Subclass(ed.LlamaForCausalLM):
        def compute_loss(self, **batch):
            outputs, metrics = super().compute_loss(**batch)
            return outputs.replace(loss=flood_loss(outputs.loss, 1.0)), metrics

    log, _, w = easydel_train(Subclass(), sgd(1.0))
    settles(log, 1.0)
    settles(easydel_train(ed.registry[-1](), sgd(1.0), w)[0], 1.0)

    class Another(ed.LlamaForCausalLM): ...

    resumed = lambda: easydel_train(ed.registry[-1](), sgd(1.0), w)[0]
    assert ed.registry[-1] is Another
    assert resumed()[-1] < 0.5
    page.execute("EasyDeL", {"ed": ed})
    settles(resumed(), 1.0)


# ---- big_vision at 0127fb6: losses by their names, which evaluators may share ----


def sigmoid_xent(*, logits, labels, reduction=True):
    each = jnp.sum(
        labels * jax.nn.softplus(-logits) + (1 - labels) * jax.nn.softplus(logits), -1
    )
    return jnp.mean(each) if reduction else each


def test_big_vision_trains_by_a_new_name_and_evaluates_by_the_old_one():
    u = Namespace(sigmoid_xent=sigmoid_xent)
    config = Namespace(loss="sigmoid_xent")
    page.execute("big_vision", {"u": u, "config": config})
    rows = jnp.array([[1.0, -0.5], [0.3, 1.0], [0.0, 0.7], [-0.6, 0.2]])
    labels = (X @ rows > 0.0).astype(jnp.float32)

    def train(name, optimizer, steps=200):
        def step(carry, _):
            w, state = carry
            call = lambda w: getattr(u, name)(logits=X @ w, labels=labels)
            loss, grads = jax.value_and_grad(call)(w)
            updates, state = optimizer.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), loss

        w = jnp.zeros((4, 2))
        return jax.lax.scan(step, (w, optimizer.init(w)), length=steps)

    (w, _), losses = train(config.loss, optax.adam(0.1))
    settles(losses, 0.2)
    plain = {"logits": X @ w, "labels": labels, "reduction": False}
    np.testing.assert_allclose(u.sigmoid_xent(**plain), sigmoid_xent(**plain))
    with pytest.raises(ValueError, match="flood_mean"):  # not silent where it is shared
        getattr(u, config.loss)(**plain)
    refuses_a_flood_in_the_optimizer(
        lambda optimizer: train("sigmoid_xent", optimizer, 1), optax.sgd(0.1)
    )
