"""Noise by class and by a teacher is drawn as stated, and a run is an explicit loop."""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import networks, pools
from benchmarks.choosing import noise, other_noise
from benchmarks.choosing.noise import Noise
from benchmarks.choosing.other_noise import Constants, Ends, Recipe, Seen

TINY = Constants(widths=(8,), steps=24)


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
    drawn = noise.drawing("wine", Noise("even", 0.4))(jax.random.key(1))
    sets = drawn.sets
    trainer = other_noise.Trainer(3, 10, TINY)
    key, level, band, decay = jax.random.key(2), 1.05, 0.02, 0.01
    stacked = jax.tree.map(lambda a: a[None], sets)
    tried = Recipe(
        *(
            jnp.array([[-math.inf, level], [0, band], [0, decay]][i])[None]
            for i in range(3)
        )
    )
    ends = trainer.run(stacked, key[None], tried)

    net = networks.MLP((8,), 3)
    start, order = jax.random.split(key)
    params = net.init(start, sets.train[0])
    average, adam = params, optax.adam(TINY.adam)
    state = adam.init(params)
    epochs = jax.random.split(order, 5)
    batches = np.concatenate(
        [np.asarray(jax.random.permutation(k, 50)).reshape(5, 10) for k in epochs]
    )[:24]
    x, y = sets.train
    sign, best, signs = 1, (-1.0, 0.0), []

    def reached(params):
        return [
            float((net.apply(params, part[0]).argmax(1) == part[1]).mean())
            for part in (sets.validation, sets.test)
        ]

    for number, at in enumerate(batches, 1):

        def loss_fn(params, at=at):
            logits = net.apply(params, x[at])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[at]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        sign = 1 if loss >= level + band else -1 if loss < level - band else sign
        signs.append(sign)
        grads = jax.tree.map(lambda g, p, s=sign: s * g + decay * p, grads, params)
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.98 * a + 0.02 * p, average, params)
        if number % other_noise.EVERY == 0 and reached(params)[0] > best[0]:
            best = tuple(reached(params))
    assert len(set(signs)) == 2
    found = [[float(v[0, 1]) for v in seen] for seen in ends]
    assert found == [
        pytest.approx(reached(params)),
        pytest.approx(reached(average)),
        pytest.approx(best),
    ]
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


def test_the_smoke_run_makes_its_tables_and_keeps_its_settings(tmp_path, monkeypatch):
    args = argparse.Namespace(smoke=True, out=tmp_path, work=tmp_path)
    payload = other_noise.measure(args)
    monkeypatch.setattr(other_noise, "measure_setting", lambda *_: pytest.fail("again"))
    assert other_noise.measure(args) == payload
    environment = {"commit": "0" * 40, "dirty": False, "command": "x", "cpu": "x"}
    environment |= {"cpu_count": 2, "jax": "x", "optax": "x"}
    made = other_noise.tables({**payload, "environment": environment})
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
