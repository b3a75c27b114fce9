"""What trainers hand over beside gradients: the loss by another name, spikes, ..."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import flood_optax.flax
from flood_optax import flood, scale_by_flood

GRADS = jnp.array([1.0, -2.0])
LEVEL, LIMIT = 0.5, 100.0


def skipping_spikes(inner, limit=LIMIT):
    """A stand-in for a trainer's own: takes `loss`, keeps it, skips above a limit."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, *, loss, **extra_args):
        stepped, after = inner.update(updates, state, params, **extra_args)
        spike = loss > limit
        return jax.tree.map(
            lambda one, other: jnp.where(spike, one, other),
            (jax.tree.map(jnp.zeros_like, stepped), state),
            (stepped, after),
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


FORMS = {
    "chain": lambda inner: optax.chain(scale_by_flood(LEVEL), inner),
    "wrapper": lambda inner: flood(inner, LEVEL),
}
every_form = pytest.mark.parametrize("form", FORMS)


def steps(optimizer, *arguments):
    """Updates and state after calls with each of the extra arguments."""
    state, seen = optimizer.init(GRADS), []
    for extra_args in arguments:
        updates, state = optimizer.update(GRADS, state, GRADS, **extra_args)
        seen.append(updates)
    return np.stack(seen), state


@pytest.mark.parametrize(
    "given",
    [
        [{"loss": loss} for loss in (0.75, 0.25, 1e4)],
        [{"value": value, "loss": 0.4} for value in (0.75, 0.25, 1e4)],
    ],
    ids=["loss", "both"],
)
@every_form
def test_loss_is_taken_for_value_where_value_is_missing(form, given):
    updates, state = steps(FORMS[form](optax.sgd(1.0)), *given)
    np.testing.assert_array_equal(updates, [[-1, 2], [1, -2], [-1, 2]])
    assert optax.tree.get(state, "flood_below") == 1
    assert optax.tree.get(state, "flood_value") == 1e4


@pytest.mark.parametrize("given", [{"loss": 0.25}, {"loss": 0.25, "value": 0.75}])
@every_form
def test_loss_reaches_the_inner_optimizer_as_it_is(form, given):
    """Not flooded to .75: whoever skips spikes means the raw loss."""
    seen = []

    def update(updates, state, params=None, **extra_args):
        del params
        seen.append(extra_args)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    steps(FORMS[form](spy), given)
    assert seen[0]["loss"] == 0.25
    steps(FORMS[form](spy), {"value": 0.25})
    assert "loss" not in seen[1]


@every_form
def test_spikes_are_skipped_inside_the_flood(form):
    optimizer = FORMS[form](skipping_spikes(optax.sgd(1.0)))
    updates, _ = steps(optimizer, {"loss": 0.75}, {"loss": 1e4}, {"loss": 0.25})
    np.testing.assert_array_equal(updates, [[-1, 2], [0, 0], [1, -2]])
    with pytest.raises(TypeError, match=r"missing 1 required .*'loss'"):
        steps(optimizer, {"value": 0.75})  # as without the flood


@every_form
def test_spikes_are_skipped_outside_the_flood_which_needs_value_then(form):
    optimizer = skipping_spikes(FORMS[form](optax.sgd(1.0)))
    arguments = ({"loss": loss, "value": loss} for loss in (0.75, 1e4, 0.25))
    updates, state = steps(optimizer, *arguments)
    np.testing.assert_array_equal(updates, [[-1, 2], [0, 0], [1, -2]])
    assert optax.tree.get(state, "flood_step") == 2
    with pytest.raises(ValueError, match=r"needs the current loss, got None"):
        steps(optimizer, {"loss": 0.75})


@pytest.mark.skipif(
    not hasattr(optax, "microbatch"), reason="Optax refuses it since 0.2.7."
)
def test_a_line_search_refuses_a_loss_that_its_value_fn_does_not_know():
    optimizer = flood(optax.lbfgs(), LEVEL)
    search = {"value": 5.0, "grad": GRADS, "value_fn": lambda w: jnp.sum(w**2)}
    with pytest.raises(TypeError, match=r"not consumed by `value_fn`: \['loss'\]"):
        steps(optimizer, search | {"loss": 5.0})
    steps(optimizer, search)


# ---- inner optimizers that flood or accumulate themselves ----


def multi_steps():
    return optax.MultiSteps(optax.sgd(1.0), 4).gradient_transformation()


INNERS = {
    "MultiStepsState": {
        "multi_steps": multi_steps,
        "in_a_chain": lambda: optax.chain(optax.clip(1.0), multi_steps()),
        "masked": lambda: optax.masked(multi_steps(), True),
        "partition": lambda: optax.partition({"a": multi_steps()}, "a"),
        "apply_if_finite": lambda: optax.apply_if_finite(multi_steps(), 3),
        "injected": lambda: optax.inject_hyperparams(
            lambda rate: optax.chain(multi_steps(), optax.scale(rate))
        )(rate=0.1),
    },
    "ApplyEvery": {
        "apply_every": lambda: optax.chain(optax.sgd(1.0), optax.apply_every(4))
    },
    "FloodState": {
        "flood": lambda: flood(optax.sgd(1.0), 0.1),
        "flood_every_k": lambda: flood(optax.sgd(1.0), 0.1, every_k=2),
        "scale_by_flood": lambda: scale_by_flood(0.1),
        "flood_in_a_chain": lambda: optax.chain(scale_by_flood(0.1), optax.sgd(1.0)),
        "masked_flood": lambda: optax.masked(scale_by_flood(0.1), True),
    },
}
ACCUMULATES = r".*`flood\(optimizer, level, every"
REFUSED = [(kind, guise) for kind in INNERS for guise in INNERS[kind]]


@pytest.mark.parametrize("every_k", [1, 3])
@pytest.mark.parametrize(("kind", "guise"), REFUSED)
def test_flood_refuses_an_inner_optimizer_that_accumulates_or_floods(
    kind, guise, every_k
):
    optimizer = flood(INNERS[kind][guise](), LEVEL, every_k=every_k)
    more = ": two floods undo" if kind == "FloodState" else f", {ACCUMULATES}"
    message = f"got an? {kind} in the state of inner{more}"
    for init in (optimizer.init, lambda params: jax.eval_shape(optimizer.init, params)):
        with pytest.raises(TypeError, match=message):
            init(GRADS)


# ---- states of something else ----


@every_form
def test_a_state_of_another_optimizer_names_itself_and_the_page(form):
    optimizer = FORMS[form](optax.adam(0.1))
    other = optax.adam(0.1).init(GRADS)
    if form == "chain":
        other = (other[0], other)
    kind = {"chain": "FloodState", "wrapper": "FloodWrapperState"}[form]
    with pytest.raises(
        TypeError, match=rf"must be a {kind}, .* got \w+\. .*docs/traps.md"
    ):
        optimizer.update(GRADS, other, GRADS, value=0.3)


def test_a_state_without_a_window_is_refused_by_every_k_and_taken_as_it_says():
    plain, windows = (flood(optax.adam(0.1), LEVEL, every_k=k) for k in (1, 2))
    _, state = steps(plain, {"value": 0.25})
    with pytest.raises(ValueError, match=r"no window, as of `every_k=1`: `state._repl"):
        windows.update(GRADS, state, GRADS, value=0.25)
    state = state._replace(flood_window=windows.init(GRADS).flood_window)
    expected, _ = plain.update(GRADS, state._replace(flood_window=()), value=0.75)
    _, state = windows.update(GRADS, state, GRADS, value=1.0)
    updates, state = windows.update(GRADS, state, GRADS, value=0.5)
    np.testing.assert_array_equal(updates, expected)
    assert state.flood_state.flood_step == 2


def test_a_state_with_a_window_is_refused_without_every_k_and_taken_as_it_says():
    plain, windows = (flood(optax.adam(0.1), LEVEL, every_k=k) for k in (1, 3))
    _, state = steps(windows, {"value": 0.25})
    with pytest.raises(ValueError, match=r"does not accumulate, .*\(`flush=True`\)"):
        plain.update(GRADS, state, GRADS, value=0.25)
    _, state = windows.update(GRADS, state, GRADS, value=0.25, flush=True)
    state = state._replace(flood_window=())
    _, state = plain.update(GRADS, state, GRADS, value=0.25)
    assert state.flood_state == (2, LEVEL, 0.25, 2)


# ---- flax's TrainState ----


@pytest.mark.parametrize("cls", [train_state.TrainState, flood_optax.flax.TrainState])
def test_train_state_takes_multi_steps_as_an_object(cls):
    tx = optax.MultiSteps(optax.sgd(1.0), 2)
    state = cls.create(apply_fn=None, params={"w": GRADS}, tx=tx)
    for scale in (1.0, 3.0):
        state = state.apply_gradients(grads={"w": scale * GRADS})
    np.testing.assert_array_equal(state.params["w"], GRADS - 2 * GRADS)
    assert state.tx is tx


def test_our_train_state_hands_the_loss_through_multi_steps():
    tx = optax.MultiSteps(optax.chain(scale_by_flood(LEVEL), optax.sgd(1.0)), 1)
    create = flood_optax.flax.TrainState.create
    state = create(apply_fn=None, params={"w": GRADS}, tx=tx)
    state = state.apply_gradients(grads={"w": GRADS}, value=0.25)
    np.testing.assert_array_equal(state.params["w"], GRADS + GRADS)
