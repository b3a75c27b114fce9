"""The recipes of docs/trainers.md hold to what the trainers of tests/standins.py do.

The recipe is the page's own code, and the raw loss is NumPy's, at the same parameters.
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
from flax import nnx

from benchmarks.trainers import page
from flood_optax import flood, flood_loss, flooded, scale_by_flood
from tests import standins
from tests.standins import LABELS, VALID, X, Y, sgd, squares

DATA, EASY = (
    tuple(np.asarray(a, np.float64) for a in data) for data in ((X, Y), VALID)
)


def risk(path, scale=1.0, data=DATA):
    """The raw loss at each point of a path."""
    x, y = data
    return scale * np.mean((np.float64(path) @ x.T - y) ** 2, axis=-1)


def risk_of_labels(path):
    logits = np.einsum("nf,tfk->tnk", DATA[0], np.float64(path))
    each = np.logaddexp(0, logits) - LABELS * logits
    return each.sum(-1).mean(-1)


def settles(losses, level, within=0.1):
    last = np.asarray(losses)[-20:]
    assert abs(last.mean() - level) < within * level, last
    assert 0.2 <= np.mean(last < level) <= 0.8, last


# ---- by the recipe ----


def by_brax(patch):
    losses = standins.brax_module(patch, standins.bc_loss)
    return standins.brax(sgd(0.05), losses.bc_loss)


def by_levanter(patch, parts=1, logged=None):
    """The recipe's trainer, whose hook logs the learning rate where it finds one."""

    def log_optimizer_hyperparams(opt_state, prefix=None, *, step=None):
        if hasattr(opt_state, "hyperparams") and logged is not None:
            logged.append((prefix, step, opt_state.hyperparams["learning_rate"]))

    log = {"log_optimizer_hyperparams": log_optimizer_hyperparams}
    standins.module(patch, "levanter.tracker", **log)
    build = lambda steps: optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    given = {"config": Namespace(build=build), "Trainer": standins.Levanter}
    given |= {"steps": standins.STEPS, "trainer_config": parts, "loss_fn": squares}
    return page.execute("Levanter", given)["trainer"]


def by_maxtext(patch, **options):
    optimizer = standins.maxtext_optimizer(patch, skips=True)
    return standins.maxtext(optimizer, skips=True, **options)


def flooded_llama(ed):
    for _ in range(2):  # a notebook's cell, run again
        page.execute("EasyDeL", {"ed": ed})
    return ed.LlamaForCausalLM()


def big_vision_loss():
    u, config = Namespace(sigmoid_xent=standins.sigmoid_xent), Namespace(loss="")
    page.execute("big_vision", {"u": u, "config": config})
    assert u.sigmoid_xent is standins.sigmoid_xent  # which evaluators keep
    return getattr(u, config.loss)


def by_tunix(_):
    trainer = standins.tunix_recipe()["trainer"]
    return trainer.train(standins.TUNIX_BATCHES)


RECIPES = {  # the run, its level, the unit of its raw loss, whether it evaluates
    "Penzai": (lambda _: standins.penzai_by_recipe()[1], 0.2, 1.0, False),
    "GPJax": (lambda _: standins.gpjax_by_recipe()[1], 0.2, 1.0, False),
    "FlowJAX": (lambda _: standins.flowjax_by_recipe()[1], 2.0, 10.0, True),
    "Brax": (by_brax, 0.05, 0.25, False),
    "Levanter": (lambda patch: by_levanter(patch).train(), 0.2, 1.0, True),
    "MaxText": (by_maxtext, 1.0, 5.0, True),
    "MaxText's loss": (
        lambda _: standins.maxtext(
            sgd(1.0), flooded(standins.token_loss, 1.0, has_aux=True, raw_value=True)
        ),
        *(1.0, 5.0, True),
    ),
    "EasyDeL": (
        lambda _: standins.easydel(sgd(1.0), flooded_llama(standins.llama())),
        *(1.0, 5.0, True),
    ),
    "big_vision": (
        lambda _: standins.big_vision(optax.adam(0.1), big_vision_loss()),
        *(0.2, None, False),
    ),
    "Kauldron": (
        lambda _: standins.kauldron(optax.sgd(0.1), standins.kauldron_loss()),
        *(0.2, 1.0, True),
    ),
    "Tunix": (by_tunix, 0.5, 2.25, True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_settles_at_its_level_and_shows_the_raw_loss(name, monkeypatch):
    make, level, scale, evaluates = RECIPES[name]
    run = make(monkeypatch)
    raw = risk(run.path, scale) if scale else risk_of_labels(run.path)
    np.testing.assert_allclose(run.logged, raw, rtol=1e-5)
    settles(raw, level)
    if evaluates:
        scale = (
            1.0 if name == "Tunix" else scale
        )  # whose batches are half as large again
        raw = risk(run.path, scale, EASY)
        np.testing.assert_allclose(run.evaluated, raw, rtol=1e-5)
        assert raw.min() < 0.5 * level


# ---- what one would write first ----

UNTOLD = {  # trainers that give the optimizer no loss
    "Penzai": lambda tx: standins.penzai(
        tx, standins.penzai_by_recipe()[0]["loss_fn"], 1
    ),
    "GPJax": lambda tx: standins.gpjax(tx, lambda w, data: squares(w), 1),
    "FlowJAX": lambda tx: standins.flowjax(tx, standins.Likelihood(), 1),
    "Brax": lambda tx: standins.brax(tx, standins.bc_loss, steps=1),
    "MaxText that skips nothing": lambda tx: standins.maxtext(tx, steps=1),
    "EasyDeL": lambda tx: standins.easydel(
        tx, standins.llama().LlamaForCausalLM(), steps=1
    ),
    "big_vision": lambda tx: standins.big_vision(tx, standins.sigmoid_xent, 1),
    "Kauldron": lambda tx: standins.kauldron(tx, standins.L2(), 1),
    "Tunix": lambda tx: standins.tunix(tx, batches=standins.TUNIX_BATCHES[:1]),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_flood_in_an_optimizer_that_is_given_no_loss_is_refused(name):
    with pytest.raises(ValueError, match="needs the current loss"):
        UNTOLD[name](optax.chain(scale_by_flood(0.2), optax.sgd(0.1)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Floor(standins.State):
    def compute(self):
        return flood_loss(super().compute(), 0.2)


class FloodedMetric(standins.llama().LlamaForCausalLM):
    def compute_loss(self, **batch):
        outputs, metrics = super().compute_loss(**batch)
        return outputs, Namespace(loss=flood_loss(metrics.loss, 1.0))


class FloodedState(standins.L2):
    State = Floor


def naive_gpjax():
    return standins.gpjax(sgd(0.2), flooded(lambda w, data: squares(w), 0.2))


def naive_levanter(parts=1):
    return standins.Levanter(parts, optax.sgd(0.1), flooded(squares, 0.2)).train()


FLOORS = {  # what is shown, of which run, and the level under which it never goes
    "GPJax": ("logged", naive_gpjax, 0.2),
    "FlowJAX": ("evaluated", lambda: naive_flowjax()[1], 2.0),
    "Levanter": ("logged", naive_levanter, 0.2),
    "Levanter's evaluation": ("evaluated", naive_levanter, 0.2),
    "MaxText": (
        "evaluated",
        lambda: standins.maxtext(
            sgd(1.0), flooded(standins.token_loss, 1.0, has_aux=True)
        ),
        1.0,
    ),
    "EasyDeL": ("logged", lambda: standins.easydel(sgd(1.0), FloodedMetric()), 1.0),
    "Kauldron": (
        "logged",
        lambda: standins.kauldron(optax.sgd(0.1), FloodedState()),
        0.2,
    ),
    "Tunix": (
        "evaluated",
        lambda: standins.tunix(
            optax.sgd(0.05),
            flooded(standins.linear_loss, 0.5),
            batches=standins.TUNIX_BATCHES[:20],
        ),
        0.5,
    ),
}


def naive_flowjax():
    return standins.flowjax(sgd(2.0), flooded(standins.Likelihood(), 2.0))


@pytest.mark.parametrize("name", FLOORS)
def test_line_without_raw_value_puts_a_floor_under_what_is_shown(name):
    shown, make, level = FLOORS[name]
    assert getattr(make(), shown).min() >= level


def test_penzai_hands_on_three_results_which_flooded_refuses():
    three = flooded(standins.penzai_by_recipe()[0]["loss_fn"], 0.2, has_aux=True)
    with pytest.raises(TypeError, match="3"):
        standins.penzai(optax.sgd(0.1), three, 1)


def test_gpjax_trains_alike_without_the_raw_value():
    _, run = standins.gpjax_by_recipe()
    np.testing.assert_allclose(naive_gpjax().end, run.end, rtol=1e-4)


def test_flowjax_chooses_by_the_raw_loss_by_the_recipe_and_not_without():
    recipe, run = standins.flowjax_by_recipe()
    lowest = risk(recipe["flow"], 10.0, EASY)
    np.testing.assert_allclose(run.evaluated.min(), lowest, rtol=1e-5)
    assert risk(naive_flowjax()[0], 10.0, EASY) > 1.2 * lowest


# ---- brax ----


def test_recipe_run_twice_keeps_a_penalty_that_wraps_the_loss(monkeypatch):
    """Its wrapper names the bare loss, so `inspect.unwrap` would strip the penalty."""

    @functools.wraps(standins.bc_loss)
    def penalised(w):
        loss = standins.bc_loss(w)[0] + 0.5 * jnp.sum(w**2)
        return loss, {"actor_loss": loss}

    losses = standins.brax_module(monkeypatch, penalised)
    w = np.array([1.0, -2.0, 0.5, 0.0])
    due = 0.25 * 2 / 64 * DATA[0].T @ (DATA[0] @ w - DATA[1]) + w  # far above .05
    grads, _ = jax.grad(losses.bc_loss, has_aux=True)(jnp.float32(w))
    np.testing.assert_allclose(grads, due, rtol=1e-5)


def test_brax_under_pmap_floods_the_mean_over_devices_given_its_axis():
    """Two shards of different losses, .9 and .3 of the level at the end of training."""
    order = np.argsort(Y)
    shards = X[order].reshape(2, 32, 4), Y[order].reshape(2, 32)

    @functools.partial(jax.jit, static_argnums=0)
    def train(axis):
        def device(x, y):
            loss = lambda w: (squares(w, x, y), {"actor_loss": squares(w, x, y)})
            bent = flooded(loss, 0.2, has_aux=True, axis_name=axis)
            return standins.brax(sgd(0.2), bent, "i", train=standins.scanned)[1][0]

        return jax.vmap(device, axis_name="i")(*shards).mean(axis=0)

    both = lambda w: (squares(w), {"actor_loss": squares(w)})
    whole = standins.brax(sgd(0.2), flooded(both, 0.2, has_aux=True)).logged
    shown = train("i")
    np.testing.assert_allclose(shown[:30], whole[:30], rtol=1e-4)
    settles(shown, 0.2)
    assert not np.allclose(train(None)[:30], whole[:30], rtol=1e-2)


# ---- micro-batches ----


def test_levanter_and_maxtext_flood_the_batch_of_micro_batches(monkeypatch):
    whole, parts = (by_levanter(monkeypatch, n).train(30).logged for n in (1, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    assert not np.allclose(naive_levanter(4).end, naive_levanter().end, rtol=1e-2)
    whole, parts = (by_maxtext(monkeypatch, parts=n) for n in (1, 4))
    np.testing.assert_allclose(parts.logged[:30], whole.logged[:30], rtol=1e-4)
    below = np.sum(parts.logged < 1.0)
    assert abs(int(optax.tree.get(parts.state, "flood_below")) - below) <= 1


def test_levanter_finds_no_learning_rate_outside_of_the_flood(monkeypatch):
    logged = []
    trainer = by_levanter(monkeypatch, logged=logged)
    run = trainer.train(30)
    assert logged == [("optim", 30, pytest.approx(0.1))]
    sys.modules["levanter.tracker"].log_optimizer_hyperparams(run.state, "optim")
    assert len(logged) == 1


def test_maxtext_refuses_the_recipe_where_it_skips_nothing(monkeypatch):
    optimizer = standins.maxtext_optimizer(monkeypatch, skips=False)
    with pytest.raises(ValueError, match="needs the current loss"):
        standins.maxtext(optimizer, steps=1)


def test_maxtext_loss_form_meets_a_sum_over_tokens_where_it_accumulates():
    raw_value = flooded(standins.token_loss, 1.0, has_aux=True, raw_value=True)
    raw = standins.maxtext(sgd(1.0), raw_value, parts=4, steps=300).logged
    least = 5 * np.linalg.lstsq(*DATA)[1][0] / len(Y)
    assert 1 / 16 < least + 0.05 < 0.3  # its level of 1/16 is below what can be reached
    assert raw[-20:].mean() < least + 0.05


def test_tunix_floods_the_window_by_the_recipe_and_micro_batches_without():
    order = np.argsort(-np.abs(Y)).reshape(4, 16)
    batches = [{"x": X[rows], "y": Y[rows]} for rows in order]
    losses = [float(np.mean(np.square(batch["y"]))) for batch in batches]
    level = float(np.mean(losses)) * 0.999  # the whole batch descends
    assert losses[0] > level > losses[-1]
    slopes = [0.1 * 2 / 64 * DATA[0][rows].T @ DATA[1][rows] for rows in order]
    due = np.sum(slopes, axis=0)

    window = flood(optax.sgd(0.1), level, every_k=4)
    kind = standins.tunix_recipe()["Accumulating"]
    moved = standins.tunix(window, kind=kind, batches=batches).end
    np.testing.assert_allclose(moved, due, rtol=1e-4, atol=1e-7)

    objective = flooded(standins.linear_loss, level, raw_value=True)
    each = standins.tunix(optax.sgd(0.1), objective, batches=batches, parts=4).end
    signs = [1 if loss >= level else -1 for loss in losses]
    assert -1 in signs
    np.testing.assert_allclose(each, np.dot(signs, slopes), rtol=1e-4, atol=1e-7)
    assert not np.allclose(each, due, rtol=0.1)


# ---- what else stands under their headings ----


def test_easydel_that_floods_its_metric_looks_flooded_and_is_not():
    run = standins.easydel(sgd(1.0), FloodedMetric())
    assert risk(run.end, 5.0) < 0.5


def test_easydel_resumes_with_the_class_defined_last():
    ed = standins.llama()

    class Subclass(ed.LlamaForCausalLM):
        def compute_loss(self, **batch):
            outputs, metrics = super().compute_loss(**batch)
            return outputs.replace(loss=flood_loss(outputs.loss, 1.0)), metrics

    first = standins.easydel(sgd(1.0), Subclass())
    settles(first.logged, 1.0)

    def resumed():
        return standins.easydel(sgd(1.0), ed.registry[-1](), first.end).logged

    settles(resumed(), 1.0)

    class Another(ed.LlamaForCausalLM): ...

    assert ed.registry[-1] is Another
    assert resumed()[-1] < 0.5
    flooded_llama(ed)
    settles(resumed(), 1.0)


def test_big_vision_refuses_the_losses_of_each_example_and_is_not_silent():
    with pytest.raises(ValueError, match="flood_mean"):
        big_vision_loss()(logits=X @ standins.ROWS, labels=LABELS, reduction=False)


def test_kauldron_leaves_the_other_losses_alone():
    loss, near = standins.kauldron_loss(), np.array([0.6, 0.3, 0.0, 0.0])
    assert risk(near) < 0.2
    decay = lambda w: 0.1 * jnp.sum(w**2)
    grads = jax.grad(lambda w: loss.state(w, X, Y).compute() + decay(w))
    residual = DATA[0] @ near - DATA[1]
    due = -2 / 64 * DATA[0].T @ residual + 0.2 * near
    np.testing.assert_allclose(grads(jnp.float32(near)), due, rtol=1e-4, atol=1e-6)


def test_nnx_optimizer_state_moves_behind_a_flood():
    recipe = page.execute("Flax NNX", {})
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(3))
    plain = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)
    loss_fn = nnx.jit(nnx.value_and_grad(lambda m: standins.linear_loss(m, X, Y)))
    for _ in range(3):
        plain.update(model, loss_fn(model)[1])
    code = page.blocks("Flax NNX")[1].splitlines()
    moving = "\n".join(line for line in code if not line.startswith("plain ="))
    names = recipe | {"model": model, "plain": plain}
    twin, unmoved = nnx.clone((model, plain))  # the moved state is shared, not copied
    exec(moving, names)
    optimizer = names["optimizer"]
    assert int(optimizer.step[...]) == 3
    value, grads = loss_fn(model)
    assert value > 0.2  # above the level, so that plain training goes on
    optimizer.update(model, grads, value=value)
    unmoved.update(twin, grads)
    np.testing.assert_array_equal(model.kernel[...], twin.kernel[...])
    assert float(optax.tree.get(optimizer.opt_state, "flood_value")) == value
    with pytest.raises(TypeError, match="unsupported format string"):
        f"{optax.tree.get(optimizer.opt_state, 'flood_value'):.3f}"
