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


def every_step(optimizer, params=PARAMS, **extra):
    """The states, and the parameters, after each update; `extra` has its rows."""
    stepped = jax.jit(functools.partial(history, optimizer))
    found = jax.device_get(stepped(params, rows_of(params, **extra)))
    each = (jax.tree.map(lambda x, i=i: x[i], found) for i in range(STEPS))
    return zip(*each, strict=True)


def run(optimizer, params=PARAMS, **extra):
    """The last state, and the parameters after each update."""
    states, visited = every_step(optimizer, params, **extra)
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


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9, 0.99])
def test_average_is_the_mean_of_the_parameters_after_each_update(decay):
    states, visited = every_step(chain(decay))
    for steps in (1, 2, STEPS):
        got = averaged(states[steps - 1], visited[steps - 1])
        assert_average(got, expected(visited[:steps], decay))
        assert optax.tree.get(states[steps - 1], "flood_average_step") == steps
    if not decay:
        chex.assert_trees_all_equal(got, visited[-1])


def test_average_op_by_op_is_the_mean_too():
    optimizer, params, visited = average_params(0.6), PARAMS, []
    state = optimizer.init(params)
    for step in range(5):
        moves = gradients(step)
        _, state = optimizer.update(moves, state, params)
        params = optax.apply_updates(params, moves)
        visited.append(params)
        assert_average(averaged(state, params), expected(visited, 0.6))


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


# ---- with other transformations ----

LABELS, FROZEN = {"w": "fast", "b": ("slow",)}, {"w": False, "b": (True,)}
SECONDS = np.arange(STEPS) % 5 == 2
BAD = np.where(SECONDS, np.nan, VALUES)
CLOSED = np.float32([1, 0, 0, 0, 3, 1] * 4 + [0])  # of pairs, the second counts nothing
EVERY = [i + 1 for i in range(STEPS)]
FINITE = [i + 1 for i in range(STEPS) if not SECONDS[i]]
INNER = optax.chain(optax.adam(0.1), average_params(0.8))


def windows(**options):
    return flood(INNER, LEVEL, **options)


def flooded(*inner):
    return optax.chain(scale_by_flood(LEVEL), *inner)


def case(optimizer, ends=EVERY, decays=(0.8, 0.8), **extra):
    """With the updates after which there is a step, and the decays of w and of b."""
    return optimizer, ends, decays, extra


FREEZE = optax.freeze(FROZEN)
MASKED = optax.masked(average_params(0.8), {"w": True, "b": False})
FASTER = optax.chain(optax.sgd(0.2), average_params(0.6))
COMBINED = {
    "every_k": case(windows(every_k=3), EVERY[2::3]),
    "flush": case(
        windows(every_k=4),
        [2, 6, 9, 13, 16, 20, 23],
        flush=np.arange(STEPS) % 7 == 1,  # after 2, 9, 16, 23 micro-batches
    ),
    "weights": case(
        windows(every_k=2),
        [k + i for k in range(0, 24, 6) for i in (2, 6)],
        weight=CLOSED,
    ),
    "skips": case(
        windows(every_k=2, should_skip_update_fn=optax.skip_not_finite),
        FINITE[1::2],
        value=BAD,
    ),
    "MultiSteps": case(optax.MultiSteps(INNER, 4), EVERY[3::4]),
    # as documented: the parameters are others, by the momentum of Adam
    "weight zero in a chain": case(
        flooded(INNER), weight=np.float32(np.arange(STEPS) % 2)
    ),
    "apply_if_finite": case(
        flooded(optax.apply_if_finite(INNER, 9)), FINITE, value=BAD
    ),
    # as documented: each skipped step counts its parameters again
    "behind apply_if_finite": case(
        flooded(optax.apply_if_finite(optax.adam(0.1), 9), average_params(0.8)),
        value=BAD,
    ),
    "partition": case(
        optax.partition({"fast": FASTER, "slow": INNER}, LABELS), decays=(0.6, 0.8)
    ),
    "partition, frozen": case(
        optax.partition({"fast": INNER, "slow": optax.set_to_zero()}, LABELS),
        decays=(0.8, None),
    ),
    "freeze, frozen": case(
        optax.chain(optax.sgd(0.1), FREEZE, average_params(0.8)), decays=(0.8, None)
    ),
    "selective, frozen": case(
        optax.selective_transform(INNER, freeze_mask=FROZEN), decays=(0.8, None)
    ),
    "masked": case(optax.chain(optax.sgd(0.1), MASKED), decays=(0.8, None)),
}


@pytest.mark.parametrize("name", COMBINED)
def test_average_is_of_what_each_step_leaves_and_of_nothing_else(name):
    optimizer, ends, decays, extra = COMBINED[name]
    state, visited = run(optimizer, **extra)
    got, last = averaged(state, visited[-1]), visited[-1]
    for leaf, decay in zip(("w", "b"), decays, strict=True):
        if decay is None:  # without an average they are given back as they are
            chex.assert_trees_all_equal(got[leaf], last[leaf])
        else:
            kept = [visited[end - 1][leaf] for end in ends]
            assert_average(got[leaf], expected(kept, decay))
    steps = optax.tree.get_all_with_path(state, "flood_average_step")
    assert {int(step) for _, step in steps} == {len(ends)}
    assert (visited[0]["b"] == last["b"]) == ("frozen" in name)


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
