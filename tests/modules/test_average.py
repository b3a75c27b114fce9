"""Averaged weights: NumPy's sum of what a run visits, wherever they are kept."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import AverageState, average_params, averaged, flood, scale_by_flood
from tests import oracles

LEVEL, STEPS = 0.5, 25
PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": (jnp.float32(0.75),)}
VALUES = np.random.default_rng(0).uniform(0.1, 0.9, STEPS).astype(np.float32)


def gradients(step, like=None):
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda p: np.asarray(rng.normal(size=p.shape) + 0.3, p.dtype), like or PARAMS
    )


def history(optimizer, params, rows):
    """The state and the parameters after each update, stacked."""

    def step(carry, row):
        params, state = carry
        grads, given = row
        updates, state = optimizer.update(grads, state, params, **given)
        params = optax.apply_updates(params, updates)
        return (params, state), (state, params)

    return jax.lax.scan(step, (params, optimizer.init(params)), rows)[1]


def rows_of(params, steps=STEPS, **extra):
    given = {"value": VALUES} | extra
    grads = [gradients(step, params) for step in range(steps)]
    stacked = jax.tree.map(lambda *each: np.stack(each), *grads)
    return stacked, {name: of[:steps] for name, of in given.items()}


def run(optimizer, params=None, *, jit=True, **extra):
    """The last state, and the parameters after each update; `extra` has rows."""
    params = params or PARAMS
    with jax.disable_jit(not jit):
        run_ = jax.jit(functools.partial(history, optimizer))
        found = jax.device_get(run_(params, rows_of(params, **extra)))
    states, visited = zip(
        *(jax.tree.map(lambda x, i=i: x[i], found) for i in range(STEPS)), strict=True
    )
    return states[-1], visited


def expected(visited, decay):
    return jax.tree.map(lambda *each: oracles.average(each, decay), *visited)


def assert_average(got, wanted, tolerance=2e-6):
    chex.assert_trees_all_close(got, wanted, rtol=tolerance, atol=tolerance)


def chain(decay=0.9, inner=None):
    return optax.chain(
        scale_by_flood(LEVEL), inner or optax.adam(0.1), average_params(decay)
    )


# ---- the mean ----


def test_the_oracle_is_the_plain_mean_and_then_the_exponential_one():
    visited = np.random.default_rng(1).normal(size=(30, 2))
    np.testing.assert_allclose(oracles.average(visited[:10], 0.9), visited[:10].mean(0))
    by_step = visited[:10].mean(0)
    for params in visited[10:]:
        by_step = 0.9 * by_step + 0.1 * params
    np.testing.assert_allclose(oracles.average(visited, 0.9), by_step)


@pytest.mark.parametrize(
    ("decay", "jit"),
    [(0.0, True), (0.6, True), (0.6, False), (0.9, True), (0.99, True)],
)
def test_average_is_the_mean_of_the_parameters_after_each_update(decay, jit):
    with jax.disable_jit(not jit):
        found = jax.jit(functools.partial(history, chain(decay)))(
            PARAMS, rows_of(PARAMS)
        )
    states, params = jax.device_get(found)
    visited = [jax.tree.map(lambda x, i=i: x[i], params) for i in range(STEPS)]
    for steps in (1, 2, STEPS):
        state = jax.tree.map(lambda x, last=steps - 1: x[last], states)
        got = averaged(state, visited[steps - 1])
        assert_average(got, expected(visited[:steps], decay))
        assert optax.tree.get(state, "flood_average_step") == steps
    if not decay:
        chex.assert_trees_all_equal(got, visited[-1])


def test_updates_are_those_without_an_average():
    without = optax.chain(scale_by_flood(LEVEL), optax.adam(0.1))
    chex.assert_trees_all_equal(run(chain())[1], run(without)[1])


def test_average_over_a_scan_of_many_updates_does_not_drift():
    """Ten thousand updates; each rounds the average once."""
    noise = np.random.default_rng(0).normal(size=(10_000, 3)).astype(np.float32)
    pull = optax.add_decayed_weights(1.0)  # the gradient is the noise, and the weights
    optimizer = optax.chain(pull, optax.sgd(0.01), average_params(0.999))
    start = jnp.array([1.0, -2.0, 30.0])
    states, visited = jax.jit(functools.partial(history, optimizer))(start, (noise, {}))
    got = optax.tree.get(states, "flood_average")[-1]
    np.testing.assert_allclose(got, oracles.average(visited, 0.999), atol=2e-6)


def test_before_the_first_update_it_is_the_parameters():
    state = chain().init(PARAMS)
    chex.assert_trees_all_equal(averaged(state, PARAMS), PARAMS)
    assert optax.tree.get(state, "flood_average_step") == 0
    assert type(state[-1]) is AverageState


def test_first_parameters_leave_no_trace_not_even_of_rounding():
    """Also of the other sign, where the way from one to the other is rounded."""
    start, moved = jnp.float32(np.random.default_rng(0).normal(size=(2, 1000)))
    _, state = average_params(0.99).update(moved, average_params().init(start), start)
    after = optax.apply_updates(start, moved)
    np.testing.assert_array_equal(averaged(state, after), after)


def test_what_is_infinite_for_ever_stays_so_and_makes_no_nan():
    mask = jnp.array([0.5, -jnp.inf])
    optimizer = average_params(0.5)
    state = optimizer.init(mask)
    for _ in range(4):
        _, state = optimizer.update(jnp.array([1.0, 0.0]), state, mask)
    np.testing.assert_array_equal(averaged(state, mask), [1.5, -np.inf])


def test_more_updates_than_int32_counts_do_not_begin_again():
    most = jnp.int32(np.iinfo(np.int32).max)
    optimizer = average_params(0.9)
    state = optimizer.init(PARAMS)._replace(flood_average_step=most)
    _, state = optimizer.update(PARAMS, state, PARAMS)
    assert state.flood_average_step == most
    assert_average(averaged(state, PARAMS), jax.tree.map(lambda p: 1.1 * p, PARAMS))


def test_average_over_updates_of_nan_is_nan_for_ever():
    optimizer = optax.chain(optax.sgd(0.1), average_params(0.5))
    params, state = jnp.array([1.0, 2.0]), optimizer.init(jnp.array([1.0, 2.0]))
    for grad in (jnp.array([1.0, np.nan]), *[jnp.ones(2)] * 3):
        updates, state = optimizer.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(np.isnan(averaged(state, params)), [False, True])


RATES = {"constant": (optax.constant_schedule(0.5), 110), "cosine": (None, 184)}


@pytest.mark.parametrize("name", RATES)
def test_average_lags_more_where_the_learning_rate_ends_at_zero(name):
    """Its loss is that of the weights so many steps before the end: the page's numbers.

    Least squares without noise, 1,000 steps of gradient descent, a decay of .99.
    """
    rate, lag = RATES[name]
    rate = rate or optax.cosine_decay_schedule(1.0, 1000)
    optimizer = optax.chain(optax.sgd(rate), average_params(0.99))
    slopes = 1 / jnp.arange(1.0, 21.0) ** 2

    def loss(w):
        return jnp.sum(slopes * w**2) / 2

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(slopes * w, state, w)
        return (optax.apply_updates(w, updates), state), loss(w)

    w = jnp.ones(20)
    (w, state), curve = jax.lax.scan(step, (w, optimizer.init(w)), length=1000)
    nearest = np.abs(np.asarray(curve) - loss(averaged(state, w))).argmin()
    assert abs(1000 - nearest - lag) <= 1


# ---- dtypes ----


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_parameters_are_averaged_in_float32_at_least(dtype):
    """As apply_updates rounds them, also where XLA could keep more bits, under jit."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    state, visited = run(optax.chain(optax.sgd(0.01), average_params(0.9)), params)
    average = optax.tree.get(state, "flood_average")
    work = np.dtype("complex64" if dtype == "complex64" else "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {work}

    def wanted(*each):
        each = np.stack(each).astype(work)
        parts = oracles.average(each.real, 0.9), oracles.average(each.imag, 0.9)
        return parts[0] + 1j * parts[1]

    assert_average(average, jax.tree.map(wanted, *visited), 3e-7)
    given_back = jax.tree.map(lambda p: p.astype(dtype), average)
    chex.assert_trees_all_equal(averaged(state, visited[-1]), given_back)


@pytest.mark.usefixtures("x64")
def test_float64_is_averaged_in_float64():
    params = {"w": jnp.array([1.0, 2.0]), "half": jnp.array([1.0], jnp.bfloat16)}
    state, visited = run(chain(0.7), params)
    wanted = expected(visited, 0.7)
    np.testing.assert_allclose(averaged(state, params)["w"], wanted["w"], rtol=1e-14)
    average = optax.tree.get(state, "flood_average")
    assert (average["w"].dtype, average["half"].dtype) == (np.float64, np.float32)
    np.testing.assert_allclose(average["half"], wanted["half"], rtol=3e-7)


def test_average_of_16_bit_parameters_does_not_stand_still():
    """A hundredth of a small step is lost in bfloat16: the page's number."""
    half = jnp.ones(3, jnp.bfloat16)
    optimizer = average_params(0.99)
    state, params = optimizer.init(half), half
    update = jax.jit(optimizer.update)
    for moved in (*[half * 0] * 100, half * 0.125, *[half * 0] * 500):
        _, state = update(moved, state, params)
        params = optax.apply_updates(params, moved)
    wanted = oracles.average([*[1.0] * 100, *[1.125] * 501], 0.99)
    np.testing.assert_allclose(state.flood_average, wanted, rtol=1e-6)
    assert wanted > 1.12


# ---- what has no average ----


def test_leaves_that_are_no_floats_have_no_average_and_pass():
    params = {
        "w": jnp.array([1.0, 2.0]),
        "count": jnp.array([3, 4]),
        "key": jax.random.key(0),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    zero = np.zeros((), jax.dtypes.float0)
    updates = params | {"w": jnp.ones(2), "count": np.zeros(2, zero.dtype), "key": zero}
    optimizer = average_params(0.5)
    state = optimizer.init(params)
    for _ in range(3):
        same, state = optimizer.update(updates, state, params)
        assert same is updates
    masked = optax.MaskedNode()
    average = state.flood_average
    assert (average["count"], average["key"], average["none"]) == (masked, masked, None)
    got = averaged(state, params)
    chex.assert_trees_all_equal_structs(got, params)
    np.testing.assert_array_equal(got["w"], [2, 3])
    np.testing.assert_array_equal(got["count"], [3, 4])
    assert (jax.random.key_data(got["key"]) == jax.random.key_data(params["key"])).all()


def test_a_parameter_without_update_is_averaged_as_it_is():
    params = {"w": jnp.array([1.0]), "still": jnp.array([5.0])}
    optimizer = average_params(0.9)
    state = optimizer.init(params)
    for nothing in (None, optax.MaskedNode()):
        updates = {"w": jnp.ones(1), "still": nothing}
        _, state = optimizer.update(updates, state, params)
    assert averaged(state, params) == {"w": 2.0, "still": 5.0}


LABELS = {"w": "fast", "b": ("slow",)}


def test_groups_of_a_partition_have_averages_of_their_own():
    groups = {
        "fast": optax.chain(optax.sgd(0.2), average_params(0.6)),
        "slow": optax.chain(optax.adam(0.1), average_params(0.9)),
    }
    state, visited = run(optax.partition(groups, LABELS))
    fast, slow = expected(visited, 0.6), expected(visited, 0.9)
    assert_average(averaged(state, visited[-1]), {"w": fast["w"], "b": slow["b"]})


FROZEN = {"w": False, "b": (True,)}
PARTLY = {
    "partition": lambda inner: optax.partition(
        {"fast": inner, "slow": optax.set_to_zero()}, LABELS
    ),
    "freeze": lambda inner: optax.chain(
        inner, optax.freeze(FROZEN), average_params(0.9)
    ),
    "selective": lambda inner: optax.selective_transform(inner, freeze_mask=FROZEN),
    "masked": lambda inner: optax.chain(
        optax.sgd(0.1), optax.masked(average_params(0.9), {"w": True, "b": False})
    ),
}


@pytest.mark.parametrize("name", PARTLY)
def test_parameters_without_average_are_given_back_as_they_are(name):
    inner = optax.sgd(0.1)
    if name in ("partition", "selective"):
        inner = optax.chain(inner, average_params(0.9))
    state, visited = run(PARTLY[name](inner))
    got = averaged(state, visited[-1])
    np.testing.assert_allclose(got["w"], expected(visited, 0.9)["w"], rtol=2e-6)
    chex.assert_trees_all_equal(got["b"], visited[-1]["b"])
    moves = visited[0]["b"][0] != visited[-1]["b"][0]
    assert moves == (name == "masked")


# ---- steps that are none ----


def test_a_step_that_apply_if_finite_skips_is_no_step():
    inner = optax.chain(optax.adam(0.1), average_params(0.9))
    right = optax.chain(scale_by_flood(LEVEL), optax.apply_if_finite(inner, 9))
    wrong = optax.chain(
        scale_by_flood(LEVEL),
        optax.apply_if_finite(optax.adam(0.1), 9),
        average_params(0.9),
    )
    values = np.where(np.arange(STEPS) % 3 == 1, np.nan, VALUES)
    counted = [i for i in range(STEPS) if np.isfinite(values[i])]
    for optimizer in (right, wrong):
        state, visited = run(optimizer, value=values)
        got = averaged(state, visited[-1])
        if optimizer is right:
            kept = [visited[i] for i in counted]
            assert_average(got, expected(kept, 0.9))
            assert optax.tree.get(state, "flood_average_step") == len(counted)
        else:  # as documented: behind it, each skipped step counts its parameters again
            assert_average(got, expected(visited, 0.9))


WINDOWS = {
    "every_k": ({"every_k": 3}, {}, [3, 6, 9, 12, 15, 18, 21, 24]),
    "flush": (
        {"every_k": 4},
        {"flush": np.arange(STEPS) % 7 == 1},  # after 2, 9, 16, 23 micro-batches
        [2, 6, 9, 13, 16, 20, 23],
    ),
    "weights": (
        {"every_k": 2},
        {"weight": np.float32([1, 0, 0, 0, 3, 1] * 4 + [0])},
        [k + i for k in range(0, 24, 6) for i in (2, 6)],  # the second counts nothing
    ),
    "skips": (
        {"every_k": 2, "should_skip_update_fn": optax.skip_not_finite},
        {"value": np.where(np.arange(STEPS) % 5 == 2, np.nan, VALUES)},
        [2, 5, 7, 10, 12, 15, 17, 20, 22, 25],
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_average_counts_windows_and_nothing_that_counts_nothing(name):
    options, extra, ends = WINDOWS[name]
    inner = optax.chain(optax.adam(0.1), average_params(0.8))
    state, visited = run(flood(inner, LEVEL, **options), **extra)
    kept = [visited[end - 1] for end in ends]
    assert optax.tree.get(state, "flood_average_step") == len(ends)
    assert_average(averaged(state, visited[-1]), expected(kept, 0.8))


def test_in_a_chain_an_update_of_weight_zero_counts():
    """As documented: its parameters are others, by the momentum of Adam."""
    state, visited = run(chain(), weight=np.float32(np.arange(STEPS) % 2))
    assert optax.tree.get(state, "flood_step") == STEPS // 2
    assert_average(averaged(state, visited[-1]), expected(visited, 0.9))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a != b).all(), *visited[1:3]))


def test_a_line_search_inside_a_flood_is_averaged():
    def loss_fn(w):
        return jnp.sum(jnp.exp(w) - w - 1)

    optimizer = flood(optax.chain(optax.lbfgs(), average_params(0.5)), LEVEL)
    params, visited = jnp.array([2.0, -1.0]), []
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss_fn)(params)
        given = {"value": value, "grad": grad, "value_fn": loss_fn}
        updates, state = optimizer.update(grad, state, params, **given)
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        params, state = step(params, state)
        visited.append(params)
    assert_average(averaged(state, params), expected(visited, 0.5))


def test_multi_steps_around_it_counts_its_windows():
    optimizer = optax.MultiSteps(optax.chain(optax.sgd(0.1), average_params(0.8)), 4)
    state, visited = run(optimizer)
    assert_average(averaged(state, visited[-1]), expected(visited[3::4], 0.8))


# ---- decay ----


def test_inject_hyperparams_changes_the_decay_without_a_new_trace():
    optimizer = optax.inject_hyperparams(average_params)(decay=0.9)
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    visited, decays = [], [0.9] * 12 + [0.5] * 3
    for i, decay in enumerate(decays):
        state.hyperparams["decay"] = jnp.float32(decay)
        updates, state = update(gradients(i), state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params)
    kept = expected(visited[:12], 0.9)
    for after in visited[12:]:
        kept = jax.tree.map(lambda a, p: 0.5 * (a + np.asarray(p)), kept, after)
    assert_average(averaged(state, params), kept)


def test_decay_of_16_bits_is_refused_and_the_remedy_works():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    rounded = optax.inject_hyperparams(average_params)(decay=0.999)
    with pytest.raises(
        TypeError, match=r"32 bits at least, got bfloat16, to which .999"
    ):
        jax.jit(rounded.init)(params)
    kept = optax.inject_hyperparams(average_params, hyperparam_dtype=jnp.float32)
    state, visited = run(optax.chain(optax.sgd(0.1), kept(decay=0.9)), params)
    average = optax.tree.get(state, "flood_average")
    assert_average(average, expected(visited, 0.9))


def test_decays_may_be_mapped():
    decays = jnp.array([0.0, 0.5, 0.9])

    @jax.jit
    @jax.vmap
    def last(decay):
        rows = rows_of(PARAMS, steps=8)
        states, visited = history(chain(decay, optax.sgd(0.1)), PARAMS, rows)
        state, params = jax.tree.map(lambda x: x[-1], (states, visited))
        return averaged(state, params), visited

    together, visited = jax.device_get(last(decays))
    for i, decay in enumerate(decays):
        wanted = jax.tree.map(
            lambda x, i=i, decay=decay: oracles.average(x[i], float(decay)), visited
        )
        assert_average(jax.tree.map(lambda leaf, i=i: leaf[i], together), wanted)
