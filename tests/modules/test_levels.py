"""Where levels come from: against decimals, closed forms and step-by-step rules."""

import functools
import re
from decimal import Decimal, getcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from sklearn.linear_model import LogisticRegression

from flood_optax import flood_loss, flood_mean, levels, scale_by_flood

getcontext().prec = 60


# Warm-up


@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_warmup_floods_from_its_step_on(compile_):
    optimizer = optax.chain(scale_by_flood(levels.warmup(0.5, 2)), optax.sgd(1.0))
    update = compile_(optimizer.update)
    state, signs = optimizer.init(0.0), []
    for _ in range(4):  # always below the level
        updates, state = update(jnp.float32(1.0), state, value=jnp.float32(0.3))
        signs.append(float(updates))
    assert signs == [-1, -1, 1, 1]
    assert optax.tree.get(state, "flood_below") == 2


def test_warmup_of_a_schedule_does_not_shift_it():
    schedule = levels.warmup(lambda step: 0.25 * step, 2)
    chex.assert_trees_all_equal(
        jax.vmap(schedule)(jnp.arange(4)), jnp.array([-jnp.inf, -jnp.inf, 0.5, 0.75])
    )


# AdaFlood


def adaflood_in_decimals(a, gamma, alpha=1.0, beta=0.0):
    z = Decimal(alpha) * Decimal(a) + Decimal(beta)
    gamma = Decimal(gamma)
    return float(-((1 - gamma) * (-z).exp() + gamma).ln())


HELD_OUT = [
    0.0,
    1e-30,
    1e-6,
    0.003,
    0.4,
    0.75,
    3.0,
    18.0,
    90.0,
    1e4,
    -0.02,
    -3.0,
    -40.0,
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(np.float32, 1e-6), (np.float64, 1e-14)], ids=["f32", "f64"]
)
@pytest.mark.parametrize("gamma", [0.0, 2.0**-30, 0.0625, 0.5, 0.9375, 1 - 2.0**-20])
def test_adaflood_equals_the_formula_in_60_digits(gamma, dtype, rtol):
    a = np.array(HELD_OUT, dtype)
    expected = [adaflood_in_decimals(float(x), gamma) for x in a]
    result = levels.adaflood(a, gamma)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected, rtol=rtol)


@pytest.mark.usefixtures("x64")
def test_adaflood_alpha_and_beta_correct_the_held_out_loss():
    expected = [adaflood_in_decimals(a, 0.25, 0.75, 0.5) for a in HELD_OUT]
    result = levels.adaflood(jnp.array(HELD_OUT), 0.25, alpha=0.75, beta=0.5)
    np.testing.assert_allclose(result, expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("gamma", "cap"), [(0.05, 2.996), (0.25, 1.386), (0.5, 0.693), (0.9, 0.105)]
)
def test_adaflood_level_is_capped_as_published(gamma, cap):
    level = levels.adaflood(jnp.array([0.5, 20.0, 1e30, jnp.inf]), gamma)
    np.testing.assert_allclose(level[1:], cap, atol=5e-4)
    assert level[0] < cap


def test_adaflood_gamma_zero_is_the_held_out_loss_and_one_is_no_flooding():
    a = jnp.array([0.0, 1e-3, 0.3, 2.0, 700.0])
    np.testing.assert_allclose(levels.adaflood(a, 0.0), a, rtol=1e-6)
    np.testing.assert_array_equal(levels.adaflood(a, 1.0), 0.0)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_adaflood_slope_in_alpha_is_finite_and_right(gamma):
    # alpha can be trained on an objective of one's own
    a = np.array([0.0, 0.1, 2.0, 60.0])
    slopes = jax.vmap(jax.grad(lambda al, x: levels.adaflood(x, gamma, alpha=al)))(
        jnp.ones(4), jnp.asarray(a, jnp.float32)
    )
    weight = (1 - gamma) * np.exp(-a)
    np.testing.assert_allclose(slopes, a * weight / (weight + gamma), rtol=1e-5)


def test_adaflood_traces_once_over_gamma():
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(levels.adaflood, n=1))
    a = jnp.array([0.2, 3.0])
    for gamma in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(
            run(a, jnp.float32(gamma)), levels.adaflood(a, gamma), rtol=1e-6
        )


def test_adaflood_makes_no_nan_on_the_way():
    with jax.debug_nans(True):
        for gamma in (0.0, 0.5, 1.0):
            levels.adaflood(jnp.array(HELD_OUT), gamma)


# Held-out losses


@pytest.mark.parametrize(("n", "folds"), [(12, 3), (11, 3), (5, 5), (7, 2)])
def test_held_out_losses_cut_the_data_into_folds(n, folds):
    seen = []

    def fit(train, key):
        return np.asarray(train), jax.random.key_data(key)

    def evaluate(model, indices):
        train, key = model
        seen.append((train, np.asarray(indices), np.asarray(key)))
        return indices.astype(jnp.float32) + 0.5

    losses = levels.held_out_losses(
        fit, evaluate, n, num_folds=folds, key=jax.random.key(3)
    )
    # entry i is that of example i, whatever the permutation
    np.testing.assert_array_equal(losses, np.arange(n) + 0.5)
    sizes = {len(held_out) for _, held_out, _ in seen}
    assert len(seen) == folds
    assert sizes <= {n // folds, -(-n // folds)}
    for train, held_out, _ in seen:
        np.testing.assert_array_equal(
            np.sort(np.concatenate([train, held_out])), np.arange(n)
        )
    blocks = np.concatenate([held_out for _, held_out, _ in seen])
    assert (np.sort(blocks) == np.arange(n)).all()
    assert (blocks != np.arange(n)).any(), "the data are not shuffled"
    assert len({key.tobytes() for _, _, key in seen}) == folds


def regression(n=12, d=3):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(n, d))
    y = x @ np.arange(1.0, d + 1) + 0.3 * rng.normal(size=n)
    return jnp.asarray(x), jnp.asarray(y)


def least_squares(x, y):
    def fit(indices, key):
        del key
        return jnp.linalg.solve(x[indices].T @ x[indices], x[indices].T @ y[indices])

    def evaluate(w, indices):
        return (y[indices] - x[indices] @ w) ** 2

    return fit, evaluate


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.usefixtures("x64")
def test_held_out_losses_leaving_one_out_equal_the_closed_form(vmap):
    # PRESS: the residual left out is the residual over one minus the leverage
    x, y = regression()
    losses = levels.held_out_losses(
        *least_squares(x, y), 12, num_folds=12, key=jax.random.key(0), vmap=vmap
    )
    hat = x @ np.linalg.solve(x.T @ x, x.T)
    expected = ((y - hat @ y) / (1 - np.diag(hat))) ** 2
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


def test_held_out_losses_vmapped_are_one_program_with_the_same_folds():
    x, y = regression()
    fit, evaluate = least_squares(x, y)
    run = functools.partial(
        levels.held_out_losses,
        evaluate=evaluate,
        num_examples=12,
        num_folds=4,
        key=jax.random.key(5),
    )
    chex.clear_trace_counter()
    together = run(chex.assert_max_traces(fit, n=1), vmap=True)
    np.testing.assert_allclose(together, run(fit), atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: run(fit))(), together, atol=1e-5)


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_held_out_losses_pass_the_check_of_key_reuse(vmap, compile_):
    def losses(key):
        return levels.held_out_losses(
            lambda indices, key: jax.random.normal(key),
            lambda noise, indices: noise + indices,
            6,
            num_folds=3,
            key=key,
            vmap=vmap,
        )

    expected = losses(jax.random.key(4))
    with jax.debug_key_reuse(True):
        found = compile_(losses)(jax.random.key(4))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.usefixtures("x64")
def test_held_out_losses_give_int32_indices_with_64_bit_types(vmap):
    seen = []

    def evaluate(train, indices):
        seen.extend([train.dtype, indices.dtype])
        return indices * 1.0

    losses = levels.held_out_losses(
        lambda indices, key: indices,
        evaluate,
        6,
        num_folds=2,
        key=jax.random.key(0),
        vmap=vmap,
    )
    assert set(seen) == {np.dtype(np.int32)}
    np.testing.assert_array_equal(losses, np.arange(6.0))


def test_held_out_losses_depend_on_the_key_alone():
    run = functools.partial(
        levels.held_out_losses, *least_squares(*regression()), 12, num_folds=3
    )
    np.testing.assert_array_equal(
        run(key=jax.random.key(1)), run(key=jax.random.key(1))
    )
    assert (run(key=jax.random.key(1)) != run(key=jax.random.key(2))).any()


def test_held_out_losses_take_a_model_that_is_not_of_jax():
    x = np.linspace(-1, 1, 20)[:, None]
    y = (x[:, 0] > 0).astype(int)
    y[3] = 1  # the one wrong label

    def fit(indices, key):
        del key
        return LogisticRegression(C=10.0).fit(x[indices], y[indices])

    def evaluate(model, indices):
        return -model.predict_log_proba(x[indices])[np.arange(len(indices)), y[indices]]

    losses = levels.held_out_losses(
        fit, evaluate, 20, num_folds=5, key=jax.random.key(0)
    )
    assert losses.argmax() == 3


# WaveBound


def test_wavebound_is_below_the_target_and_passes_no_gradient():
    target = jnp.array([[0.5, 0.25], [1.0, 0.125]])
    np.testing.assert_array_equal(
        levels.wavebound(target, 0.125), target - np.float32(0.125)
    )
    slopes = jax.grad(lambda x: levels.wavebound(x, 0.1).sum())(target)
    np.testing.assert_array_equal(slopes, 0.0)
    assert levels.wavebound(target.astype(jnp.bfloat16), 0.1).dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        levels.wavebound(target, jnp.array([0.0, 0.125])),
        [[0.5, 0.125], [1.0, 0.0]],
    )


def test_wavebound_where_the_models_agree_descends():
    # r = epsilon > 0: never a tie, never ascent
    def objective(w, target):
        losses = (w - jnp.array([0.3, 2.0])) ** 2
        bounds = levels.wavebound((target - jnp.array([0.3, 2.0])) ** 2, 1e-3)
        return flood_loss(losses, bounds).mean()

    w = jnp.array([1.0, 0.5])
    np.testing.assert_allclose(
        jax.grad(objective)(w, w), w - jnp.array([0.3, 2.0]), rtol=1e-6
    )


# Soft labels


def test_entropy_floor_is_the_entropy():
    probs = np.random.default_rng(0).dirichlet(np.full(7, 0.3), size=(4, 5))
    floor = levels.entropy_floor(probs.astype(np.float32))
    np.testing.assert_allclose(floor, scipy.stats.entropy(probs, axis=-1), rtol=1e-5)


def test_entropy_floor_of_one_hot_targets_is_zero():
    np.testing.assert_array_equal(levels.entropy_floor(np.eye(3, dtype=np.float32)), 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_entropy_floor_of_smoothed_labels_is_reached_and_not_crossed(dtype):
    smooth = np.asarray(optax.smooth_labels(np.eye(3, 5, dtype=np.float32), 0.1))
    targets = jnp.asarray(smooth, dtype)  # in bfloat16 the rows sum to 0.9985
    floor = np.asarray(levels.entropy_floor(targets))
    p = np.asarray(targets, np.float64)
    best = -(p * np.log(p / p.sum(-1, keepdims=True))).sum(-1)
    np.testing.assert_allclose(floor, best, rtol=1e-6)
    logits = np.log(p) + np.random.default_rng(0).normal(0, 0.02, (1000, 3, 5))
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert (-(p * log_q).sum(-1) > floor - 1e-6).all()


def test_entropy_floor_makes_a_level_for_mixup_act():
    # a constant level below the floor never acts, one relative to it does
    rng = np.random.default_rng(0)
    share = rng.beta(0.4, 0.4, (64, 1))
    a, b = np.eye(4)[rng.integers(0, 4, (2, 64))]
    targets = share * a + (1 - share) * b
    q = (targets + 1e-4) / (1 + 4e-4)  # overfitted to the mixed labels
    losses = -(targets * np.log(q)).sum(-1)
    plain = flood_mean(losses.astype(np.float32), 0.05)
    np.testing.assert_allclose(plain, losses.mean(), rtol=1e-6)
    floor = np.asarray(levels.entropy_floor(targets.astype(np.float32)))
    assert (losses - floor < 0.05).all()
    relative = flood_mean(losses.astype(np.float32), floor + 0.05, over="example")
    np.testing.assert_allclose(
        relative, np.mean(2 * (floor + 0.05) - losses), rtol=1e-6
    )


def test_entropy_floor_passes_no_gradient():
    slopes = jax.grad(lambda p: levels.entropy_floor(p).sum())(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(slopes, 0.0)


# Validation


def plateau_rule(metrics, initial, step, patience, *, maximum):
    """The rule read off the whole history, one window at a time."""
    level, path = np.float32(initial), []
    best_at, start, judged = None, 0, True
    for now, metric in enumerate(metrics):
        if best_at is None or metric > metrics[best_at]:
            best_at, start, judged = now, now + 1, True
        elif now - start + 1 == patience:
            best = metrics[best_at]
            window = max(metrics[start : now + 1])
            preceding = metrics[max(start - patience, best_at) : start]
            decays = window < max(preceding) or start == best_at + 1
            move = 1 if window == best or decays else -1
            judged = judged or window == best
            if judged:
                level = np.float32(np.clip(level + move * np.float32(step), 0, maximum))
            start, judged = now + 1, not judged
        path.append(level)
    return path


def run_plateau(metrics, *args, **kwargs):
    init, update = levels.on_plateau(*args, **kwargs)

    def body(state, metric):
        level, state = update(state, metric)
        return state, level

    return jax.lax.scan(body, init(), jnp.asarray(metrics, jnp.float32))[1]


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_on_plateau_follows_its_rule(seed, patience):
    rng = np.random.default_rng(seed)
    metrics = rng.integers(0, 12, 200).astype(np.float32) - 0.02 * np.arange(200)
    metrics = metrics.astype(np.float32)
    expected = plateau_rule(metrics, 0.25, 0.125, patience, maximum=0.5)
    result = run_plateau(
        metrics, 0.25, step=0.125, patience=patience, mode="max", maximum=0.5
    )
    np.testing.assert_array_equal(result, expected)
    assert len(set(expected)) > 2, "the rule hardly moved"
    mirrored = run_plateau(
        -metrics, 0.25, step=0.125, patience=patience, mode="min", maximum=0.5
    )
    np.testing.assert_array_equal(mirrored, expected)


def test_on_plateau_keeps_the_level_while_the_metric_improves():
    np.testing.assert_array_equal(
        run_plateau(np.arange(20), 0.1, step=0.05, patience=1, mode="max"),
        np.float32(0.1),
    )


def test_on_plateau_raises_to_the_maximum_while_it_costs_nothing():
    result = run_plateau(
        np.ones(20), 0.0, step=0.25, patience=3, mode="max", maximum=0.6
    )
    assert result[3] == 0.25
    assert result[2] == 0.0
    assert result[-1] == np.float32(0.6)


def test_on_plateau_nan_is_never_a_new_best():
    metrics = [0.5, np.nan, 0.4, 0.6, np.nan, np.nan]
    result = run_plateau(metrics, 0.0, step=0.25, patience=2, mode="max")
    np.testing.assert_array_equal(result, [0, 0, 0.25, 0.25, 0.25, 0.5])


@pytest.mark.parametrize("start", [0.0, 1.0], ids=["from_below", "from_above"])
def test_on_plateau_hovers_at_the_lowest_level_that_stops_the_decay(start):
    # a model that overfits by 0.3 - level each epoch, and underfits above that level
    init, update = levels.on_plateau(start, step=0.05, patience=3, mode="max")

    def epoch(carry, _):
        state, damage = carry
        gap = 0.3 - state.level
        damage = jnp.maximum(damage + 0.1 * gap, 0.0)
        metric = 1 - damage - jnp.maximum(-gap, 0.0)
        level, state = update(state, metric)
        return (state, damage), level

    peak = update(init(), 1.0)[1]  # the metric has been better once
    _, path = jax.lax.scan(epoch, (peak, 0.0), length=300)
    assert path[-100:].min() > 0.2
    assert path[-100:].max() < 0.4


def test_on_plateau_state_is_stable_under_jit():
    init, update = levels.on_plateau(0.1, step=0.05, patience=2, mode="max")
    before = jax.tree.map(jax.typeof, init())
    _, state = jax.jit(update)(init(), jnp.float16(0.5))
    assert jax.tree.map(jax.typeof, state) == before
    _, eager = update(init(), 0.5)
    chex.assert_trees_all_equal(eager, state)


def test_on_plateau_state_may_be_donated():
    # Two fields that are one array crash a train step that donates its state.
    init, update = levels.on_plateau(0.5, step=0.25, patience=1, mode="min")
    step = jax.jit(update, donate_argnums=0)
    state, path = init(), []
    for loss in (1.0, 2.0, 3.0):
        level, state = step(state, jnp.float32(loss))
        path.append(float(level))
    assert path == [0.5, 0.75, 0.75]


def test_on_plateau_as_good_as_its_best_after_decay_moves_up():
    # 1 is best, the window .9 is worse: up. Then 1 again, a tie with the best, in the
    # first window after a move, which moves the level in this case alone: up.
    path = run_plateau([1, 0.9, 1, 0.9], 0.0, step=0.25, patience=1, mode="max")
    np.testing.assert_array_equal(path, [0, 0.25, 0.5, 0.5])
    # The same where the window before at this level was worse: up, and not down.
    path = run_plateau([1, 0.9, 0.8, 1], 0.0, step=0.25, patience=1, mode="max")
    np.testing.assert_array_equal(path, [0, 0.25, 0.25, 0.5])


def test_live_edit_of_the_level_neither_recompiles_nor_resets():
    make = optax.inject_hyperparams(scale_by_flood, hyperparam_dtype=jnp.float32)
    optimizer = optax.chain(make(level=0.2), optax.sgd(1.0))
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(optimizer.update, n=1))
    grads, value = jnp.ones(2), jnp.float32(0.5)
    state, signs = optimizer.init(grads), []
    for level in (0.2, 0.7, -np.inf, 0.5):
        state[0].hyperparams["level"] = jnp.float32(level)
        updates, state = update(grads, state, value=value)
        signs.append(float(updates[0]))
    assert signs == [-1, 1, -1, -1]
    assert optax.tree.get(state, "flood_below") == 1
    assert optax.tree.get(state, "flood_step") == 4


# Accordance


def numpy_cosine(a, b):
    a, b = (np.concatenate([np.ravel(x) for x in tree]) for tree in (a, b))
    return (a @ b) / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_gradient_accordance_equals_the_cosine_at_any_scale(scale):
    rng = np.random.default_rng(0)
    a, b = ([rng.normal(size=(3, 2)), rng.normal(size=5)] for _ in range(2))
    b = [x + 0.5 * y for x, y in zip(b, a, strict=True)]
    scaled = [jnp.asarray(x * scale, jnp.float32) for x in a]
    result = levels.gradient_accordance(
        scaled, [jnp.asarray(x, jnp.float32) for x in b]
    )
    np.testing.assert_allclose(result, numpy_cosine(a, b), rtol=1e-6)


def test_gradient_accordance_predicts_what_a_step_does_to_the_other_batch():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4, 3)).astype(np.float32), np.float32([[1, 0, 2, -1]])
    params = {"w": rng.normal(size=3).astype(np.float32), "b": np.float32(0.5)}

    def loss(params, batch):
        return jnp.mean((jnp.tanh(batch @ params["w"]) + params["b"] - y) ** 2)

    @jax.jit
    def slopes():
        grads_a, grads_b = (jax.grad(loss)(params, batch) for batch in x)

        def after(eta):
            stepped = jax.tree.map(lambda p, g: p - eta * g, params, grads_a)
            return loss(stepped, x[1])

        norms = optax.tree.norm(grads_a) * optax.tree.norm(grads_b)
        accordance = levels.gradient_accordance(grads_a, grads_b)
        return jax.grad(after)(0.0), -accordance * norms

    np.testing.assert_allclose(*slopes(), rtol=1e-5)


def test_gradient_accordance_edges():
    ones = {"w": jnp.ones(3), "n": None}
    accordance = levels.gradient_accordance
    assert accordance(ones, {"w": jnp.zeros(3), "n": None}) == 0
    assert accordance({"w": jnp.zeros(3), "n": None}, ones) == 0
    assert np.isnan(accordance(ones, {"w": jnp.array([1, jnp.nan, 0]), "n": None}))
    assert np.isnan(accordance(ones, {"w": jnp.array([1, jnp.inf, 0]), "n": None}))
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ones)
    assert accordance(halves, ones).dtype == jnp.float32
    np.testing.assert_allclose(accordance(halves, ones), 1.0, rtol=1e-6)
    # <a, b> of complex gradients is Re(conj(a) b): i and 1 are at right angles
    np.testing.assert_allclose(accordance(jnp.array([1j, 2]), jnp.array([1.0, 2])), 0.8)
    steps = {"w": jnp.ones(3), "step": jnp.int32(7)}
    np.testing.assert_allclose(accordance(steps, steps), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("accordances", "threshold", "expected"),
    [
        ([0.5, 0.1, -0.1, 0.3, -0.5], 0.0, 0.7),
        ([0.5, 0.1, 0.0, 0.3, 0.2], 0.0, -np.inf),
        ([0.5, 0.1, 0.2, 0.3, 0.2], 0.15, 0.8),
        ([-0.5, 0.1, -0.2, 0.3, 0.2], 0.0, 0.9),
        ([np.nan, 0.1, np.nan, 0.3, -0.2], 0.0, 0.5),
    ],
    ids=["first", "none", "threshold", "at_once", "nan"],
)
@pytest.mark.parametrize("compile_", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_accordance_level_is_the_loss_where_accordance_breaks_down(
    compile_, accordances, threshold, expected
):
    losses = jnp.array([0.9, 0.8, 0.7, 0.6, 0.5])
    find = compile_(functools.partial(levels.accordance_level, threshold=threshold))
    assert find(losses, jnp.array(accordances)) == np.float32(expected)


# Bad input

LOSSES = jnp.array([0.1, 0.4])
BAD = {
    "adaflood_nan": (
        lambda: levels.adaflood(jnp.array([0.1, jnp.nan]), 0.5),
        ValueError,
        "`adaflood(held_out_loss)` must not be NaN, got 1 of 2 entries: the model of",
    ),
    "adaflood_integers": (
        lambda: levels.adaflood(jnp.arange(3), 0.5),
        TypeError,
        "`adaflood(held_out_loss)` must be of a real float dtype, got int32.",
    ),
    "adaflood_gamma": (
        lambda: levels.adaflood(LOSSES, 1.5),
        ValueError,
        "`adaflood(gamma=...)` must be in [0, 1], got 1.5.",
    ),
    "adaflood_gamma_nan": (
        lambda: levels.adaflood(LOSSES, jnp.float32(jnp.nan)),
        ValueError,
        "`adaflood(gamma=...)` must be in [0, 1], got nan.",
    ),
    "adaflood_gamma_vector": (
        lambda: levels.adaflood(LOSSES, jnp.array([0.1, 0.2])),
        ValueError,
        "`adaflood(gamma=...)` must be a scalar, got shape (2,).",
    ),
    "adaflood_gamma_text": (
        lambda: levels.adaflood(LOSSES, "0.5"),
        TypeError,
        "`adaflood(gamma=...)` must be a real number, got '0.5'.",
    ),
    "adaflood_alpha": (
        lambda: levels.adaflood(LOSSES, 0.5, alpha=np.inf),
        ValueError,
        "`adaflood(alpha=...)` must be finite, got inf.",
    ),
    "adaflood_beta": (
        lambda: levels.adaflood(LOSSES, 0.5, beta=None),
        TypeError,
        "`adaflood(beta=...)` must be a real number, got None.",
    ),
    "folds_one": (
        lambda: hold_out(num_folds=1),
        ValueError,
        "`held_out_losses(num_folds=...)` must be at least 2, got 1.",
    ),
    "folds_float": (
        lambda: hold_out(num_folds=2.0),
        TypeError,
        "`held_out_losses(num_folds=...)` must be an int, got 2.0.",
    ),
    "examples_one": (
        lambda: hold_out(num_examples=1),
        ValueError,
        "`held_out_losses(num_examples=...)` must be at least 2, got 1.",
    ),
    "folds_too_many": (
        lambda: hold_out(num_folds=7),
        ValueError,
        "`held_out_losses(num_folds=..., vmap=False)` must be at most num_examples, "
        "6, got 7.",
    ),
    "folds_uneven": (
        lambda: hold_out(num_folds=4, vmap=True),
        ValueError,
        "`held_out_losses(num_folds=..., vmap=True)` must divide num_examples, 6, "
        "got 4.",
    ),
    "losses_mean": (
        lambda: hold_out(evaluate=lambda model, indices: jnp.float32(0.5)),
        ValueError,
        "`held_out_losses(evaluate)` must return one loss per index, shape (3,), "
        "got ().",
    ),
    "losses_integers": (
        lambda: hold_out(evaluate=lambda model, indices: indices),
        TypeError,
        "`held_out_losses(evaluate)'s losses` must be of a real float dtype, got int32",
    ),
    "wavebound_epsilon": (
        lambda: levels.wavebound(LOSSES, -0.1),
        ValueError,
        "`wavebound(epsilon=...)` must be non-negative and finite, got -0.1.",
    ),
    "wavebound_shape": (
        lambda: levels.wavebound(LOSSES, jnp.ones(3)),
        ValueError,
        "`wavebound(epsilon=...)` must broadcast to the shape (2,) of the losses",
    ),
    "entropy_scalar": (
        lambda: levels.entropy_floor(1.0),
        ValueError,
        "`entropy_floor(target_probs)` must have an axis of classes.",
    ),
    "entropy_logits": (
        lambda: levels.entropy_floor(jnp.array([-1.0, 2.0])),
        ValueError,
        "`entropy_floor(target_probs)` must be rows of probabilities, got numbers from "
        "-1.0 and sums from 1.0 to 1.0.",
    ),
    "entropy_sum": (
        lambda: levels.entropy_floor(jnp.array([[0.5, 0.5], [0.5, 0.75]])),
        ValueError,
        "must be rows of probabilities, got numbers from 0.5 and sums from 1.0 to 1.25",
    ),
    "plateau_step": (
        lambda: plateau(step=0.0),
        ValueError,
        "`on_plateau(step=...)` must be positive, got 0.0.",
    ),
    "plateau_patience": (
        lambda: plateau(patience=0),
        ValueError,
        "`on_plateau(patience=...)` must be at least 1, got 0.",
    ),
    "plateau_initial": (
        lambda: plateau(initial=0.7),
        ValueError,
        "`on_plateau(initial=...)` must be finite and in [0.0, 0.5], got 0.7.",
    ),
    "plateau_initial_off": (
        lambda: plateau(initial=-np.inf),
        ValueError,
        "`on_plateau(initial=...)` must be finite and in [0.0, 0.5], got -inf.",
    ),
    "plateau_minimum": (
        lambda: plateau(minimum=-np.inf),
        ValueError,
        "`on_plateau(minimum=...)` must be finite, got -inf.",
    ),
    "plateau_mode": (
        lambda: plateau(mode="higher"),
        ValueError,
        '`on_plateau(mode=...)` must be "max" or "min", got \'higher\'.',
    ),
    "plateau_metric": (
        lambda: plateau()[1](plateau()[0](), LOSSES),
        ValueError,
        "`on_plateau().update(metric)` must be a scalar, got shape (2,).",
    ),
    "accordance_structure": (
        lambda: levels.gradient_accordance({"a": LOSSES}, {"b": LOSSES}),
        ValueError,
        "`gradient_accordance(grads_a, grads_b)` must be trees of floats of one "
        "structure and shapes, got {'a': (2,)} and {'b': (2,)}.",
    ),
    "accordance_shapes": (
        lambda: levels.gradient_accordance([LOSSES], [LOSSES[:1]]),
        ValueError,
        "structure and shapes, got [(2,)] and [(1,)].",
    ),
    "accordance_empty": (
        lambda: levels.gradient_accordance([], []),
        ValueError,
        "`gradient_accordance(grads_a, grads_b)` must be trees of floats",
    ),
    "accordance_level_shapes": (
        lambda: levels.accordance_level(LOSSES, LOSSES[:1]),
        ValueError,
        "`accordance_level(losses, accordances)` must be of one shape [epochs], got "
        "(2,) and (1,).",
    ),
    "accordance_level_threshold": (
        lambda: levels.accordance_level(LOSSES, LOSSES, threshold=np.nan),
        ValueError,
        "`accordance_level(threshold=...)` must not be NaN, got nan.",
    ),
}


def hold_out(
    num_examples=6,
    num_folds=2,
    vmap=False,
    evaluate=lambda model, indices: jnp.ones(indices.shape),
):
    return levels.held_out_losses(
        lambda indices, key: (),
        evaluate,
        num_examples,
        num_folds=num_folds,
        key=jax.random.key(0),
        vmap=vmap,
    )


def plateau(**changes):
    given = {"initial": 0.1, "step": 0.1, "patience": 2, "maximum": 0.5, "mode": "max"}
    arguments = given | changes
    return levels.on_plateau(arguments.pop("initial"), **arguments)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_its_message(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
