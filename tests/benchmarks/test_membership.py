"""The attack's arithmetic is that of its definition, and a model an explicit loop."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import membership, networks, pools

TINY = membership.SMOKE["digits"]


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


@pytest.mark.parametrize("method", ["elr", "band"])
def test_a_model_is_an_explicit_loop(data, method):
    keys = jax.random.split(jax.random.key(9), 4)
    c = dataclasses.replace(TINY, adam=0.02, level=2.0, band=0.02)
    found = membership.train(c, method, data, keys)
    net = networks.MLP(c.widths, 10)
    members = np.asarray(data.members[1])
    x, y = data.x[members], data.y[members]
    start, order = jax.random.split(keys[1])
    params, adam = net.init(start, x), optax.adam(c.adam)
    state, average, targets = adam.init(params), params, np.zeros((20, 10))
    epochs = jax.random.split(order, 6)
    batches = [np.asarray(jax.random.permutation(k, 20)).reshape(2, 10) for k in epochs]
    sign, signs = 1, set()
    for at in np.concatenate(batches):
        probs = np.asarray(jax.nn.softmax(net.apply(params, x[at])))
        targets[at] = 0.7 * targets[at] + 0.3 * probs

        def loss_fn(params, at=at):
            own = targets[at]
            probs = jax.nn.softmax(net.apply(params, x[at]))
            loss = -jnp.log(probs[jnp.arange(10), y[at]]).mean()
            if method == "elr":
                loss += 3 * jnp.log(1 - (probs * own).sum(1)).mean()
            return loss

        loss, grads = jax.value_and_grad(loss_fn)(params)
        if method == "band":
            sign = 1 if loss >= 2.04 else -1 if loss < 1.96 else sign
        signs.add(sign)
        grads = jax.tree.map(lambda g, s=sign: s * g, grads)
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.98 * a + 0.02 * p, average, params)
    assert len(signs) == (2 if method == "band" else 1)
    probs = np.asarray(jax.nn.softmax(net.apply(average, data.x)), np.float64)
    own = probs[np.arange(40), np.asarray(data.y)]
    np.testing.assert_allclose(found.confidence[1], np.log(own / (1 - own)), atol=2e-4)
    right = (net.apply(average, data.test_x).argmax(1) == data.test_y).mean()
    assert float(found.accuracy[1]) == pytest.approx(float(right))


def test_the_smoke_run_makes_its_table_and_keeps_what_is_finished(
    tmp_path, monkeypatch
):
    args = argparse.Namespace(smoke=True, out=tmp_path, work=tmp_path, draws=2)
    monkeypatch.setattr(
        membership,
        "METHODS",
        {m: membership.METHODS[m] for m in ("plain", "early", "relax", "flood")},
    )
    payload = membership.measure(args)
    monkeypatch.setattr(membership, "train", lambda *_: pytest.fail("again"))
    assert membership.measure(args) == payload
    environment = {"commit": "0" * 40, "dirty": False, "command": "x", "cpu": "x"}
    environment |= {"cpu_count": 2, "jax": "x", "optax": "x"}
    made = membership.tables({**payload, "environment": environment})
    assert "| RelaxLoss |" in made["membership"]
    found = {row["method"]: np.mean(row["canaries"]) for row in payload["rows"]}
    less = made["membership-less"].splitlines()[2]
    assert less.startswith(
        f"| digits | flooding | {found['flood'] - found['relax']:+.2f} ± "
    )
    assert f"| {found['flood'] - found['early']:+.2f} ± " in less
