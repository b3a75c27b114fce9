"""Noise and the attack are drawn and scored as stated, a run is a loop in Python."""

import argparse
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import membership, networks, pools
from benchmarks.choosing import noise, other_noise
from benchmarks.choosing.noise import Noise
from benchmarks.choosing.other_noise import Constants, Ends, Recipe, Seen

TINY, SMALL = membership.SMOKE["digits"], Constants(widths=(8,), steps=24)


def batches_of(key, size, steps):
    """Permutations of each epoch, one after another, in batches of 10."""
    epochs = jax.random.split(key, -(-steps // (size // 10)))
    made = [np.asarray(jax.random.permutation(k, size)) for k in epochs]
    return np.concatenate(made).reshape(-1, 10)[:steps]


def loop(params, batches, objective, *, rate, level, half, decay=0.0, see=None):
    """Adam, the sign within a band by hand, and the average of the weights."""
    adam, average, sign, signs = optax.adam(rate), params, 1, set()
    state = adam.init(params)

    @jax.jit
    def step(params, state, average, grads, sign):
        grads = jax.tree.map(lambda g, p: sign * g + decay * p, grads, params)
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.98 * a + 0.02 * p, average, params)
        return params, state, average

    for number, at in enumerate(batches, 1):
        loss, grads = objective(params, at)
        sign = 1 if loss >= level + half else -1 if loss < level - half else sign
        signs.add(sign)
        params, state, average = step(params, state, average, grads, sign)
        if see:
            see(number, params)
    return params, average, signs


def cross_entropy(logits, labels):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels].mean()


def twice(study, args, runs, monkeypatch):
    """What a study finds; a second start must not run again what is kept."""
    payload = study.measure(args)
    monkeypatch.setattr(study, runs, lambda *_: pytest.fail("again"))
    assert study.measure(args) == payload
    about = dict.fromkeys(("command", "dirty", "jax", "optax", "cpu", "cpu_count"))
    return {**payload, "environment": about | {"commit": "0" * 40}}


# Noise


def test_a_teacher_gives_the_labels_of_ridge_regression_on_examples_of_its_own():
    drawn = noise.drawing("wine", Noise("teacher", taught=6))(jax.random.key(4))
    pool_x, pool_y = (np.asarray(part) for part in pools.load("wine"))
    rows = {row.tobytes(): i for i, row in enumerate(pool_x)}
    parts = [np.asarray(part[0]) for part in drawn.sets]
    used = [rows[row.tobytes()] for part in parts for row in part]
    assert len(set(used)) == len(used) == sum(noise.SIZES["wine"])
    # The teacher's examples follow in the same permutation of the pool.
    order = np.asarray(
        jax.random.permutation(jax.random.split(jax.random.key(4), 3)[0], 178)
    )
    assert order[: len(used)].tolist() == used
    taught = order[len(used) : len(used) + 6]
    ones = np.column_stack([pool_x, np.ones(178)]).astype(np.float64)
    own, target = ones[taught], np.eye(3)[pool_y[taught]]
    dual = own.T @ np.linalg.solve(own @ own.T + np.eye(6), target)  # the other form
    said = (ones @ dual).argmax(1)
    assert np.asarray(drawn.sets.train[1]).tolist() == said[used[:50]].tolist()
    assert np.asarray(drawn.sets.validation[1]).tolist() == said[used[50:100]].tolist()
    assert np.asarray(drawn.sets.test[1]).tolist() == pool_y[used[100:]].tolist()
    assert float(drawn.wrong) == pytest.approx((said != pool_y)[used[:50]].mean())


def test_noise_by_class_moves_each_class_at_its_rate_and_has_its_entropy():
    one = Noise("class", 0.2)
    labels = jnp.arange(30_000) % 3
    moved = noise.by_class(jax.random.key(0), labels, one, 3)
    shares = [float((moved != labels)[labels == i].mean()) for i in range(3)]
    assert shares == pytest.approx([0.0, 0.2, 0.4], abs=0.015)  # 4 sd of a share
    assert set(np.unique((moved - labels) % 3)) == {0, 1}
    given = np.bincount(np.asarray(moved)) / len(labels)

    def entropy(rate):
        return -sum(p * math.log(p) for p in (rate, 1 - rate) if p)

    level = noise.known_level(one, 0.0, np.asarray(moved), 3)
    assert level == pytest.approx(
        np.mean([entropy(s) for s in (0.0, 0.2, 0.4)]), abs=0.01
    )
    assert given[0] > 0.4  # it would be off, weighed by how frequent the labels are
    even = noise.known_level(Noise("even", 0.2), 0.2, None, 3)
    assert even == pytest.approx(entropy(0.2) + 0.2 * math.log(2), rel=1e-5)


def test_a_run_with_a_band_is_an_explicit_loop():
    sets = noise.drawing("wine", Noise("even", 0.4))(jax.random.key(1)).sets
    key, level, band, decay = jax.random.key(2), 1.05, 0.02, 0.01
    fields = ([-math.inf, level], [0.0, band], [0.0, decay])
    tried = Recipe(*(jnp.array(field)[None] for field in fields))
    stacked = jax.tree.map(lambda a: a[None], sets)
    ends = other_noise.Trainer(3, 10, SMALL).run(stacked, key[None], tried)

    net = networks.MLP((8,), 3)
    start, order = jax.random.split(key)
    x, y = sets.train
    best = [(-1.0, 0.0)]

    def reached(params):
        return tuple(
            float((net.apply(params, part[0]).argmax(1) == part[1]).mean())
            for part in (sets.validation, sets.test)
        )

    def see(number, params):
        if number % other_noise.EVERY == 0:
            best.append(max(best[-1], reached(params), key=lambda one: one[0]))

    last, average, signs = loop(
        net.init(start, x),
        batches_of(order, 50, 24),
        jax.jit(
            jax.value_and_grad(lambda p, at: cross_entropy(net.apply(p, x[at]), y[at]))
        ),
        rate=SMALL.adam,
        level=level,
        half=band,
        decay=decay,
        see=see,
    )
    assert len(signs) == 2
    for seen, due in zip(
        ends, (reached(last), reached(average), best[-1]), strict=True
    ):
        assert [float(value[0, 1]) for value in seen] == pytest.approx(due)
    assert float(ends.last.test[0, 0]) != float(ends.last.test[0, 1])


def test_rules_read_the_runs_that_they_name():
    valid = np.array([[0.5, 0.1, 0.2, 0.3, 0.4, 0.9, 0.6, 0.1, 0.2, 0.7]])
    test = np.arange(10.0)[None]
    found = other_noise.rules(Ends(*(Seen(valid, test + 10 * i) for i in range(3))))
    assert {rule: float(value[0]) for rule, value in found.items()} == {
        "plain": 0,
        "average": 10,
        "early": 20,
        "decay": 9,
        "decay_average": 19,
        "grid": 5,
        "grid_average": 15,
        "known": 1,
        "known_average": 11,
        "known_band": 12,
        "estimated": 3,
        "estimated_average": 13,
        "estimated_band": 14,
    }


def test_smoke_run_of_other_noise_makes_its_tables(tmp_path, monkeypatch):
    args = argparse.Namespace(smoke=True, out=tmp_path, work=tmp_path)
    payload = twice(other_noise, args, "measure_setting", monkeypatch)
    made = other_noise.tables(payload)
    assert "by a weak teacher (1 settings)" in made["choosing-noise"]
    assert "| wine, 10 | a teacher of 6 |" in made["choosing-noise-settings"]
    of = payload["noise"][0]["rules"]
    known, averaged, plain = (
        np.mean(of[rule]) for rule in ("known", "known_average", "plain")
    )
    assert (
        f"share known, last weights | {known - plain:+.1f} |" in made["choosing-noise"]
    )
    assert f"known: {averaged - known:+.1f} on mini-batches." in made["choosing-noise"]


# Membership


@pytest.fixture(scope="module")
def data():
    return membership.draw("digits", TINY, jax.random.key(3))


def test_candidates_are_shared_out_and_canaries_are_wrong(data):
    times = np.bincount(np.asarray(data.members).ravel(), minlength=40)
    assert times.tolist() == [2] * 40
    assert all(len(set(row)) == 20 for row in np.asarray(data.members).tolist())
    pool_x, pool_y = (np.asarray(part) for part in pools.load("digits"))
    true = {row.tobytes(): label for row, label in zip(pool_x, pool_y, strict=True)}
    right = [true[np.asarray(row).tobytes()] for row in data.x] == np.asarray(data.y)
    assert right.tolist() == [False] * 8 + [True] * 32
    own, test = (
        {np.asarray(r).tobytes() for r in part} for part in (data.x, data.test_x)
    )
    assert not own & test


def test_scores_are_likelihood_ratios_of_the_other_models():
    rng = np.random.default_rng(0)
    inside = (
        np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]]) > 0
    )
    seen = rng.normal(size=inside.shape) + 2 * inside
    found = membership.scores(seen, inside)
    for target in range(6):
        others = [m for m in range(6) if m != target]
        logs = []
        for part in (True, False):
            groups = [
                [seen[m, i] for m in others if inside[m, i] == part] for i in range(3)
            ]
            off = sum(((np.array(g) - np.mean(g)) ** 2).sum() for g in groups)
            sd = (off / sum(len(g) - 1 for g in groups)) ** 0.5
            logs.append(
                [
                    stats.norm.logpdf(seen[target, i], np.mean(g), sd)
                    for i, g in enumerate(groups)
                ]
            )
        np.testing.assert_allclose(found[target], np.subtract(*logs), rtol=1e-10)


def test_members_are_counted_above_all_but_a_hundredth_of_the_others():
    others, members = np.arange(200.0), np.array([150.0, 197.0, 197.5, 198.5, 900.0])
    score = np.concatenate([others, members])
    inside = np.arange(205) >= 200
    # 1% of 200 may be above: the third highest, 197, is the threshold.
    assert membership.true_positives(score, inside) == 3 / 5
    pairs = np.mean([(m > others).mean() + (m == others).mean() / 2 for m in members])
    assert membership.auc(score, inside) == pytest.approx(pairs)
    loss = jnp.array([0.1, 2.0])
    odds = np.exp(-loss) / (1 - np.exp(-loss))
    np.testing.assert_allclose(membership.confidence(loss), np.log(odds), rtol=1e-5)


@pytest.mark.parametrize(
    "method", ["band", pytest.param("elr", marks=pytest.mark.slow)]
)
def test_a_model_is_an_explicit_loop(data, method):
    keys = jax.random.split(jax.random.key(9), 4)
    c = dataclasses.replace(TINY, adam=0.02, level=2.0, band=0.02)
    found = membership.train(c, method, data, keys)
    net = networks.MLP(c.widths, 10)
    members = np.asarray(data.members[1])
    x, y = data.x[members], data.y[members]
    start, order = jax.random.split(keys[1])
    targets = np.zeros((20, 10))

    probs_of = jax.jit(lambda params, at: jax.nn.softmax(net.apply(params, x[at])))

    @jax.jit
    @jax.value_and_grad
    def loss_fn(params, at, targets):
        logits = net.apply(params, x[at])
        agreed = (jax.nn.softmax(logits) * targets).sum(1)
        pull = 3 * jnp.log(1 - agreed).mean() if method == "elr" else 0.0
        return cross_entropy(logits, y[at]) + pull

    def objective(params, at):
        targets[at] = 0.7 * targets[at] + 0.3 * np.asarray(probs_of(params, at))
        return loss_fn(params, at, targets[at])

    level = 2.0 if method == "band" else -math.inf
    batches = batches_of(order, 20, 12)
    params = net.init(start, x)
    _, average, signs = loop(
        params, batches, objective, rate=c.adam, level=level, half=0.04
    )
    assert len(signs) == (2 if method == "band" else 1)
    probs = np.asarray(jax.nn.softmax(net.apply(average, data.x)), np.float64)
    own = probs[np.arange(40), np.asarray(data.y)]
    np.testing.assert_allclose(found.confidence[1], np.log(own / (1 - own)), atol=2e-4)
    right = (net.apply(average, data.test_x).argmax(1) == data.test_y).mean()
    assert float(found.accuracy[1]) == pytest.approx(float(right))


def test_smoke_run_of_membership_makes_its_tables(tmp_path, monkeypatch):
    args = argparse.Namespace(smoke=True, out=tmp_path, work=tmp_path, draws=2)
    tried = ("plain", "early", "relax", "flood")
    methods = {m: membership.METHODS[m] for m in tried}
    monkeypatch.setattr(membership, "METHODS", methods)
    payload = twice(membership, args, "train", monkeypatch)
    made = membership.tables(payload)
    assert "| RelaxLoss |" in made["membership"]
    found = {row["method"]: np.mean(row["canaries"]) for row in payload["rows"]}
    less = made["membership-less"].splitlines()[2]
    assert less.startswith(
        f"| digits | flooding | {found['flood'] - found['relax']:+.2f} ± "
    )
    assert f"| {found['flood'] - found['early']:+.2f} ± " in less
