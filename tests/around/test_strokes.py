"""A band around other things: the loss form, searches, windows, wrappers, stores."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from flood_optax import FloodState, Shape, flood, flooded, scale_by_flood, shapes
from tests import forms, oracles, stores

LEVEL, BAND = 0.625, 0.125
FIELDS = FloodState._fields

# ---- a problem, and the band by hand around the loss form ----

X = np.random.default_rng(7).normal(size=(40, 4, 3)).astype(np.float32)
Y = (np.sin(X.sum(-1)) + 0.6 * np.random.default_rng(8).normal(size=(40, 4))).astype(
    np.float32
)
PARAMS = {"w": np.float32([0.3, -0.7, 0.2]), "b": np.float32(0.4)}


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) * 1.5 + params["b"] - y) ** 2)


def by_optax(optimizer, steps):
    """Parameters, state and losses of the optax form over the batches, op by op."""
    params, losses = jax.tree.map(jnp.asarray, PARAMS), []
    state = optimizer.init(params)
    for i in range(steps):
        value, grads = jax.value_and_grad(loss_fn)(params, X[i % 40], Y[i % 40])
        updates, state = optimizer.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    return params, state, np.array(losses)


def by_hand(inner, steps, shape=forms.SHAPES["reflect"]):
    """The loss form, whose loop carries the direction: the recipe of docs/traps.md."""
    inner = optax.with_extra_args_support(inner)
    params, losses, rising = jax.tree.map(jnp.asarray, PARAMS), [], False
    state = inner.init(params)
    for i in range(steps):
        end = LEVEL + jnp.where(rising, BAND, -BAND)
        objective = flooded(loss_fn, end, return_info=True, shape=shape)
        (value, info), grads = jax.value_and_grad(objective, has_aux=True)(
            params, X[i % 40], Y[i % 40]
        )
        rising = info.loss < end
        updates, state = inner.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        losses.append(info.loss)
    return params, state, np.array(losses)


INNER = {
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(0.05),
    "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.3),
}


@pytest.mark.parametrize(
    ("form", "inner"),
    [
        ("chain", "adam"),
        ("flood", "adam"),
        ("flood", "momentum"),
        ("flood", "polyak_sgd"),
    ],
)
def test_band_in_the_loss_form_is_the_optax_form_bit_for_bit(form, inner):
    """Op by op; XLA rounds two programs differently."""
    steps = 70
    optimizer = forms.OPTAX[form](INNER[inner](), LEVEL, band=BAND)
    params, state, losses = by_optax(optimizer, steps)
    other, other_state, other_losses = by_hand(INNER[inner](), steps)
    np.testing.assert_array_equal(losses, other_losses)
    chex.assert_trees_all_equal(params, other)
    inner_state = state[1] if form == "chain" else state.flood_inner_state
    chex.assert_trees_all_equal(inner_state, other_state)
    ends, _ = oracles.strokes(losses, LEVEL, BAND)
    assert optax.tree.get(state, "flood_below") == np.sum(losses < ends)
    assert 10 < np.sum(losses < ends) < steps - 10
    assert {*np.unique(ends)} == {LEVEL - BAND, LEVEL + BAND}


TURNING = {
    "reflect": (shapes.reflect(), oracles.reflect),
    "asymmetric": (shapes.asymmetric(0.5), oracles.asymmetric(0.5, 0.0)),
    "own": (
        Shape(
            lambda r: jnp.abs(r) + r * r / 2,
            lambda r: jnp.where(r >= 0, 1 + r, r - 1),
        ),
        lambda r: (abs(r) + r**2 / 2, np.where(r >= 0, 1 + r, r - 1)),
    ),
}


@pytest.mark.parametrize("shape", TURNING)
def test_band_bends_every_shape_that_turns_around_at_its_ends(shape):
    made, oracle = TURNING[shape]
    optimizer = flood(optax.sgd(0.1), LEVEL, band=BAND, shape=made)
    params, _, losses = by_optax(optimizer, 60)
    other, _, other_losses = by_hand(optax.sgd(0.1), 60, shape=made)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    chex.assert_trees_all_close(params, other, rtol=1e-5)
    # and by NumPy, whose multiplier is that of the end
    ends, _ = oracles.strokes(losses, LEVEL, BAND)
    assert {*np.unique(ends)} == {LEVEL - BAND, LEVEL + BAND}
    got, _ = walked(scale_by_flood(LEVEL, band=BAND, shape=made), value=losses)
    slopes = oracle(np.float64(losses) - ends)[1]
    np.testing.assert_allclose(got, slopes, rtol=1e-5, atol=1e-6)


# ---- line searches: one end for value, gradient and value_fn ----

START = jnp.array([1.9, -0.1])


def bowl(w):
    return jnp.sum((w - 1) ** 2 * jnp.array([1.0, 9.0])) + jnp.cosh(w[0] - w[1]) - 1


SEARCHES = {
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)
    ),
}


@pytest.mark.parametrize(
    "search",
    [pytest.param("lbfgs", marks=pytest.mark.slow), "backtracking"],
)
def test_line_search_sees_value_gradient_and_function_at_one_end(search):
    level, band = 2.0, 0.5
    banded, bare = flood(SEARCHES[search](), level, band=band), SEARCHES[search]()

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(bowl)(w)
        updates, state = banded.update(
            grad, state, w, value=value, grad=grad, value_fn=bowl
        )
        return optax.apply_updates(w, updates), state, value

    @jax.jit
    def bare_step(w, state, end):
        objective = flooded(bowl, end)
        value, grad = jax.value_and_grad(objective)(w)
        updates, state = bare.update(
            grad, state, w, value=value, grad=grad, value_fn=objective
        )
        return optax.apply_updates(w, updates), state

    w, state, other, other_state = START, banded.init(START), START, bare.init(START)
    rises, ends = False, []
    for _ in range(30):
        loss = float(bowl(other))
        ends.append(level + band if rises else level - band)
        rises = loss < ends[-1]
        w, state, value = step(w, state)
        assert value == pytest.approx(loss, rel=1e-5)
        assert optax.tree.get(state, "flood_level") == ends[-1]
        other, other_state = bare_step(other, other_state, ends[-1])
        np.testing.assert_allclose(w, other, rtol=1e-5)
    assert len(set(ends)) == 2


# ---- windows ----

ROWS = 60


def walked(optimizer, **each):
    """The updates of ones, in one scan, and the last state."""
    one = jnp.ones([])

    def step(state, row):
        update, state = optimizer.update(one, state, one, **row)
        return state, update

    state, updates = lax.scan(
        step, optimizer.init(one), jax.tree.map(jnp.asarray, each)
    )
    return np.asarray(updates), state


def window_losses():
    rng = np.random.default_rng(5)
    slow = LEVEL + 0.3 * np.sin(np.arange(ROWS) / 4)
    # thirty-seconds: the means of a window, ties among them, are exact
    return np.float32(np.round(32 * (slow + rng.uniform(-0.1, 0.1, ROWS))) / 32)


@pytest.mark.parametrize("every_k", [2, 4])
def test_band_turns_by_the_window_and_flush_closes_one(every_k):
    losses = window_losses()
    optimizer = flood(optax.identity(), LEVEL, band=BAND, every_k=every_k)
    updates, state = walked(optimizer, value=losses)
    wanted = oracles.stroke_windows([every_k], losses, LEVEL, BAND)
    np.testing.assert_array_equal(updates, wanted)
    assert state.flood_state.flood_below == np.sum(wanted < 0)
    assert {*np.unique(wanted)} == {-1, 0, 1}
    # a band for each micro-batch turns elsewhere
    assert np.sum(oracles.strokes(losses, LEVEL, BAND)[1] < 0) != np.sum(wanted < 0)
    sizes = [3, 1, 2, 4, 2] * 5  # closed early by flush
    ends = np.cumsum(sizes)
    optimizer = flood(optax.identity(), LEVEL, band=BAND, every_k=5)
    flush = np.isin(1 + np.arange(ROWS), ends)
    updates, _ = walked(optimizer, value=losses, flush=flush)
    np.testing.assert_allclose(
        updates, oracles.stroke_windows(sizes, losses, LEVEL, BAND), rtol=1e-6
    )


def test_band_windows_of_weight_zero_and_skipped_ones_leave_the_direction():
    losses = window_losses()
    rng = np.random.default_rng(6)
    weights = rng.choice([0.0, 1.0, 2.0, 4.0], ROWS)
    weights[20:24] = 0.0  # whole windows
    losses[weights == 0] = np.nan
    optimizer = flood(optax.identity(), LEVEL, band=BAND, every_k=2)
    updates, _ = walked(optimizer, value=losses, weight=np.float32(weights))
    wanted = oracles.stroke_windows([2], losses, LEVEL, BAND, weights=weights)
    np.testing.assert_array_equal(np.sign(updates), wanted)
    assert (wanted[20:24] == 0).all()
    losses = window_losses()
    losses[rng.integers(0, 5, ROWS) == 0] = np.nan
    optimizer = flood(
        optax.identity(),
        LEVEL,
        band=BAND,
        every_k=2,
        should_skip_update_fn=optax.skip_not_finite,
    )
    updates, _ = walked(optimizer, value=losses)
    wanted = oracles.stroke_windows([2], losses, LEVEL, BAND, counted=~np.isnan(losses))
    np.testing.assert_array_equal(updates, wanted)
    assert np.sum(wanted < 0) > 3 < np.sum(wanted > 0)


@pytest.mark.parametrize("form", ["scale_by_flood", "flood"])
def test_band_keeps_its_direction_over_a_loss_of_weight_zero(form):
    # on the way up, and on the way down, where a trace would turn it
    losses = np.float32([1.0, 0.45, np.nan, 0.6, 0.76, 0.1, 0.6, np.nan, 0.7, 0.45])
    weights = np.float32([1, 1, 0, 2, 1, 0, 1, 0, 3, 1])
    optimizer = forms.OPTAX[form](optax.identity(), LEVEL, band=BAND)
    updates, state = walked(optimizer, value=losses, weight=weights)
    _, wanted = oracles.strokes(losses, LEVEL, BAND, weights > 0)
    np.testing.assert_array_equal(updates, wanted)
    np.testing.assert_array_equal(wanted, [1, -1, 0, -1, 1, 0, 1, 0, 1, -1])
    assert optax.tree.get(state, "flood_level") == LEVEL - BAND
    assert optax.tree.get(state, "flood_step") == 7


# ---- wrappers ----


def test_band_changed_in_mid_run_goes_on_in_its_direction():
    make = optax.inject_hyperparams(scale_by_flood, hyperparam_dtype=jnp.float32)
    optimizer = make(level=LEVEL, band=BAND)
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    state, seen = optimizer.init(jnp.ones([])), []
    for loss, band in [
        (0.45, 0.125),  # below .5: up
        (0.74, 0.125),
        (0.74, 0.05),  # the upper end is now .675: down
        (0.58, 0.05),
        (0.58, 0.03),  # below .595: up
        (0.63, 0.25),
        (0.87, 0.25),
        (0.87, 0.0),  # no band: down
        (0.62, 0.0),
        (0.62, 0.125),  # up since the last step was
        (0.76, 0.125),
    ]:
        state.hyperparams["band"] = jnp.float32(band)
        updates, state = update(jnp.ones([]), state, value=jnp.float32(loss))
        seen.append(float(updates))
    assert seen == [-1, -1, 1, 1, -1, -1, -1, 1, -1, -1, 1]


# ---- checkpoints ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")
@pytest.mark.parametrize("store", stores.FORMATS)
@pytest.mark.parametrize("first", [None, BAND], ids=["plain_first", "band_first"])
@pytest.mark.parametrize("form", ["scale_by_flood", "flood", "flood_every_k"])
def test_checkpoint_goes_on_with_a_band_and_without(form, first, store, tmp_path):
    second = BAND if first is None else None
    save, restore = stores.FORMATS[store]
    losses = window_losses()
    make = functools.partial(forms.OPTAX[form], optax.trace(0.5), LEVEL)
    old, new = make(band=first), make(band=second)
    _, state = walked(old, value=losses[:33])
    save(tmp_path / "kept", state)
    restored = restore(tmp_path / "kept", new.init(jnp.ones([])))
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(restored, state)

    def go_on(state):
        signs = []
        for loss in losses[33:]:
            _, state = new.update(jnp.ones([]), state, jnp.ones([]), value=loss)
            signs.append([optax.tree.get(state, name) for name in FIELDS])
        return np.array(signs)

    found = go_on(restored)
    np.testing.assert_array_equal(found, go_on(state))
    if form == "flood_every_k":
        return
    # by hand: the direction is that of the last loss before the checkpoint
    before = oracles.strokes(losses[:33], LEVEL, first or 0)
    rises, ends = before[1][-1] < 0, []
    for loss in losses[33:]:
        half = second or 0
        ends.append(LEVEL + half if rises else LEVEL - half)
        rises = loss < ends[-1]
    np.testing.assert_array_equal(found[:, 1], np.float32(ends))
