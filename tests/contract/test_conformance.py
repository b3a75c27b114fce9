"""What every optax transformation must do, over every optax form of the library."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import FloodState, average_params, flood, scale_by_flood
from tests import forms, oracles
from tests.marks import slow_but

LEVEL = 0.5


def momentum():
    return optax.sgd(0.5, momentum=0.9)


MAKERS = {
    name: functools.partial(form, momentum()) for name, form in forms.OPTAX.items()
} | {
    "average": lambda level: optax.chain(
        scale_by_flood(level), momentum(), average_params(0.9)
    )
}
OPTIMIZERS = {name: make(LEVEL) for name, make in MAKERS.items()}
# but the largest program, whose parts the others have
every_form = pytest.mark.parametrize(
    "form", slow_but(MAKERS.keys() - {"flood_skip"}, MAKERS)
)

# strong types: jnp.array(0.75) would be a weak one, which every product makes strong
PARAMS = {"w": jnp.array([[1.0, -2.0, 0.5]]), "b": (jnp.float32(0.75),)}
GRADS = {"w": jnp.array([[0.5, 3.0, -1.0]]), "b": (jnp.float32(-0.7),)}
ZEROS = {"w": np.zeros((1, 3), np.float32), "b": (np.float32(0),)}
VALUES = np.asarray([0.7, 0.3, 0.5, 0.1, 0.9, 0.2], np.float32)


@pytest.fixture(autouse=True)
def _own_trace_counts():
    chex.clear_trace_counter()  # it counts by name, over all tests


@functools.cache
def compiled(form):
    return jax.jit(OPTIMIZERS[form].update)


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def oracle(form, values=VALUES):
    """The factor of GRADS in each of the updates, in numpy: momentum is linear."""
    size = 2 if form == "flood_every_k" else 1
    multipliers, _ = oracles.windows(np.ones(len(values)), values, size, LEVEL)
    moment, factors = 0.0, []
    for number, multiplier in enumerate(multipliers, start=1):
        if number % size == 0:
            moment = 0.9 * moment + multiplier
        factors.append(-0.5 * moment if number % size == 0 else 0.0)
    return multipliers if form == "scale_by_flood" else np.array(factors)


def assert_updates(updates, factors, rtol=1e-6):
    for update, factor in zip(updates, factors, strict=True):
        wanted = jax.tree.map(lambda g, f=factor: np.asarray(g) * f, GRADS)
        chex.assert_trees_all_close(update, wanted, rtol=rtol)


def updates_over(update, state, values=VALUES):
    out = []
    for value in values:
        updates, state = update(GRADS, state, PARAMS, value=np.float32(value))
        out.append(updates)
    return out


def stepped(form, number):
    """The state after so many steps."""
    state = OPTIMIZERS[form].init(PARAMS)
    for value in VALUES[:number]:
        _, state = compiled(form)(GRADS, state, PARAMS, value=value)
    return state


@every_form
def test_eager_and_compiled_updates_equal_numpy(form):
    for update in (OPTIMIZERS[form].update, compiled(form)):
        updates = updates_over(update, OPTIMIZERS[form].init(PARAMS))
        assert_updates(updates, oracle(form))


@every_form
@pytest.mark.parametrize("value_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_state_is_stable_by_type(form, value_dtype):
    state = OPTIMIZERS[form].init(PARAMS)
    types = jax.tree.map(jax.typeof, state)  # shape, dtype, weak type, sharding
    for value in VALUES[:3].astype(value_dtype):
        for update in (OPTIMIZERS[form].update, compiled(form)):
            _, new = update(GRADS, state, PARAMS, value=value)
            assert jax.tree.map(jax.typeof, new) == types
        state = new


DTYPES = ("float16", "bfloat16", "float32", "float64")


# every leaf dtype is in each; losses of 16 and of 64 bits are the extremes
@every_form
@pytest.mark.parametrize("value_dtype", slow_but(("bfloat16", "float64"), DTYPES))
@pytest.mark.usefixtures("x64")
def test_update_keeps_the_dtype_of_every_leaf(form, value_dtype):
    optimizer = OPTIMIZERS[form]

    @jax.jit
    def two(leaves, value):
        params, grads = ({d: cast(x, d) for d in DTYPES} for x in leaves)
        state = optimizer.init(params)
        _, state = optimizer.update(grads, state, params, value=value)
        return optimizer.update(grads, state, params, value=value)[0]

    updates = two((PARAMS, GRADS), np.asarray(0.25, jnp.dtype(value_dtype)))
    factor = oracle(form, [0.25, 0.25])[1]
    for dtype in DTYPES:
        assert {leaf.dtype.name for leaf in jax.tree.leaves(updates[dtype])} == {dtype}
        tolerance = max(4 * float(jnp.finfo(dtype).eps), 1e-7)  # GRADS are float32
        found = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), updates[dtype])
        assert_updates([found], [factor], tolerance)


@every_form
def test_vmap_over_level_and_value(form):
    levels = np.float32([0.1, 0.5, -np.inf, 0.4])
    values = np.float32([[0.3, 0.3], [0.3, 0.4], [-5.0, -5.0], [0.5, 0.35]])

    @jax.jit
    def last(level, values):
        optimizer = MAKERS[form](level)
        state = optimizer.init(PARAMS)
        for value in values:
            updates, state = optimizer.update(GRADS, state, PARAMS, value=value)
        return updates, optax.tree.get(state, "flood_below")

    together = jax.jit(jax.vmap(last))(levels, values)
    for i in range(4):
        apart = last(levels[i], values[i])
        each = jax.tree.map(lambda x, i=i: np.asarray(x)[i], together)
        chex.assert_trees_all_close(each, apart, rtol=1e-6)
    steps_below = [0, 1, 0, 0] if form == "flood_every_k" else [0, 2, 0, 1]
    np.testing.assert_array_equal(together[1], steps_below)


@every_form
def test_one_trace_serves_changing_values_and_levels(form):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(state, level, value):
        return MAKERS[form](level).update(GRADS, state, PARAMS, value=value)[1]

    state = OPTIMIZERS[form].init(PARAMS)
    for level, value in [(0.1, 0.3), (0.5, 0.3), (-np.inf, np.nan), (0.2, np.inf)]:
        state = update(state, np.float32(level), np.float32(value))


@every_form
def test_unknown_arguments_are_ignored(form):
    plain = compiled(form)(GRADS, stepped(form, 0), PARAMS, value=VALUES[1])
    others = {"other": 1, "key": np.ones(3)}
    more = compiled(form)(GRADS, stepped(form, 0), PARAMS, value=VALUES[1], **others)
    chex.assert_trees_all_equal(plain, more)


@every_form
def test_params_and_state_can_be_donated(form):
    def step(params, state, value):
        updates, state = OPTIMIZERS[form].update(GRADS, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state = jax.tree.map(jnp.copy, PARAMS), stepped(form, 0)
    donating = jax.jit(step, donate_argnums=(0, 1))
    for value in VALUES[:2]:
        old = (params, state)
        params, state = donating(params, state, value)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old[0]))
    factor = oracle(form)[:2].sum()
    wanted = jax.tree.map(lambda p, g: np.asarray(p) + factor * g, PARAMS, GRADS)
    chex.assert_trees_all_close(params, wanted, rtol=1e-6)


@every_form
def test_no_leaf_of_the_state_is_a_leaf_of_params_or_of_another_state(form):
    state = OPTIMIZERS[form].init(PARAMS)
    held = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    given = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(PARAMS)]
    assert not set(held) & set(given)
    assert len(set(held)) == len(held)


@every_form
def test_tree_map_params_reaches_what_is_shaped_like_params_alone(form):
    state = stepped(form, 1)
    mapped = optax.tree.map_params(
        OPTIMIZERS[form], lambda leaf: np.zeros_like(leaf) + 7, state
    )
    for field in FloodState._fields:
        assert optax.tree.get(mapped, field) is optax.tree.get(state, field)
    if form == "flood_every_k":
        means = mapped.flood_window.flood_grad_mean
        chex.assert_trees_all_equal(means, jax.tree.map(lambda z: z + 7, ZEROS))
        assert mapped.flood_window.flood_value_mean == VALUES[0]


# a skip function is callable: inject_hyperparams would take it for a schedule
STATIC = ("every_k", "should_skip_update_fn")
inject = functools.partial(optax.inject_hyperparams, flood)
INJECTED = {
    "scale_by_flood": lambda: optax.inject_hyperparams(scale_by_flood)(level=LEVEL),
    "flood": lambda: inject(static_args="every_k")(momentum(), level=LEVEL),
    "flood_every_k": lambda: inject(static_args="every_k")(
        momentum(), level=LEVEL, every_k=2
    ),
    "flood_skip": lambda: inject(static_args=STATIC)(
        momentum(), level=LEVEL, should_skip_update_fn=optax.skip_not_finite
    ),
}


@pytest.mark.parametrize("form", INJECTED)
def test_inject_hyperparams_changes_the_level_without_a_new_trace(form):
    optimizer = INJECTED[form]()
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    state = optimizer.init(PARAMS)
    assert_updates(updates_over(update, state), oracle(form))
    for level in (0.5, -np.inf, 0.1, 0.5):
        state.hyperparams["level"] = jnp.float32(level)
        for _ in range(2):
            _, state = update(GRADS, state, PARAMS, value=np.float32(0.3))
    # below at the first and the last level only
    below = 2 if form == "flood_every_k" else 4
    assert optax.tree.get(state, "flood_below") == below


def test_inject_hyperparams_rounds_the_level_to_bf16_params_unless_told():
    # optax stores hyperparameters in the dtype of the params: .2 becomes .2002
    params = cast(PARAMS, jnp.bfloat16)
    for dtype, sign in ((None, -1.0), (jnp.float32, 1.0)):
        optimizer = optax.inject_hyperparams(scale_by_flood, hyperparam_dtype=dtype)(
            level=0.2
        )
        state = optimizer.init(params)
        updates, _ = optimizer.update(GRADS, state, value=np.float32(0.2001))
        np.testing.assert_array_equal(updates["w"], sign * np.asarray(GRADS["w"]))


@every_form
def test_multi_steps_of_one_step_forwards_the_value(form):
    optimizer = optax.MultiSteps(OPTIMIZERS[form], 1)
    updates = updates_over(jax.jit(optimizer.update), optimizer.init(PARAMS))
    assert_updates(updates, oracle(form))


@every_form
@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_masked_and_partition_leave_other_leaves_alone(form, wrapper):
    if wrapper == "masked":
        optimizer = optax.masked(OPTIMIZERS[form], {"w": True, "b": (False,)})
        other = GRADS["b"]
    else:
        parts = {"flooded": OPTIMIZERS[form], "frozen": optax.set_to_zero()}
        labels = {"w": "flooded", "b": ("frozen",)}
        optimizer, other = optax.partition(parts, labels), ZEROS["b"]
    found = updates_over(jax.jit(optimizer.update), optimizer.init(PARAMS))
    for got, factor in zip(found, oracle(form), strict=True):
        wanted = np.asarray(GRADS["w"]) * factor
        np.testing.assert_allclose(got["w"], wanted, rtol=1e-6)
        chex.assert_trees_all_equal(got["b"], other)


@every_form
def test_none_integer_and_masked_leaves_pass(form):
    tree = {"w": GRADS["w"], "none": None, "masked": optax.MaskedNode()}
    state = OPTIMIZERS[form].init(tree)
    for value in VALUES[:2]:
        updates, state = compiled(form)(tree, state, tree, value=value)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    wanted = np.asarray(GRADS["w"]) * oracle(form)[1]
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-6)


@pytest.mark.parametrize("every_k", [1, 2])
def test_flood_leaves_without_gradient_pass_to_an_inner_that_takes_them(every_k):
    params = {"w": PARAMS["w"], "count": np.array([3, 4], np.int32)}
    grads = {"w": GRADS["w"], "count": np.zeros(2, jax.dtypes.float0)}
    optimizer = flood(optax.identity(), LEVEL, every_k=every_k)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(grads, state, params, value=0.3)
    np.testing.assert_allclose(updates["w"], -np.asarray(GRADS["w"]))
    assert updates["count"].dtype == jax.dtypes.float0


@every_form
def test_python_float_params_are_taken(form):
    optimizer = OPTIMIZERS[form]
    state = optimizer.init(1.0)
    for value in (0.3, 0.3):
        update, state = optimizer.update(3.0, state, 1.0, value=value)
    assert update == pytest.approx(3.0 * oracle(form, [0.3, 0.3])[1])


@every_form
def test_init_is_abstract(form):
    abstract = jax.eval_shape(OPTIMIZERS[form].init, jax.eval_shape(lambda: PARAMS))
    concrete = jax.eval_shape(lambda: OPTIMIZERS[form].init(PARAMS))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert jax.tree.leaves(abstract) == jax.tree.leaves(concrete)
    real = jax.tree.map(lambda x: (x.shape, x.dtype), stepped(form, 0))
    assert real == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)


@every_form
def test_every_field_of_the_state_survives_flatten_and_pickle(form):
    state = stepped(form, 3)
    leaves, structure = jax.tree.flatten(state)
    marked = [np.full_like(leaf, 5 + n) for n, leaf in enumerate(leaves)]
    back, _ = jax.tree.flatten(jax.tree.unflatten(structure, marked))
    chex.assert_trees_all_equal(back, marked)
    restored = pickle.loads(pickle.dumps(state))
    chex.assert_trees_all_equal(restored, state)
    assert type(restored) is type(state)
    # a restored state goes on as if nothing had happened
    going_on = (
        compiled(form)(GRADS, each, PARAMS, value=VALUES[1])
        for each in (restored, state)
    )
    chex.assert_trees_all_equal(*going_on)


@every_form
def test_differentiating_through_an_update_sees_the_multiplier(form):
    # as in meta-learning: the derivative of the update by the gradient is constant
    optimizer, one = OPTIMIZERS[form], np.float32(0)
    calls = 2 if form == "flood_every_k" else 1

    @jax.jit
    @jax.grad
    def slope(grad, value):
        state = optimizer.init(one)
        for _ in range(calls):
            update, state = optimizer.update(grad, state, one, value=value)
        return update

    factor = 1.0 if form == "scale_by_flood" else -0.5
    for value, sign in ((0.3, -1.0), (0.7, 1.0)):
        assert slope(2.0, value) == pytest.approx(sign * factor)
