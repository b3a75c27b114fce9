"""Flooding among optax's wrappers and optimizers: who forwards the loss.

The oracle of every row: a wrapper around `chain(scale_by_flood, inner)` does what the
same wrapper around `inner` does when it is handed the gradients already flipped.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from flood_optax import flood, scale_by_flood

LEVEL = 0.5
PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 0.25]]), "b": jnp.array([0.75, -0.5])}
GRADS = {"w": jnp.array([[0.5, 3.0], [-1.0, 0.3]]), "b": jnp.array([-0.7, 0.2])}
VALUES = (0.3, 0.7)  # below the level, then above
SIGNS = (-1.0, 1.0)


def sgd():
    return optax.sgd(0.5)


def flooding_sgd():
    return optax.chain(scale_by_flood(LEVEL), sgd())


def updates_of(optimizer, scales, params=PARAMS, **extra_args):
    """The updates for GRADS times each of the scales."""
    grads = jax.tree.map(lambda p, g: g.astype(p.dtype), PARAMS, GRADS)
    state = optimizer.init(params)
    every = []
    for number, scale in enumerate(scales):
        extra = {name: jnp.float32(x[number]) for name, x in extra_args.items()}
        scaled = jax.tree.map(lambda g, scale=scale: g * scale, grads)
        updates, state = optimizer.update(scaled, state, params, **extra)
        every.append(updates)
    return every


def multi_steps(inner):
    return optax.MultiSteps(inner, 1)


def extra_args_of(inner):
    return optax.GradientTransformationExtraArgs(inner.init, inner.update)


def known(table):
    """The names of a table; what came with optax 0.2.7 is skipped before."""
    new = {"monitor": optax, "madgrad": contrib, "scale_by_galore": contrib}
    absent = [name for name, module in new.items() if not hasattr(module, name)]
    return [
        pytest.param(name, marks=pytest.mark.skip("It came with optax 0.2.7."))
        if name.removesuffix("_in_chain") in absent
        else name
        for name in table
    ]


FORWARDS = {
    "chain": lambda inner: optax.chain(optax.identity(), inner),
    "named_chain": lambda inner: optax.named_chain(("inner", inner)),
    "with_extra_args_support": optax.with_extra_args_support,
    "partition": lambda inner: optax.partition(
        {"a": inner, "b": inner}, {"w": "a", "b": "b"}
    ),
    "selective_transform": lambda inner: optax.selective_transform(
        inner, freeze_mask={"w": False, "b": True}
    ),
    "freeze_in_chain": lambda inner: optax.chain(
        inner, optax.freeze({"w": False, "b": True})
    ),
    "masked": lambda inner: optax.masked(inner, {"w": True, "b": False}),
    "masked_extra_args": lambda inner: optax.masked(
        inner, {"w": True, "b": False}, mask_compatible_extra_args=True
    ),
    "inject_hyperparams": lambda inner: optax.inject_hyperparams(
        lambda factor: optax.chain(inner, optax.scale(factor))
    )(factor=0.3),
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
    "conditionally_transform": lambda inner: optax.conditionally_transform(
        inner, lambda step: step < 5
    ),
    "conditionally_transform_on_value": lambda inner: optax.conditionally_transform(
        inner, lambda step, value=0.0, **_: value < 9.0, forward_extra_args=True
    ),
    "conditionally_mask": lambda inner: optax.conditionally_mask(
        inner, lambda step: step < 5
    ),
    "flatten": optax.flatten,
    "monitor_in_chain": lambda inner: optax.chain(
        optax.monitor({"norm": optax.tree.norm}), inner
    ),
    "snapshot_in_chain": lambda inner: optax.chain(
        optax.snapshot("norm", optax.tree.norm), inner
    ),
    "multi_steps": multi_steps,
    "multi_steps_skipping": lambda inner: optax.MultiSteps(
        inner, 1, should_skip_update_fn=optax.skip_not_finite
    ),
    "multi_steps_transformation": lambda inner: multi_steps(
        inner
    ).gradient_transformation(),
    "multi_steps_in_chain_cured": lambda inner: optax.chain(
        extra_args_of(multi_steps(inner))
    ),
    "schedule_free": lambda inner: contrib.schedule_free(inner, learning_rate=0.5),
    "mechanize": contrib.mechanize,
}


@pytest.mark.parametrize("name", known(FORWARDS))
def test_wrapper_forwards_the_loss_to_the_flood(name):
    wrap = FORWARDS[name]
    masked = name.startswith("masked")  # what is masked is not flooded: not flipped
    got, wanted = jax.jit(
        lambda: (
            updates_of(wrap(flooding_sgd()), (1.0, 1.0), value=VALUES),
            updates_of(wrap(sgd()), SIGNS),
        )
    )()
    if masked:
        for updates, number in zip(wanted, range(2), strict=True):
            updates["b"] = updates["b"] * SIGNS[number]
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)
    assert np.abs(got[0]["w"]).max() > 0


OPTAX = ("adam", "lamb", "lion", "adafactor")
CONTRIB = (
    *("muon", "dog", "dowg", "prodigy", "dadapt_adamw", "cocob", "acprop", "ademamix"),
    *("simplified_ademamix", "adopt", "madgrad", "schedule_free_adamw"),
)
IN_FRONT = {
    **{name: lambda name=name: getattr(optax, name)(0.1) for name in OPTAX},
    **{name: lambda name=name: getattr(contrib, name)(0.1) for name in CONTRIB},
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "reduce_on_plateau": lambda: optax.chain(sgd(), contrib.reduce_on_plateau()),
    "lookahead": lambda: optax.lookahead(sgd(), 2, 0.5),
}


@pytest.mark.parametrize("name", known(IN_FRONT))
@pytest.mark.parametrize("form", ["chain", "wrapper"])
def test_flood_in_front_of_an_optimizer_flips_what_it_sees(form, name):
    make = IN_FRONT[name]
    params = PARAMS
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(PARAMS)
    flooding = optax.chain(scale_by_flood(LEVEL), make())
    if form == "wrapper":
        flooding = flood(make(), LEVEL)
    reads = {"value": (0.7, 0.7)} if name == "reduce_on_plateau" else {}
    got, wanted = jax.jit(
        lambda: (
            updates_of(flooding, (1.0, 1.0), params, value=VALUES),
            updates_of(make(), SIGNS, params, **reads),
        )
    )()
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)


MISSING = (
    ValueError,
    r"needs the current loss, got None: .*`flood_optax.flooded\(loss_fn, level\)",
)
UNEXPECTED = TypeError, "unexpected keyword argument 'value'"


def lookahead(inner):
    return optax.lookahead(inner, 2, 0.5)


def galore(inner):
    return contrib.scale_by_galore(rank=1, base_optimizer=inner)


split = contrib.split_real_and_imaginary
DROPS = {
    "multi_steps_in_chain": (lambda inner: optax.chain(multi_steps(inner)), MISSING),
    "multi_steps_transformation_in_chain": (
        lambda inner: optax.chain(multi_steps(inner).gradient_transformation()),
        MISSING,
    ),
    "split_real_and_imaginary": (split, UNEXPECTED),
    "split_real_and_imaginary_in_chain": (
        lambda inner: optax.chain(split(inner)),
        MISSING,
    ),
    "scale_by_galore": (galore, UNEXPECTED),
    "scale_by_galore_in_chain": (lambda inner: optax.chain(galore(inner)), MISSING),
    "sam_behind": (
        lambda inner: optax.chain(inner, contrib.sam(sgd(), sgd())),
        UNEXPECTED,
    ),
    "lookahead": (lookahead, UNEXPECTED),
    "lookahead_in_chain": (lambda inner: optax.chain(lookahead(inner)), MISSING),
}


@pytest.mark.parametrize("form", ["chain", "wrapper"])
@pytest.mark.parametrize("name", known(DROPS))
def test_wrapper_that_drops_the_loss_is_an_error(name, form):
    wrap, (error, message) = DROPS[name]
    inner = flooding_sgd() if form == "chain" else flood(sgd(), LEVEL)
    params = PARAMS
    if name.startswith("lookahead"):
        params = optax.LookaheadParams.init_synced(PARAMS)
    with pytest.raises(error, match=message):
        updates_of(wrap(inner), (1.0,), params, value=VALUES)


def test_positional_call_of_update_works_and_so_does_loss_for_value():
    optimizer = flooding_sgd()
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(updates=GRADS, state=state, params=PARAMS, value=0.3)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda g: 0.5 * g, GRADS))
    named, _ = optimizer.update(GRADS, state, PARAMS, loss=0.3)  # as levanter calls it
    chex.assert_trees_all_equal(named, updates)


# ---- aggregating, optax's experimental per-example accumulation ----


def averaging_the_loss_too(aggregating, k):
    """Optax's accumulator, which also averages the loss and hands it on."""
    grads = aggregating.accumulate_avg_updates(k)

    def update(updates, state, params=None, *, value, **extra_args):
        del extra_args
        accumulated, total = state
        mean_grad, accumulated = grads.update(updates, accumulated, params)
        total = total + value / k
        kept = jnp.where(accumulated.ready, 0.0, total)
        return (mean_grad, {"value": total}), (accumulated, kept)

    return optax.GradientTransformationExtraArgs(
        lambda params: (grads.init(params), jnp.zeros([])), update
    )


def test_aggregating_hands_over_the_last_value_unless_the_aggregator_averages_it():
    reason = "optax.experimental came with optax 0.2.7."
    experimental = pytest.importorskip("optax.experimental", reason=reason)
    aggregating = experimental.aggregating
    # the mean of the losses, .475, is above .35; the last is below
    values, grads = (1.0, 0.4, 0.3, 0.2), (0.475,) * 4
    inner = optax.chain(scale_by_flood(0.35), optax.sgd(1.0))
    identity = optax.chain(optax.identity())

    def window_update(aggregator, **options):
        optimizer = aggregating.process(identity, aggregator, inner, **options)
        params = jnp.zeros([])
        state = optimizer.init(params)
        for value, grad in zip(values, grads, strict=True):
            updates, state = optimizer.update(
                jnp.float32(grad), state, params, value=jnp.float32(value)
            )
        return float(updates)

    trap = window_update(optax.chain(aggregating.accumulate_avg_updates(4)))
    right = window_update(
        averaging_the_loss_too(aggregating, 4), aggregator_has_aux=True
    )
    assert trap == pytest.approx(+0.475)
    assert right == pytest.approx(-0.475)


# ---- order in the chain ----


def test_flood_first_equals_flooding_the_loss_and_flood_last_does_not():
    values = (1.0, 1.0, 0.2, 0.2, 1.0)

    def train(*parts):
        optimizer = optax.chain(*parts)
        state = optimizer.init(jnp.zeros([]))
        out = []
        for value in values:
            updates, state = optimizer.update(jnp.float32(1.0), state, value=value)
            out.append(float(updates))
        return out

    adam = optax.scale_by_adam()
    first = train(scale_by_flood(LEVEL), adam)
    mean, square, oracle = 0.0, 0.0, []
    for step, value in enumerate(values, 1):
        g = 1.0 if value >= LEVEL else -1.0
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        root = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        oracle.append(mean / (1 - 0.9**step) / root)
    np.testing.assert_allclose(first, oracle, rtol=2e-5)
    np.testing.assert_allclose(first, [1, 1, 0.26, -0.10, 0.16], atol=0.01)
    last = train(adam, scale_by_flood(LEVEL))
    np.testing.assert_allclose(last, [1, 1, -1, -1, 1], atol=1e-4)
