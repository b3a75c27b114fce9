"""Which collectives flooding adds, and what the one-liners do on several devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from flood_optax import average_params, flood_mean, flooded, scale_by_flood
from tests import forms
from tests.sharded import (
    LEVELS,
    Checks,
    loss_fn,
    losses_fn,
    mapped,
    mesh_of,
    parameters,
    rows_on,
    varying,
)

CHECKS = Checks()

# ---- collectives ----

COLLECTIVE = re.compile(
    r"= (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|collective-permute"
    r"|all-to-all)(?:-start)?\("
)


def collectives(step, *arguments):
    """Kind and result types of every collective in the compiled program."""
    text = jax.jit(step).lower(*arguments).compile().as_text()
    shape = re.compile(r"\w+\[[\d,]*\]")
    return [(m[2], sorted(shape.findall(m[1]))) for m in COLLECTIVE.finditer(text)]


def training_steps(params=None):
    adam = optax.with_extra_args_support(optax.adam(0.1))
    level = LEVELS["below"]
    multi_steps = optax.MultiSteps(adam, 2).gradient_transformation()
    every = {"plain": (loss_fn, adam)}
    every["MultiSteps"] = loss_fn, optax.with_extra_args_support(multi_steps)
    every |= {k: (loss_fn, made) for k, made in forms.optimizers(adam, level).items()}
    every |= {k: (fn, adam) for k, fn in forms.objectives(losses_fn, level).items()}
    averaging = optax.chain(scale_by_flood(level), adam, average_params(0.9))
    every["average"] = loss_fn, averaging
    steps = {}
    for name, (objective, optimizer) in every.items():

        def step(params, state, x, y, *, objective=objective, optimizer=optimizer):
            value, grads = jax.value_and_grad(objective)(params, x, y)
            updates, state = optimizer.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state, value

        steps[name] = step, optimizer.init(parameters() if params is None else params)
    return steps


@CHECKS.once
def jit_adds_no_collective_but_one_scalar_for_the_loss_form():
    for axes in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of("data", kind=axes)
        with jax.set_mesh(mesh):
            params = jax.device_put(parameters(), NamedSharding(mesh, P()))
            counts = {
                name: collectives(step, params, state, *rows_on(mesh))
                for name, (step, state) in training_steps().items()
            }
        plain = counts["plain"]
        assert plain, "the plain step reduces its gradients"
        assert {kind for kind, _ in plain} == {"all-reduce"}
        for name in ("chain", "flood", "flood_skip", "average"):
            assert counts[name] == plain, (name, counts)
        assert counts["flood_every_k"] == counts["MultiSteps"], counts
        for name in ("flooded", "flood_mean"):
            assert len(counts[name]) <= len(plain) + 1, (name, counts)
            scalars = [t for _, t in counts[name] if t == ["f32[]"]]
            assert len(scalars) == 1, (name, counts)
            assert {kind for kind, _ in counts[name]} == {"all-reduce"}


@CHECKS.once
def average_of_parameters_that_are_split_adds_no_collective():
    mesh = mesh_of("data")
    split = {"w": NamedSharding(mesh, P("data")), "b": NamedSharding(mesh, P())}
    params = jax.device_put(parameters(), split)
    steps = training_steps(params)
    plain, averaging = (
        collectives(step, params, state, *rows_on(mesh))
        for step, state in (steps["plain"], steps["average"])
    )
    assert averaging == plain
    assert "all-gather" in {kind for kind, _ in plain}, "of the split parameters"


# ---- what the one-liners do: the numbers of docs/traps.md ----

# One example per device; losses w^2 s_i with mean .255 at w = 0.1, gradient 5.1.
SLOPES = np.array([2.5, 12.5, 30.5, 56.5])
TRAP_LEVEL, W = 0.2, np.float32(0.1)


def naive_flood(loss):
    return jnp.abs(loss - TRAP_LEVEL) + TRAP_LEVEL


def trap_loss(w, s):
    return (w**2 * s).mean()


def trap_gradient(function, *, check_vma):
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    specs = (P(), P("data"))
    out = mapped(function, mesh, specs, check_vma=check_vma)
    return float(out(W, np.float32(SLOPES)))


@CHECKS.once
def trap_per_device_flooding_is_another_objective():
    def gradient(w, s):
        grad = jax.grad(lambda w: naive_flood(trap_loss(w, s)))(varying(w))
        return lax.pmean(grad, "data")

    for check_vma in (True, False):
        assert abs(trap_gradient(gradient, check_vma=check_vma) - 3.6) < 1e-5

    def ours(w, s):
        objective = flooded(trap_loss, TRAP_LEVEL, axis_name="data")
        return lax.pmean(jax.grad(objective)(varying(w), s), "data")

    for check_vma in (True, False):
        assert abs(trap_gradient(ours, check_vma=check_vma) - 5.1) < 1e-5


@CHECKS.once
def trap_pmean_inside_the_loss_keeps_the_local_gradient_without_check_vma():
    """Jax issue 3970: without check_vma each device keeps its own share."""

    def gradient(w, s):
        loss = lambda w: naive_flood(lax.pmean(trap_loss(w, s), "data"))
        return jax.grad(loss)(w)

    assert abs(trap_gradient(gradient, check_vma=True) - 5.1) < 1e-5
    assert abs(trap_gradient(gradient, check_vma=False) - 0.5) < 1e-5


@CHECKS.once
def trap_replicated_params_with_check_vma_are_summed_already():
    def gradient(w, s):
        objective = flooded(trap_loss, TRAP_LEVEL, axis_name="data")
        return lax.pmean(jax.grad(objective)(w, s), "data")

    assert abs(trap_gradient(gradient, check_vma=True) - 20.4) < 1e-4
    assert abs(trap_gradient(gradient, check_vma=False) - 5.1) < 1e-5


@CHECKS.once
def trap_local_value_flips_some_devices_only():
    """Silently wrong without check_vma, refused with it; replicas diverge in pmap."""

    def update(w, s, axis_name=None):
        value, grad = jax.value_and_grad(trap_loss)(varying(w), s)
        transform = scale_by_flood(TRAP_LEVEL, axis_name=axis_name)
        grad = lax.pmean(grad, "data")
        return transform.update(grad, transform.init(w), value=value)[0]

    # the first device's answer, whose own loss .025 is below the level
    assert abs(trap_gradient(update, check_vma=False) + 5.1) < 1e-5
    with pytest.raises(ValueError, match="varies over the mapped axis 'data'"):
        trap_gradient(update, check_vma=True)
    for check_vma in (True, False):
        right = functools.partial(update, axis_name="data")
        assert abs(trap_gradient(right, check_vma=check_vma) - 5.1) < 1e-5

    rows = np.float32(SLOPES).reshape(4, 1)
    mapped_update = jax.pmap(
        update, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:4]
    )
    np.testing.assert_allclose(mapped_update(W, rows), [-5.1, -5.1, 5.1, 5.1], 1e-5)


@CHECKS.once
def trap_pmean_of_masked_means_weighs_examples_unequally():
    """One example counts on the first device and four on the second."""
    losses = np.float32([0.1, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    mask = np.array([True, False, False, False, True, True, True, True])
    level = 0.7
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )

    def naive(losses, mask):
        mean = lax.pmean(jnp.where(mask, losses, 0).sum() / mask.sum(), "data")
        return mean, jnp.sign(mean - level)

    def ours(losses, mask):
        mean = functools.partial(flood_mean, where=mask, axis_name="data")
        grad = jax.grad(lambda c: mean(c * losses, level))(varying(jnp.float32(1)))
        return mean(losses, -np.inf), jnp.sign(lax.pmean(grad, "data"))

    specs = (P("data"), P("data"))
    got = mapped(naive, mesh, specs, check_vma=False)(losses, mask)
    np.testing.assert_allclose(got, (0.55, -1), rtol=1e-6)
    got = mapped(ours, mesh, specs, check_vma=False)(losses, mask)
    np.testing.assert_allclose(got, (losses[mask].mean(), 1), rtol=1e-6)
    np.testing.assert_allclose(got[0], 0.82, rtol=1e-6)


@CHECKS.parametrize()
def test_sharding(name, devices):
    CHECKS.assert_held(name, __file__, devices)


if __name__ == "__main__":
    CHECKS.report()
