"""flood(inner): what the inner optimizer sees, keeps and gives back."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from flood_optax import flood

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
GRADS = {"w": jnp.array([0.5, 3.0]), "b": jnp.array(-1.0)}
either_mode = pytest.mark.parametrize("jit", [False, True])


def spy(seen):
    """An optimizer that keeps what it is handed."""

    def update(updates, state, params=None, **extra_args):
        seen.append({"updates": updates, "params": params, **extra_args})
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


@pytest.mark.parametrize(("value", "sign"), [(0.3, -1), (0.5, 1), (0.9, 1)])
def test_flood_inner_sees_the_flooded_objective_whole(value, sign):
    seen = []
    optimizer = flood(spy(seen), 0.5)

    def value_fn(params):
        return jnp.sum(params["w"] ** 2) * 0.1

    optimizer.update(
        GRADS,
        optimizer.init(PARAMS),
        PARAMS,
        value=value,
        grad=GRADS,
        value_fn=value_fn,
        other="kept",
    )
    flooded_grads = jax.tree.map(lambda g: sign * g, GRADS)
    (call,) = seen
    chex.assert_trees_all_equal(call["updates"], flooded_grads)
    chex.assert_trees_all_equal(call["grad"], flooded_grads)
    assert call["value"] == pytest.approx(value if sign > 0 else 1.0 - value)
    # value_fn is 0.5 here: flooded at 0.5 it is a tie
    assert call["value_fn"](PARAMS) == pytest.approx(0.5)
    assert call["value_fn"]({"w": PARAMS["w"] * 0.5}) == pytest.approx(1 - 0.125)
    assert call["other"] == "kept"


@pytest.mark.parametrize("every_k", [1, 2])
@pytest.mark.parametrize("ours", [{}, {"weight": 2.0, "flush": True}], ids=str)
def test_flood_invents_no_argument_and_keeps_its_own(ours, every_k):
    seen = []
    optimizer = flood(spy(seen), 0.5, every_k=every_k)
    state = optimizer.init(PARAMS)
    for _ in range(every_k):
        optimizer.update(GRADS, state, PARAMS, value=0.3, other=1, **ours)
    assert seen
    assert all(set(call) == {"updates", "params", "value", "other"} for call in seen)


def test_flood_skip_function_sees_the_gradients_only():
    # the loss, 5, must not enter the norm: 0.1^2 is below the limit
    def skip(updates, step, params):
        return optax.skip_large_updates(updates, step, params, max_squared_norm=2.0)

    optimizer = flood(optax.sgd(1.0), 0.35, should_skip_update_fn=skip)
    state = optimizer.init(jnp.array(0.0))
    for grad, wanted in ((0.1, -0.1), (2.0, 0.0)):
        updates, state = optimizer.update(jnp.float32(grad), state, value=5.0)
        np.testing.assert_allclose(updates, wanted, rtol=1e-6)


@either_mode
def test_flood_inner_state_that_comes_back_wider_keeps_its_dtype(jit):
    """No branch of a cond, and no loop around the update, takes another dtype."""

    def update(updates, state, params=None):
        del params
        moment = 0.5 * state.astype(jnp.float32) + updates
        return moment, moment  # kept in float32, where it began in bfloat16

    inner = optax.GradientTransformation(
        lambda params: jnp.zeros_like(params, jnp.bfloat16), update
    )
    optimizer = flood(inner, 0.5, every_k=2)
    grads = jnp.array([1.0, -2.0])
    step = jax.jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(grads)
    kinds = jax.tree.map(jax.typeof, state)
    for expected in (0.0, 1.0, 0.0, 1.5):
        updates, state = step(grads, state, value=0.75)
        np.testing.assert_array_equal(updates, expected * np.array([1.0, -2.0]))
        assert jax.tree.map(jax.typeof, state) == kinds


class Record(NamedTuple):
    """What a line search keeps, by the names of its fields."""

    value: jax.Array
    grad: Any


class Running(NamedTuple):
    """A state that happens to have a value."""

    value: jax.Array


def keeper(kind):
    """Keeps the value it was handed, and the gradient."""

    def update(updates, state, params=None, *, value, **extra_args):
        kept = {"value": value, "grad": updates}
        return updates, kind(**{name: kept[name] for name in kind._fields})

    fields = {"value": jnp.float32(0), "grad": GRADS}
    init = lambda _: kind(**{name: fields[name] for name in kind._fields})
    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize(
    ("kind", "search", "kept"),
    [(Record, True, np.inf), (Record, False, 0.75), (Running, True, 0.75)],
)
def test_flood_forgets_only_what_a_search_keeps(kind, search, kept):
    optimizer = flood(keeper(kind), 0.5)
    given = {"value_fn": lambda p: jnp.sum(p["w"])} if search else {}
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(GRADS, state, PARAMS, value=0.25, **given)
    assert state.flood_inner_state.value == kept


def test_flood_search_may_be_weighed_where_there_is_but_one_device():
    seen = []
    optimizer = flood(spy(seen), 0.5)
    given = {"value": 0.25, "value_fn": lambda p: jnp.sum(p["w"]), "weight": 7.0}
    optimizer.update(GRADS, optimizer.init(PARAMS), PARAMS, **given)
    assert seen[0]["value"] == 0.75


@pytest.mark.parametrize("static", ["every_k", ("every_k", "level")], ids=str)
def test_injected_schedule_counts_calls_and_a_static_one_windows(static):
    make = optax.inject_hyperparams(flood, static_args=static)
    optimizer = make(optax.identity(), level=lambda step: step / 8, every_k=2)
    state, seen = optimizer.init(PARAMS), []
    for _ in range(6):
        _, state = optimizer.update(GRADS, state, PARAMS, value=0.25)
        seen.append(float(optax.tree.get(state, "flood_level")))
    calls, windows = [1, 3, 5], [0, 1, 2]
    wanted = calls if static == "every_k" else windows
    assert seen[1::2] == [step / 8 for step in wanted]


@pytest.mark.parametrize("options", [{"every_k": 2}, {}], ids=["window", "weight"])
@either_mode
def test_flood_takes_an_inner_state_and_updates_with_typed_keys(options, jit):
    inner = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(1)), optax.sgd(1.0))
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, -2.0, 0.5])}
    optimizer = flood(inner, 0.3, **options)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    state = optimizer.init(params)
    for weight in (2.0, 2.0):
        updates, state = update(grads, state, params, value=0.25, weight=weight)
    plain = inner.init(params)
    for _ in range(1 if options else 2):
        flipped = jax.tree.map(jnp.negative, grads)
        wanted, plain = inner.update(flipped, plain, params)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(raw, state[1]), jax.tree.map(raw, plain))


def raw(leaf):
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if key else leaf


def bf16_mean(grads):
    """The running mean that is rounded to bfloat16 after each, in NumPy."""
    mean = np.zeros_like(grads[0], ml_dtypes.bfloat16)
    for n, grad in enumerate(grads, 1):
        wide = mean.astype(np.float32)
        mean = (wide + (grad - wide) / np.float32(n)).astype(ml_dtypes.bfloat16)
    return mean


@pytest.mark.parametrize(
    ("given", "jit"),
    [(jnp.bfloat16, True), ("bfloat16", False), (jnp.dtype(jnp.bfloat16), True)],
    ids=["class", "name", "dtype"],
)
def test_accumulator_dtype_is_that_of_the_means_and_of_nothing_else(given, jit):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(3, 5)).astype(np.float32)
    optimizer = flood(optax.identity(), 0.3, every_k=3, accumulator_dtype=given)
    params = {"w": jnp.zeros(5), "z": jnp.zeros(2, jnp.complex64), "i": jnp.arange(2)}
    state = first = optimizer.init(params)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    for grad in grads:
        updates, state = update({**params, "w": grad}, state, params, value=0.25)
        assert updates["w"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["w"], -bf16_mean(grads).astype(np.float32))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, state)
    means = state.flood_window.flood_grad_mean
    assert (means["w"].dtype, means["z"].dtype) == (jnp.bfloat16, jnp.complex64)
    assert state.flood_window.flood_value_mean.dtype == jnp.float32


def test_accumulator_dtype_of_none_is_float32_at_least():
    params = {"w": jnp.zeros(5, jnp.bfloat16)}
    for chosen in ({}, {"accumulator_dtype": None}):
        state = flood(optax.identity(), 0.3, every_k=3, **chosen).init(params)
        assert state.flood_window.flood_grad_mean["w"].dtype == jnp.float32


def test_flood_of_one_optimizer_takes_trees_of_several_dtypes_in_turn():
    optimizer = flood(optax.identity(), 0.5, every_k=2)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float32):
        params = {"w": jnp.ones(2, dtype)}
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params, value=0.25)
            assert updates["w"].dtype == dtype


@pytest.mark.usefixtures("x64")
def test_update_between_steps_has_the_dtype_that_the_inner_makes_of_the_value():
    def times_value(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), times_value)
    optimizer = flood(inner, 0.1, every_k=2)
    grads = jnp.array([1.0, -3.0], jnp.float32)
    for dtype in (jnp.float32, jnp.float64, jnp.float32):
        state = optimizer.init(grads)
        for value in (0.5, 0.75):
            updates, state = optimizer.update(
                grads, state, grads, value=jnp.asarray(value, dtype)
            )
            assert updates.dtype == dtype
