"""The rivals: each step against an independent one, and what a run is read off at."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks.rivals import before, problems, settings, stops, training
from benchmarks.rivals.methods import METHODS, Recipe
from flood_optax import levels

CONSTANTS = settings.Constants(checks=3, average=0.5, probed=5)
KEY = jax.random.key(3)
KNOWN = before.Known(
    jnp.float32(0.2),
    upheld=jnp.ones(60).at[4].set(0),
    confident=jnp.ones(60).at[jnp.array([0, 9])].set(0),
    held_out=jnp.linspace(3, 0.1, 60),
)


@pytest.fixture(scope="module")
def wine():
    size = settings.SIZES["wine"]._replace(steps=9, seeds=2, batch=10)
    problem = problems.problem("wine", size=size)
    object.__setattr__(problem, "network", problems.MLP(3, widths=(5, 4)))
    object.__setattr__(problem, "draw", jax.jit(problem.draw))
    return problem


def fit_of(problem, kind, **recipe):
    sets = problem.draw(KEY, jnp.float32(0.2))
    fit = training.Fit(
        problem, kind, CONSTANTS, Recipe(**recipe), sets=sets, known=KNOWN
    )
    params = jax.jit(problem.network.init)(jax.random.key(1), sets.train[0][:1])
    now = training.Now(jnp.array([4, 0, 7, 9]), jax.random.key(5), jnp.float32(0))
    return fit, params, now


def loss_of(fit, params, now, memory=()):
    return jax.jit(fit.objective)(params, now, memory)[0]


def start_of(fit, params, optimizer):
    state = jax.jit(optimizer.init)(params)
    return training.Run(params, state, params, (), jnp.int32(0))


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


def smoothed(probs, y):
    targets = np.eye(3)[y] * 0.6 + 0.4 / 3
    return -(targets * np.log(probs)).sum(-1).mean()


def corrected(probs, y):
    matrix = np.full((3, 3), 0.15)
    np.fill_diagonal(matrix, 0.7)
    return -np.log((probs @ matrix)[np.arange(4), y]).mean()


def generalised(probs, y):
    return ((1 - probs[np.arange(4), y] ** 0.7) / 0.7).mean()


def without(kept):  # of the batch 4, 0, 7, 9
    return lambda probs, y: -np.log(probs[np.arange(4), y])[kept].mean()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"smoothing": 0.4}, smoothed),
        ({"assumed": 0.3}, corrected),
        ({"exponent": 0.7}, generalised),
        ({"kept": 1.0}, without([1, 2, 3])),
        ({"kept": 2.0}, without([0, 2])),
    ],
    ids=["smoothing", "forward", "generalised", "leave-one-out", "confident"],
)
def test_loss_of_a_method_is_its_formula(recipe, expected, wine):
    fit, params, now = fit_of(wine, "plain", **recipe)
    probs, y = probabilities(fit, params, now)
    assert loss_of(fit, params, now) == pytest.approx(expected(probs, y), rel=2e-6)


def test_early_learning_regularisation_pulls_to_the_running_targets(wine):
    fit, params, now = fit_of(wine, "elr", strength=3.0, memory=0.7)
    probs, y = probabilities(fit, params, now)
    old = np.asarray(jax.random.dirichlet(jax.random.key(8), jnp.ones(3), (60,)))
    run = jax.jit(jax.value_and_grad(fit.objective, has_aux=True))
    (value, memory), grads = run(params, now, jnp.asarray(old))
    targets = 0.7 * old[np.asarray(now.batch)] + 0.3 * probs
    agreement = (targets * probs).sum(-1)
    expected = np.mean(3 * np.log(1 - agreement) - np.log(probs[np.arange(4), y]))
    assert value == pytest.approx(expected, rel=1e-5)
    moved = old.copy()
    moved[np.asarray(now.batch)] = targets
    np.testing.assert_allclose(memory, moved, rtol=1e-5)
    # by the logits: p - y - lambda p (t - <p, t>) / (1 - <p, t>), the targets fixed
    pull = probs * (targets - agreement[:, None]) / (1 - agreement[:, None])
    by_bias = (probs - np.eye(3)[y] - 3 * pull).mean(0)
    last = jax.tree.leaves(grads["params"]["Dense_2"]["bias"])[0]
    np.testing.assert_allclose(last, by_bias, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(fit.targets(), np.zeros((60, 3)))


def test_adaflood_floods_each_example_at_its_own_level(wine):
    fit, params, now = fit_of(wine, "adaflood", strength=0.3)
    probs, y = probabilities(fit, params, now)
    losses = -np.log(probs[np.arange(4), y])
    held_out = np.asarray(KNOWN.held_out, np.float64)[np.asarray(now.batch)]
    theta = -np.log(0.7 * np.exp(-held_out) + 0.3)
    expected = (np.abs(losses - theta) + theta).mean()
    assert (losses < theta).any()
    assert loss_of(fit, params, now) == pytest.approx(expected, rel=1e-5)


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
    assert loss_of(fit, params, now) == pytest.approx(expected, rel=1e-6)


def test_dropout_drops_its_share_in_training_alone(wine):
    fit, params, now = fit_of(wine, "dropout", strength=0.25)
    x = fit.sets.train[0]
    seen = []

    class Spy:
        def logits(self, params, x, drop):
            seen.append(drop(jnp.ones((1000, 50)), 0))
            seen.append(drop(jnp.ones((1000, 50)), 1))
            return wine.network.logits(params, x, drop)

    fit.problem = settings.dataclasses.replace(wine, network=Spy())
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
    run = start_of(fit, params, ours)
    other, state = params, jax.jit(theirs.init)(params)
    raw = jax.jit(jax.value_and_grad(functools.partial(loss_of, fit)))

    @jax.jit
    def step_of_ours(run, at):
        grads, value, _ = fit.gradient(run, at)
        updates, kept = ours.update(grads, run.state, run.params, value=value)
        params = optax.apply_updates(run.params, updates)
        return run._replace(params=params, state=kept), value

    @jax.jit
    def step_of_theirs(other, state, at):
        updates, state = theirs.update(
            raw(other, at)[1], state, other, grad_fn=lambda p, _: raw(p, at)[1]
        )
        return optax.apply_updates(other, updates), state

    for step in range(3):
        at = now._replace(batch=now.batch + step)
        expected = float(raw(run.params, at)[0])
        run, value = step_of_ours(run, at)
        assert value == pytest.approx(expected, rel=1e-6)
        other, state = step_of_theirs(other, state, at)
    jax.tree.map(
        # Adam's first steps divide by |g|: rounding of the tiniest gradients grows
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        run.params,
        other,
    )


def test_momentum_sam_takes_the_gradient_a_radius_against_the_momentum(wine):
    fit, params, now = fit_of(wine, "msam", strength=0.3)
    raw = jax.jit(jax.value_and_grad(functools.partial(loss_of, fit)))
    optimizer = fit.optimizer()
    run = start_of(fit, params, optimizer)
    grads, value, _ = fit.gradient(run, now)
    # no momentum yet
    assert value == pytest.approx(float(loss_of(fit, params, now)), rel=1e-6)
    updates, state = optimizer.update(grads, run.state, params, value=value)
    run = run._replace(params=optax.apply_updates(params, updates), state=state)
    momentum = jax.tree.map(lambda g: 0.1 * np.asarray(g, np.float64), grads)
    length = np.sqrt(sum((m**2).sum() for m in jax.tree.leaves(momentum)))
    at = jax.tree.map(lambda p, m: p - 0.3 * m / length, run.params, momentum)
    expected = raw(jax.tree.map(jnp.float32, at), now)
    grads, value, _ = fit.gradient(run, now)
    assert value == pytest.approx(float(expected[0]), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        grads,
        expected[1],
    )


def test_level_is_the_part_of_the_floor_at_the_estimated_share(wine):
    fit, *_ = fit_of(wine, "plain", of_estimate=0.9, band=0.2)
    wrong = 0.2 / 2
    floor = -0.8 * np.log(0.8) - 2 * wrong * np.log(wrong)
    assert fit.level == pytest.approx(0.9 * floor, rel=1e-6)
    given, *_ = fit_of(wine, "plain", level=0.4)
    assert given.level == pytest.approx(0.4)
    # and below its level a step goes up: level .4 - band .08 < loss .35 < .4
    ups = {}
    for level, band in ((0.4, 0.0), (0.4, 0.2), (-jnp.inf, 0.2)):
        one, params, _ = fit_of(wine, "plain", level=level, band=band)
        optimizer = one.optimizer()
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimizer.update(
            grads, optimizer.init(params), params, value=jnp.float32(0.35)
        )
        ups[level, band] = float(jax.tree.leaves(updates)[0].ravel()[0]) > 0
    assert list(ups.values()) == [True, False, False]


@pytest.mark.parametrize("cosine", [0.0, 1.0])
def test_rate_decays_by_half_a_cosine_or_not_at_all(cosine, wine):
    fit, params, _ = fit_of(wine, "plain", rate=0.5, cosine=cosine)
    optimizer = fit.optimizer()
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    for step in range(wine.size.steps):
        updates, state = optimizer.update(grads, state, params, value=jnp.float32(1))
        share = 0.5 * (1 + np.cos(np.pi * step / 9)) if cosine else 1.0
        # Adam's update of a constant gradient is the rate
        np.testing.assert_allclose(jax.tree.leaves(updates)[0], -0.5 * share, rtol=1e-4)


def test_confident_learning_finds_the_labels_off_the_diagonal():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    logits = (
        rng.normal(size=(200, 4))
        + 2 * np.eye(4)[(labels + (rng.random(200) < 0.3)) % 3]
    )
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    thresholds = [probs[labels == j, j].mean() if j < 3 else np.inf for j in range(4)]
    expected = []
    for p, y in zip(probs, labels, strict=True):
        classes = [j for j in range(4) if p[j] >= thresholds[j]]
        true = max(classes, key=lambda j: p[j]) if classes else y
        expected.append(true != y)
    found = before.contradicted(jnp.asarray(probs), jnp.asarray(labels))
    np.testing.assert_array_equal(found, expected)
    assert 20 < sum(expected) < 120


def test_known_are_the_estimate_and_the_labels_that_are_upheld(wine):
    sets = wine.draw(KEY, jnp.float32(0.2))
    true = wine.draw(KEY, jnp.float32(0.0)).train[1]
    known = before.known(wine, CONSTANTS, *sets.train, jax.random.key(2))
    scores = levels.leave_one_out(*sets.train, 3)
    assert known.rate == levels.noise_rate(scores, sets.train[1])
    np.testing.assert_array_equal(
        known.upheld, np.asarray(scores).argmax(-1) == np.asarray(sets.train[1])
    )
    wrong = np.asarray(true) != np.asarray(sets.train[1])
    assert wrong.sum() == 12
    assert np.asarray(known.upheld)[wrong].sum() <= 2
    assert np.asarray(known.upheld)[~wrong].mean() > 0.7
    assert known.held_out.shape == known.confident.shape == (60,)
    assert (known.held_out > 0).all()


def wave_by_hand(predictions, patience):
    """The check whose model is kept, from predictions [checks, n] after the first."""
    least, at, since = np.inf, 0, 0
    for check in range(1, len(predictions)):
        changes = (predictions[check] != predictions[check - 1]).sum()
        if changes < least:
            least, at, since = changes, check, 0
        else:
            since += 1
        if since >= patience:
            break
    return at


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_label_wave_keeps_the_model_of_the_fewest_changes(patience):
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(20):
        predictions = rng.integers(0, 2, (12, 9)).cumsum(0) % 3
        stop = stops.wave_start(jnp.int32(-1), jnp.zeros(9, int))
        for check, predicted in enumerate(predictions):
            stop = stops.wave(stop, jnp.int32(check), jnp.asarray(predicted), patience)
        assert stop.models == wave_by_hand(predictions, patience)
        seen.add(int(stop.models))
    assert len(seen) > 2


def test_evidence_weighs_the_mean_gradient_against_its_noise():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(7, 3)).astype(np.float32)
    y = rng.normal(size=7).astype(np.float32)
    w = np.array([0.3, -0.2, 0.5], np.float32)

    def loss_fn(params, example):  # "idle" has no gradient, so no noise either
        a, b = example
        return 0.5 * (params["w"] @ a - b) ** 2 + 0 * params["idle"].sum()

    grads = np.array([(w @ a - b) * a for a, b in zip(x, y, strict=True)])
    ratio = grads.mean(0) ** 2 / grads.var(0, ddof=1)
    params = {"w": jnp.asarray(w), "idle": jnp.ones(2)}
    found = stops.evidence_criterion(loss_fn, params, (jnp.asarray(x), jnp.asarray(y)))
    assert found == pytest.approx(1 - 7 / 3 * ratio.sum(), rel=1e-5)
    stop = stops.evidence_start(jnp.int32(0))
    for check, criterion in enumerate((-1.0, -0.1, 0.2, -0.3, 0.4), start=1):
        stop = stops.evidence(stop, jnp.int32(check), jnp.float32(criterion))
    assert stop.models == 3


def test_shifted_images_are_those_of_rolls_with_zeros():
    x = jnp.arange(1.0, 60 * 196 + 1).reshape(60, 196)
    moved = np.asarray(problems.shifted(jax.random.key(6), x, 1)).reshape(60, 14, 14)
    found = set()
    for image, original in zip(moved, np.asarray(x).reshape(60, 14, 14), strict=True):
        padded = np.pad(original, 1)
        places = [
            (i, j)
            for i in range(3)
            for j in range(3)
            if np.array_equal(image, padded[i : i + 14, j : j + 14])
        ]
        found |= set(places)
        assert len(places) == 1
    assert len(found) == 9  # every one of them


def test_convolutions_are_those_of_loops():
    net = problems.ConvNet(3, channels=(2, 3), width=4)
    x = jax.random.normal(jax.random.key(7), (2, 196))
    params = net.init(jax.random.key(8), x)
    h = np.asarray(x, np.float64).reshape(2, 14, 14, 1)
    for weights, bias in params[:2]:
        side = -(-h.shape[1] // 2)
        below = max((side - 1) * 2 + 3 - h.shape[1], 0) // 2
        wide = np.pad(h, ((0, 0), (below, 2), (below, 2), (0, 0)))
        out = np.zeros((2, side, side, len(bias)))
        for i in range(side):
            for j in range(side):
                part = wide[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
                out[:, i, j] = np.einsum("nijc,ijcd->nd", part, np.asarray(weights))
        h = np.maximum(out + np.asarray(bias), 0)
    (hidden, shift), (last, ends) = ((np.asarray(p) for p in q) for q in params[2:])
    h = np.maximum(h.reshape(2, -1) @ hidden + shift, 0) @ last + ends
    np.testing.assert_allclose(net.logits(params, x), h, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # compiles a run
@pytest.mark.usefixtures("optimized")  # else other roundings take other strokes
def test_run_reads_off_the_last_the_averaged_and_the_best_weights(wine):
    recipes = training.stacked([Recipe(0.003), Recipe(0.1, level=1.0, band=0.05)])
    train = training.trainer(wine, "plain", CONSTANTS)
    found = train(recipes, KEY, jnp.float32(0.2), KNOWN)[1]
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

    raw = jax.jit(jax.value_and_grad(loss_fn))
    average = params
    for step, batch in enumerate(order):
        value, grads = raw(params, sets.train[0][batch], sets.train[1][batch])
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
            reached += [(logits.argmax(-1) == np.asarray(y)).mean(), loss]
        return reached

    for readout in (0, 1):
        every = [read(check[readout]) for check in checks]
        last, best = every[-1], max(every, key=lambda one: one[0] - 1e-6 * one[1])
        for stop, expected in enumerate((last, best)):
            np.testing.assert_allclose(found[stop, readout], expected, rtol=2e-4)


@pytest.mark.slow  # compiles a run
def test_rules_are_followed_from_check_to_check(wine):
    train = training.trainer(wine, "stops", CONSTANTS)
    found = train(training.stacked([Recipe(0.02)]), KEY, jnp.float32(0.2), KNOWN)[0]
    assert training.stops_of("stops") == ("last", "best", "wave", "evidence")
    assert found.shape == (4, 2, len(training.COLUMNS))
    # one of three checks each: runs of as many steps of the same rate
    ends = []
    for checks in (1, 2, 3):
        size = wine.size._replace(steps=3 * checks)
        part = settings.dataclasses.replace(wine, size=size)
        constants = settings.dataclasses.replace(CONSTANTS, checks=checks)
        run = training.trainer(part, "plain", constants)
        ends.append(
            run(training.stacked([Recipe(0.02)]), KEY, jnp.float32(0.2), KNOWN)[0][0]
        )
    np.testing.assert_allclose(found[0], ends[-1], rtol=1e-5)
    for rule in (2, 3):
        assert any(np.allclose(found[rule], end, rtol=1e-5) for end in ends)


def test_every_kind_of_step_has_a_method_and_runs_on_text():
    kinds = {method.kind for method in METHODS.values() if not method.of}
    assert kinds == {
        *("plain", "stops", "dropout", "mixup", "sam", "msam"),
        *("schedule_free", "elr", "adaflood"),
    }
    size = settings.SIZES["text"]._replace(steps=2)
    text = problems.problem("text", size=size)
    fit, params, now = fit_of(text, "elr", strength=3.0, memory=0.7)
    fit.known = before.nothing(size.train)
    value, memory = jax.jit(fit.objective)(params, now, fit.targets())
    assert np.isfinite(value)
    assert memory.shape == (256, 32, text.classes)
