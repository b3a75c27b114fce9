"""The rivals: each step against an independent one, the choice, and the standings."""

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import record, rivals
from benchmarks.rivals import findings, methods, problems, settings, training
from benchmarks.rivals.methods import METHODS, Recipe

CONSTANTS = settings.Constants(checks=3, average=0.5)
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def wine():
    problem = problems.problem("wine")
    size = problem.size._replace(steps=9, seeds=2)
    return settings.Problem(
        "wine", size, problem.classes, problems.MLP(3, widths=(5, 4)), problem.draw
    )


def fit_of(problem, method, **recipe):
    recipe = Recipe(flips=0.2, **recipe)
    sets = problem.draw(KEY, jnp.float32(recipe.flips))
    fit = training.Fit(problem, METHODS[method], recipe, CONSTANTS, sets)
    params = problem.network.init(jax.random.key(1), sets.train[0][:1])
    now = training.Now(jnp.array([4, 0, 7, 9]), jax.random.key(5), jnp.float32(0))
    return fit, params, now


def probabilities(fit, params, now):
    x, y = (np.asarray(array)[np.asarray(now.batch)] for array in fit.sets.train)
    logits = np.asarray(fit.problem.network.logits(params, x), np.float64)
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True), y


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.37])
@pytest.mark.parametrize("shape", [(41,), (6, 7)])
def test_flip_changes_an_exact_share_evenly(rate, shape):
    labels = jnp.arange(np.prod(shape)).reshape(shape) % 4
    flip = jax.jit(settings.flip, static_argnums=3)
    keys = jax.random.split(jax.random.key(2), 300)
    flipped = np.stack([flip(key, labels, rate, 4) for key in keys])
    changed = flipped != np.asarray(labels)
    assert set(changed.reshape(300, -1).sum(-1)) == {round(rate * labels.size)}
    assert flipped.min() >= 0
    assert flipped.max() < 4
    if rate:
        shifts = np.bincount((flipped - np.asarray(labels))[changed] % 4, minlength=4)
        # three equally likely shifts: six standard deviations of a binomial
        expected = changed.sum() / 3
        assert shifts[0] == 0
        assert np.all(abs(shifts[1:] - expected) < 6 * expected**0.5)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("flips", [0.0, 0.2, 0.4])
def test_every_method_has_the_same_budget_of_runs(flips, classes):
    constants = settings.Constants()
    for name, method in METHODS.items():
        recipes = method.recipes(constants, flips, classes)
        assert len(recipes) == 8, name
        # at no flips there is nothing to correct and no noise to float above
        if flips or not method.knows_rate:
            assert len(set(recipes)) == 8, name
        for recipe in recipes:
            assert recipe.flips == flips
            floods = recipe.level > methods.OFF or method.kind == "adaflood"
            assert floods == method.flooded
            assert method.knows_rate or recipe.assumed == 0
            assert (recipe.band > 0) <= (recipe.band == 0.2 * recipe.level)


def test_corrected_loss_is_that_of_the_noisy_probabilities(wine):
    fit, params, now = fit_of(wine, "forward", assumed=0.3)
    probs, y = probabilities(fit, params, now)
    matrix = np.full((3, 3), 0.15)
    np.fill_diagonal(matrix, 0.7)
    expected = -np.log((probs @ matrix)[np.arange(4), y]).mean()
    assert fit.objective(params, now) == pytest.approx(expected, rel=1e-6)


def test_smoothed_loss_is_the_cross_entropy_of_smoothed_labels(wine):
    fit, params, now = fit_of(wine, "smoothing", smoothing=0.4)
    probs, y = probabilities(fit, params, now)
    targets = np.eye(3)[y] * 0.6 + 0.4 / 3
    expected = -(targets * np.log(probs)).sum(-1).mean()
    assert fit.objective(params, now) == pytest.approx(expected, rel=1e-6)


def test_mixup_is_the_mean_of_two_losses_on_mixed_inputs(wine):
    fit, params, now = fit_of(wine, "mixup", strength=0.7)
    part_key, order_key = jax.random.split(now.key)
    part = float(jax.random.beta(part_key, 0.7, 0.7))
    order = np.asarray(jax.random.permutation(order_key, 4))
    assert 0.02 < part < 0.98
    assert set(order) == {0, 1, 2, 3}
    x, y = (np.asarray(array)[np.asarray(now.batch)] for array in fit.sets.train)
    mixed = part * x + (1 - part) * x[order]
    logits = fit.problem.network.logits(params, jnp.asarray(mixed))
    logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    rows = np.arange(4)
    expected = -(part * logs[rows, y] + (1 - part) * logs[rows, y[order]]).mean()
    assert fit.objective(params, now) == pytest.approx(expected, rel=1e-6)


def test_dropout_drops_its_share_in_training_alone(wine):
    fit, params, now = fit_of(wine, "dropout", strength=0.25)
    x = fit.sets.train[0]
    seen = []

    class Spy:
        def logits(self, params, x, drop):
            seen.append(drop(jnp.ones((1000, 50)), 0))
            seen.append(drop(jnp.ones((1000, 50)), 1))
            return wine.network.logits(params, x, drop)

    fit.problem = settings.Problem("wine", wine.size, 3, Spy(), wine.draw)
    fit.logits(params, x, now.key)
    assert np.any(seen[0] != seen[1])
    for mask in seen:
        assert set(np.unique(mask)) == {0, np.float32(1 / 0.75)}
        # mean 1, standard deviation sqrt(.25 / .75 / 50,000) = .0026; five of them
        assert mask.mean() == pytest.approx(1, abs=0.013)
    fit.problem = wine
    assert np.array_equal(fit.logits(params, x), wine.network.logits(params, x))


def test_sam_is_the_step_of_optax(wine):
    fit, params, now = fit_of(wine, "sam", strength=0.3, rate=0.01)
    ours = fit.optimizer()
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    adam = optax.adamw(0.01, weight_decay=0.0)
    theirs = optax.contrib.sam(adam, ascent, opaque_mode=True)
    run = training.Run(params, ours.init(params), params, jnp.int32(0))
    other, state = params, theirs.init(params)
    for step in range(3):
        at = now._replace(batch=now.batch + step)
        grads, value = fit.gradient(run, at)
        raw, plain = fit.raw(run.params, at)
        assert value == raw
        updates, kept = ours.update(grads, run.state, run.params, value=value)
        run = run._replace(params=optax.apply_updates(run.params, updates), state=kept)
        plain = fit.raw(other, at)[1]
        updates, state = theirs.update(
            plain, state, other, grad_fn=lambda p, _, at=at: fit.raw(p, at)[1]
        )
        other = optax.apply_updates(other, updates)
    jax.tree.map(
        # Adam's first steps divide by |g|: rounding of the tiniest gradients grows
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        run.params,
        other,
    )


def test_momentum_sam_takes_the_gradient_a_radius_against_the_momentum(wine):
    fit, params, now = fit_of(wine, "msam", strength=0.3)
    optimizer = fit.optimizer()
    state = optimizer.init(params)
    run = training.Run(params, state, params, jnp.int32(0))
    grads, value = fit.gradient(run, now)
    assert value == fit.raw(params, now)[0]  # no momentum yet
    updates, state = optimizer.update(grads, state, params, value=value)
    run = run._replace(params=optax.apply_updates(params, updates), state=state)
    momentum = jax.tree.map(lambda g: 0.1 * np.asarray(g, np.float64), grads)
    length = np.sqrt(sum((m**2).sum() for m in jax.tree.leaves(momentum)))
    at = jax.tree.map(lambda p, m: p - 0.3 * m / length, run.params, momentum)
    expected = fit.raw(jax.tree.map(jnp.float32, at), now)
    grads, value = fit.gradient(run, now)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        grads,
        expected[1],
    )


def test_run_reads_off_the_last_the_averaged_and_the_best_weights(wine):
    recipes = [Recipe(0.2, 0.003), Recipe(0.2, 0.1, level=1.0, band=0.05)]
    train = training.trainer(wine, METHODS["band"], recipes, CONSTANTS)
    found = jax.jit(train)(jnp.float32(1), KEY)
    # by hand: the same data, start and batches, and optax step by step
    keys = jax.random.split(KEY, 5)
    sets = wine.draw(keys[0], jnp.float32(0.2))
    params = wine.network.init(keys[1], sets.train[0][:1])
    per_epoch = wine.size.train // wine.size.batch
    order = np.concatenate(
        [
            np.asarray(jax.random.permutation(key, wine.size.train)).reshape(
                per_epoch, -1
            )
            for key in jax.random.split(keys[2], -(-9 // per_epoch))
        ]
    )[:9]
    adam, up = optax.adam(0.1), False
    state, seen, checks = adam.init(params), [], []

    def loss_fn(params, x, y):
        logits = wine.network.logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    average = params
    for step, batch in enumerate(order):
        at = (params, sets.train[0][batch], sets.train[1][batch])
        value, grads = jax.value_and_grad(loss_fn)(*at)
        up = bool(value < (1.05 if up else 0.95))
        seen.append(up)
        sign = -1.0 if up else 1.0
        grads = jax.tree.map(lambda g, sign=sign: sign * g, grads)
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        pace = max(0.5, 1 / (step + 1))
        average = jax.tree.map(lambda a, p, w=pace: a + w * (p - a), average, params)
        if step % 3 == 2:
            checks.append((params, average))
    assert len(set(seen)) == 2  # it went down and up

    def read(params):
        reached = []
        for x, y in (sets.validation, sets.test):
            logits = np.asarray(wine.network.logits(params, x), np.float64)
            logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            loss = -logs[np.arange(len(y)), np.asarray(y)].mean()
            reached.append(((logits.argmax(-1) == np.asarray(y)).mean(), loss))
        (valid, valid_loss), (accuracy, loss) = reached
        return [valid - 1e-6 * valid_loss, accuracy, loss]

    for readout in (0, 1):
        every = [read(check[readout]) for check in checks]
        last, best = every[-1], max(every, key=lambda one: one[0])
        for stop, expected in (("last", last), ("best", best)):
            np.testing.assert_allclose(
                found[stop][readout, :3], expected, rtol=2e-4, atol=1e-6
            )


def test_choice_is_by_validation_and_ignores_what_diverged():
    reached = np.zeros((3, 2, 2, 4))  # runs, seeds, readouts, columns
    reached[..., 0] = [[[0.5, 0.4], [0.1, 0.2]], [[0.3, 0.6], [0.2, 0.1]], [[0, 0]] * 2]
    reached[2, 0, 0, 0] = np.nan
    reached[..., 1] = np.arange(12).reshape(3, 2, 2) / 100
    either = rivals.choice(reached)
    assert either["run"] == [1, 0]  # ties to the first
    assert either["accuracies"] == [5.0, 3.0]
    last = rivals.choice(reached[:, :, :1])
    assert last["run"] == [0, 1]
    assert last["accuracies"] == [0.0, 6.0]


def made_up():
    """Two settings with flips and one without: ahead, behind, and a tie."""
    about = {
        "plain": {"flooded": False},
        "sam": {"flooded": False},
        "adaflood": {"flooded": True},
        "flooding": {"flooded": True},
        "band": {"flooded": True},
    }
    for name, one in about.items():
        one |= {"title": METHODS[name].title, "cost": 1.0, "knows_rate": False}
    reached = {  # by setting: the accuracies at the end, by seed
        ("digits", 0.0): {"plain": [90, 92], "flooding": [80, 81], "band": [89, 93]},
        ("digits", 0.2): {"plain": [70, 72], "sam": [80, 81], "band": [90.2, 91]},
        ("wine", 0.4): {"adaflood": [60, 62], "flooding": [50, 52.2], "plain": [1, 2]},
    }
    rows = []
    for (problem, flips), methods_ in reached.items():
        for method in about:
            accuracies = methods_.get(method, [0.0, 0.5])
            lower = [a - 5 for a in accuracies]
            entry = {"run": [0, 0], "losses": [0.5, 0.7], "ece": 0.1}
            entries = {
                f"{stop}/{readout}": entry | {"accuracies": values}
                for stop, values in (("last", accuracies), ("best", lower))
                for readout in ("last", "averaged", "either")
            }
            rows.append(
                {
                    "problem": problem,
                    "flips": flips,
                    "method": method,
                    "entries": entries,
                }
            )
    return {"methods": about, "rows": rows, "protocol": {"runs": 8}}


def test_standings_count_paired_intervals_beside_the_best_rival():
    payload = made_up()
    # digits 20 %: +10.2 and +10, of which the interval is far above 0;
    # wine: -10 and -9.8; digits 0 %: -1 and +1, an interval that holds 0
    assert findings.standing(payload, "all", noisy=True)[:3] == (1, 0, 1)
    assert findings.standing(payload, "all", noisy=False)[:3] == (0, 1, 0)
    assert findings.standing(payload, "paper", noisy=True)[:3] == (0, 0, 2)
    # stopped early all have five points less, so the same differences
    stopped = findings.standing(payload, "all", noisy=True, when=["best/either"])
    assert stopped[:4] == (1, 0, 1, pytest.approx((10.1 - 9.9) / 2))
    # averaged at the end the band has what it has: +10.1 on digits, -61 on wine
    assert findings.standing(payload, "fixed", noisy=True)[:3] == (1, 0, 1)
    found = findings.numbers(payload)
    assert found["all/noisy/settings"] == 2
    assert found["band/last/either/20%/gain"] == pytest.approx(90.6 - 71)
    assert found["settings"] == 3
    assert found["rivals"] == 3  # AdaFlood is others' work
    # what a band adds to plain training: 20.2 and 19 on digits, -1 and -1.5 on wine
    assert found["added/plain/last/either/mean"] == pytest.approx((19.6 - 1.25) / 2)
    assert found["added/plain/last/either/ahead"] == 1
    assert found["added/plain/last/either/behind"] == 0
    table = findings.summary_table(payload)
    assert "SAM, at the end: 80.5" in table
    assert "flooding in a band, at the end: 90.6" in table
    assert "| +10.1 ± 1.3 | ahead |" in table
    payload["environment"] = dict.fromkeys(
        ("commit", "dirty", "command", "jax", "optax", "cpu_count", "cpu")
    )
    assert all(made.startswith("| ") for made in findings.tables(payload).values())


def test_resumed_study_reads_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    small = settings.SIZES["wine"]._replace(steps=4, seeds=1)
    monkeypatch.setitem(settings.SIZES, "wine", small)
    parser = record.arguments("rivals", rivals.__doc__)
    rivals.options(parser)
    words = ["--problems", "wine", "--methods", "plain", "flooding"]
    args = parser.parse_args([*words, "--work", str(tmp_path), "--workers", "1"])
    monkeypatch.setattr(rivals, "Constants", lambda: settings.SMOKE)
    first = rivals.measure(args)
    kept = {path.name: path.read_text() for path in tmp_path.glob("*.jsonl")}
    assert set(kept) == {"wine-plain.jsonl", "wine-flooding.jsonl"}
    again = rivals.measure(args)
    assert json.dumps(again) == json.dumps(first)
    assert {p.name: p.read_text() for p in tmp_path.glob("*.jsonl")} == kept
    late = rivals.measure(argparse.Namespace(**vars(args) | {"minutes": 1e-9}))
    assert late["protocol"]["missing"] == {"wine": "out of time"}
    assert late["rows"] == []
