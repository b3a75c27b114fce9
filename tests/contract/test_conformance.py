"""What every optax transformation must do, over every optax form of the library."""

import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import FloodState, average_params, flood, scale_by_flood
from tests import forms, oracles

LEVEL = 0.5


def momentum():
    return optax.sgd(0.5, momentum=0.9)


def maker(name):
    """A form by its name, as a function of the level."""
    return lambda level=LEVEL: forms.OPTAX[name](momentum(), level)


MAKERS = {name: maker(name) for name in forms.OPTAX} | {
    "average": lambda level=LEVEL: optax.chain(
        scale_by_flood(level), momentum(), average_params(0.9)
    )
}
bare, windows = MAKERS["scale_by_flood"], MAKERS["flood_every_k"]
every_form = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

# strong types: jnp.array(0.75) would be a weak one, which every product makes strong
PARAMS = {"w": jnp.array([[1.0, -2.0, 0.5]]), "b": (jnp.float32(0.75),)}
GRADS = {"w": jnp.array([[0.5, 3.0, -1.0]]), "b": (jnp.float32(-0.7),)}
VALUES = np.asarray([0.7, 0.3, 0.5, 0.1, 0.9, 0.2], np.float32)


@pytest.fixture(autouse=True)
def _own_trace_counts():
    chex.clear_trace_counter()  # it counts by name, over all tests


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def oracle(make, values=VALUES):
    """Updates for GRADS at each of the values, in numpy."""
    grads, structure = jax.tree.flatten(jax.tree.map(np.asarray, GRADS))
    size = 2 if make is windows else 1
    flat = np.concatenate([leaf.ravel() for leaf in grads])
    flipped, _ = oracles.windows([flat] * len(values), values, size, LEVEL)
    moment, out = np.zeros_like(flat), []
    for number, update in enumerate(flipped, start=1):
        step = np.zeros_like(flat)
        if make is bare:
            step = update
        elif number % size == 0:
            moment = 0.9 * moment + update
            step = -0.5 * moment
        leaves = np.split(step, np.cumsum([leaf.size for leaf in grads])[:-1])
        shaped = [x.reshape(leaf.shape) for x, leaf in zip(leaves, grads, strict=True)]
        out.append(jax.tree.unflatten(structure, shaped))
    return out


def updates_over(optimizer, values=VALUES, *, jit=False):
    state = optimizer.init(PARAMS)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    out = []
    for value in values:
        updates, state = update(GRADS, state, PARAMS, value=jnp.float32(value))
        out.append(updates)
    return out


@every_form
def test_eager_and_compiled_updates_equal_numpy(make):
    wanted = oracle(make)
    chex.assert_trees_all_close(updates_over(make()), wanted, rtol=1e-6)
    chex.assert_trees_all_close(updates_over(make(), jit=True), wanted, rtol=1e-6)


@every_form
@pytest.mark.parametrize("value_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_state_is_stable_by_type(make, value_dtype):
    optimizer = make()
    state = optimizer.init(PARAMS)
    types = jax.tree.map(jax.typeof, state)  # shape, dtype, weak type, sharding
    for value in jnp.asarray(VALUES[:3], value_dtype):
        for update in (optimizer.update, jax.jit(optimizer.update)):
            _, new = update(GRADS, state, PARAMS, value=value)
            assert jax.tree.map(jax.typeof, new) == types
        state = new


DTYPES = ("float16", "bfloat16", "float32", "float64")
SLOW = ("float16", "float32")


# every leaf dtype is in each; losses of 16 and of 64 bits are the extremes
@every_form
@pytest.mark.parametrize(
    "value_dtype",
    [
        pytest.param(dtype, marks=[pytest.mark.slow] if dtype in SLOW else [])
        for dtype in DTYPES
    ],
)
@pytest.mark.usefixtures("x64")
def test_update_keeps_the_dtype_of_every_leaf(make, value_dtype):
    optimizer = make()
    params = {dtype: cast(PARAMS, dtype) for dtype in DTYPES}
    grads = {dtype: cast(GRADS, dtype) for dtype in DTYPES}
    value = jnp.asarray(0.25, value_dtype)

    @jax.jit
    def two(state):
        _, state = optimizer.update(grads, state, params, value=value)
        return optimizer.update(grads, state, params, value=value)

    updates, _ = two(optimizer.init(params))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    wanted = oracle(make, [0.25, 0.25])[1]
    for dtype in DTYPES:
        tolerance = max(4 * float(jnp.finfo(dtype).eps), 1e-7)  # GRADS are float32
        got = cast(updates[dtype], "float64")
        chex.assert_trees_all_close(got, wanted, rtol=tolerance)


@every_form
def test_vmap_over_level_and_value(make):
    levels = jnp.array([0.1, 0.5, -jnp.inf, 0.4])
    values = jnp.array([[0.3, 0.3], [0.3, 0.4], [-5.0, -5.0], [0.5, 0.35]])

    @jax.jit
    def last(level, values):
        optimizer = make(level)
        state = optimizer.init(PARAMS)
        for value in values:
            updates, state = optimizer.update(GRADS, state, PARAMS, value=value)
        return updates, optax.tree.get(state, "flood_below")

    together = jax.vmap(last)(levels, values)
    apart = [last(level, each) for level, each in zip(levels, values, strict=True)]
    apart = jax.tree.map(lambda *each: jnp.stack(each), *apart)
    chex.assert_trees_all_close(together, apart, rtol=1e-6)
    steps_below = [0, 1, 0, 0] if make is windows else [0, 2, 0, 1]
    np.testing.assert_array_equal(together[1], steps_below)


@every_form
def test_one_trace_serves_changing_values_and_levels(make):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(state, level, value):
        return make(level).update(GRADS, state, PARAMS, value=value)[1]

    state = make().init(PARAMS)
    for level, value in [(0.1, 0.3), (0.5, 0.3), (-np.inf, np.nan), (0.2, np.inf)]:
        state = update(state, jnp.float32(level), jnp.float32(value))


@every_form
def test_unknown_arguments_are_ignored(make):
    optimizer = make()
    state = optimizer.init(PARAMS)
    plain = optimizer.update(GRADS, state, PARAMS, value=0.3)
    more = optimizer.update(GRADS, state, PARAMS, value=0.3, other=1, key=jnp.ones(3))
    chex.assert_trees_all_equal(plain, more)


@every_form
def test_params_and_state_can_be_donated(make):
    optimizer = make()

    def step(params, state, value):
        updates, state = optimizer.update(GRADS, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = optimizer.init(params)
    donating = jax.jit(step, donate_argnums=(0, 1))
    for value in VALUES[:2]:
        old = (params, state)
        params, state = donating(params, state, jnp.float32(value))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old[0]))
    one, two = oracle(make)[:2]
    wanted = jax.tree.map(lambda p, u, v: np.asarray(p) + u + v, PARAMS, one, two)
    chex.assert_trees_all_close(params, wanted, rtol=1e-6)


@every_form
def test_no_leaf_of_the_state_is_a_leaf_of_params_or_of_another_state(make):
    optimizer = make()
    state = optimizer.init(PARAMS)
    held = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    given = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(PARAMS)]
    assert not set(held) & set(given)
    assert len(set(held)) == len(held)


@every_form
def test_tree_map_params_reaches_what_is_shaped_like_params_alone(make):
    optimizer = make()
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(GRADS, state, PARAMS, value=0.3)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf * 0 + 7, state)
    for field in FloodState._fields:
        chex.assert_trees_all_equal(
            optax.tree.get(mapped, field), optax.tree.get(state, field)
        )
    if make is windows:
        means = mapped.flood_window.flood_grad_mean
        chex.assert_trees_all_equal(means, jax.tree.map(lambda p: p * 0 + 7, PARAMS))
        assert mapped.flood_window.flood_value_mean == np.float32(0.3)


# a skip function is callable: inject_hyperparams would take it for a schedule
STATIC = ("every_k", "should_skip_update_fn")
INJECTED = {
    "scale_by_flood": lambda: optax.inject_hyperparams(scale_by_flood)(level=LEVEL),
    "flood": lambda: optax.inject_hyperparams(flood, static_args="every_k")(
        momentum(), level=LEVEL
    ),
    "flood_every_k": lambda: optax.inject_hyperparams(flood, static_args="every_k")(
        momentum(), level=LEVEL, every_k=2
    ),
    "flood_skip": lambda: optax.inject_hyperparams(flood, static_args=STATIC)(
        momentum(), level=LEVEL, should_skip_update_fn=optax.skip_not_finite
    ),
}


@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams_changes_the_level_without_a_new_trace(name):
    make, optimizer = MAKERS[name], INJECTED[name]()
    updates = updates_over(optimizer, jit=True)
    chex.assert_trees_all_close(updates, oracle(make), rtol=1e-6)
    chex.clear_trace_counter()
    state = optimizer.init(PARAMS)
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    for level in (0.5, -np.inf, 0.1, 0.5):
        state.hyperparams["level"] = jnp.float32(level)
        for _ in range(2):
            _, state = update(GRADS, state, PARAMS, value=jnp.float32(0.3))
    # below at the first and the last level only
    assert optax.tree.get(state, "flood_below") == (2 if make is windows else 4)


def test_inject_hyperparams_rounds_the_level_to_bf16_params_unless_told():
    # optax stores hyperparameters in the dtype of the params: .2 becomes .2002
    params = cast(PARAMS, jnp.bfloat16)
    value = jnp.float32(0.2001)
    for dtype, sign in ((None, -1.0), (jnp.float32, 1.0)):
        optimizer = optax.inject_hyperparams(scale_by_flood, hyperparam_dtype=dtype)(
            level=0.2
        )
        updates, _ = optimizer.update(GRADS, optimizer.init(params), value=value)
        np.testing.assert_array_equal(updates["w"], sign * GRADS["w"])


@every_form
def test_multi_steps_of_one_step_forwards_the_value(make):
    updates = updates_over(optax.MultiSteps(make(), 1), jit=True)
    chex.assert_trees_all_close(updates, oracle(make), rtol=1e-6)


@every_form
def test_masked_and_partition_leave_other_leaves_alone(make):
    mask = {"w": True, "b": (False,)}
    wanted = [each["w"] for each in oracle(make)]
    masked = optax.masked(make(), mask)
    labels = {"w": "flooded", "b": ("frozen",)}
    split = optax.partition({"flooded": make(), "frozen": optax.set_to_zero()}, labels)
    for optimizer, other in ((masked, GRADS["b"]), (split, (jnp.zeros([]),))):
        for got, want in zip(updates_over(optimizer), wanted, strict=True):
            np.testing.assert_allclose(got["w"], want, rtol=1e-6)
            chex.assert_trees_all_equal(got["b"], other)


@every_form
def test_none_integer_and_masked_leaves_pass(make):
    tree = {"w": GRADS["w"], "none": None, "masked": optax.MaskedNode()}
    optimizer = make()
    state = optimizer.init(tree)
    for value in VALUES[:2]:
        updates, state = optimizer.update(tree, state, tree, value=value)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    np.testing.assert_allclose(updates["w"], oracle(make)[1]["w"], rtol=1e-6)


@pytest.mark.parametrize("every_k", [1, 2])
def test_flood_leaves_without_gradient_pass_to_an_inner_that_takes_them(every_k):
    params = {"w": PARAMS["w"], "count": jnp.array([3, 4])}
    grads = {"w": GRADS["w"], "count": np.zeros(2, jax.dtypes.float0)}
    optimizer = flood(optax.identity(), LEVEL, every_k=every_k)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params, value=0.3)
    np.testing.assert_allclose(updates["w"], -GRADS["w"])
    assert updates["count"].dtype == jax.dtypes.float0


@every_form
def test_python_float_params_are_taken(make):
    optimizer = make()
    state = optimizer.init(1.0)
    for value in (0.3, 0.3):
        update, state = optimizer.update(3.0, state, 1.0, value=value)
    steps = {bare: -3.0, windows: 0.5 * 3.0}
    assert update == pytest.approx(steps.get(make, 0.5 * 1.9 * 3.0))


@every_form
def test_init_is_abstract(make):
    optimizer = make()
    shapes = jax.eval_shape(lambda: PARAMS)
    abstract = jax.eval_shape(optimizer.init, shapes)
    concrete = jax.eval_shape(lambda: optimizer.init(PARAMS))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(concrete)
    real = jax.tree.map(lambda x: (x.shape, x.dtype), optimizer.init(PARAMS))
    assert real == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


@every_form
def test_every_field_of_the_state_survives_flatten_and_pickle(make):
    optimizer = make()
    state = optimizer.init(PARAMS)
    for value in VALUES[:3]:
        _, state = optimizer.update(GRADS, state, PARAMS, value=value)
    leaves, structure = jax.tree.flatten(state)
    marked = [jnp.full_like(leaf, 5 + n) for n, leaf in enumerate(leaves)]
    back, _ = jax.tree.flatten(jax.tree.unflatten(structure, marked))
    chex.assert_trees_all_equal(back, marked)
    restored = pickle.loads(pickle.dumps(state))
    chex.assert_trees_all_equal(restored, state)
    assert type(restored) is type(state)
    # a restored state goes on as if nothing had happened
    chex.assert_trees_all_equal(
        optimizer.update(GRADS, restored, PARAMS, value=0.3),
        optimizer.update(GRADS, state, PARAMS, value=0.3),
    )


@every_form
@pytest.mark.parametrize("value", [0.3, 0.7])
def test_differentiating_through_an_update_sees_the_multiplier(make, value):
    # as in meta-learning: the derivative of the update by the gradient is constant
    optimizer = make()
    state = optimizer.init(jnp.zeros([]))

    def update(grad):
        first, after = optimizer.update(grad, state, jnp.zeros([]), value=value)
        if make is windows:
            first, _ = optimizer.update(grad, after, jnp.zeros([]), value=value)
        return first

    sign = 1.0 if value >= LEVEL else -1.0
    factor = 1.0 if make is bare else -0.5
    assert jax.grad(update)(2.0) == pytest.approx(sign * factor)
