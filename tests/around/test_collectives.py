"""Which collectives flooding adds, and what the one-liners do on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from flood_optax import average_params, flood, flood_mean, flooded, scale_by_flood
from tests import forms
from tests.sharded import (
    LEVELS,
    Checks,
    collectives,
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


ONE_DEVICE = {
    "scale_by_flood": scale_by_flood(0.5, axis_name="data"),
    "flood": flood(optax.sgd(1.0), 0.5, axis_name="data"),
    "window": flood(optax.sgd(1.0), 0.5, axis_name="data", every_k=3),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ONE_DEVICE)
def test_an_update_sends_one_collective(form, weighted):
    optimizer = ONE_DEVICE[form]

    def step(state, value, weight):
        extra = {"weight": weight[0]} if weighted else {}
        return optimizer.update(
            jnp.ones(3), state, jnp.ones(3), value=value[0], **extra
        )

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = (P(), P("data"), P("data"))
    over_one = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
    state = optimizer.init(np.ones(3, "f4"))
    text = jax.jit(over_one).lower(state, np.ones(1, "f4"), np.ones(1, "f4")).as_text()
    assert text.count("stablehlo.all_reduce") == 1
    kind = "tensor<2xf32>" if weighted else "tensor<f32>"
    assert f"({kind}) -> {kind}" in text


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


def naive_in_each(w, s):
    grad = jax.grad(lambda w: naive_flood(trap_loss(w, s)))(varying(w))
    return lax.pmean(grad, "data")


def naive_pmean_inside(w, s):
    """Jax issue 3970: without check_vma each device keeps its own share."""
    return jax.grad(lambda w: naive_flood(lax.pmean(trap_loss(w, s), "data")))(w)


def ours(w, s, spread=varying):
    objective = flooded(trap_loss, TRAP_LEVEL, axis_name="data")
    return lax.pmean(jax.grad(objective)(spread(w), s), "data")


def optax_form(w, s, axis_name="data"):
    value, grad = jax.value_and_grad(trap_loss)(varying(w), s)
    transform = scale_by_flood(TRAP_LEVEL, axis_name=axis_name)
    grad = lax.pmean(grad, "data")
    return transform.update(grad, transform.init(w), value=value)[0]


def local_value(w, s):
    return optax_form(w, s, axis_name=None)


# what each gives with check_vma and without; None is refused
TRAPS = {
    "ours": (ours, 5.1, 5.1),
    "the optax form": (optax_form, 5.1, 5.1),
    "per device flooding is another objective": (naive_in_each, 3.6, 3.6),
    "pmean inside the loss keeps the local gradient": (naive_pmean_inside, 5.1, 0.5),
    "replicated parameters are summed already": (
        functools.partial(ours, spread=lambda w: w),
        *(20.4, 5.1),
    ),
    # the first device's answer, whose own loss .025 is below the level
    "local value flips some devices only": (local_value, None, -5.1),
}


def trap(function, *gradients):
    for check_vma, wanted in zip((True, False), gradients, strict=True):
        if wanted is None:
            with pytest.raises(ValueError, match="varies over the mapped axis 'data'"):
                trap_gradient(function, check_vma=check_vma)
        else:
            got = trap_gradient(function, check_vma=check_vma)
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


CHECKS.each(CHECKS.once, trap, **TRAPS)


@CHECKS.once
def trap_replicas_diverge_under_pmap():
    rows = np.float32(SLOPES).reshape(4, 1)
    update = jax.pmap(
        local_value, axis_name="data", in_axes=(None, 0), devices=jax.devices()[:4]
    )
    np.testing.assert_allclose(update(W, rows), [-5.1, -5.1, 5.1, 5.1], 1e-5)


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

    def by_mask(losses, mask):
        mean = functools.partial(flood_mean, where=mask, axis_name="data")
        grad = jax.grad(lambda c: mean(c * losses, level))(varying(jnp.float32(1)))
        return mean(losses, -np.inf), jnp.sign(lax.pmean(grad, "data"))

    specs = (P("data"), P("data"))
    got = mapped(naive, mesh, specs, check_vma=False)(losses, mask)
    np.testing.assert_allclose(got, (0.55, -1), rtol=1e-6)
    got = mapped(by_mask, mesh, specs, check_vma=False)(losses, mask)
    np.testing.assert_allclose(got, (losses[mask].mean(), 1), rtol=1e-6)
    np.testing.assert_allclose(got[0], 0.82, rtol=1e-6)


@pytest.mark.slow  # test_sharding.py has devices every time
@CHECKS.parametrize()
def test_sharding(name, devices):
    CHECKS.assert_held(name, __file__, devices)


if __name__ == "__main__":
    CHECKS.report()
