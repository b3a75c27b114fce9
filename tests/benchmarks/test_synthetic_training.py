"""The synthetic problems are the paper's, and a run is an explicit loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import networks, points, synthetic
from benchmarks.synthetic import findings, training

TINY = training.Protocol(test_points=40, widths=(6, 6), learning_rate=0.05, epochs=40)


def test_two_gaussians_have_unit_covariance_and_the_bayes_accuracy_of_the_paper():
    x, y = map(np.asarray, points.two_gaussians(jax.random.key(0), 10_000))
    assert x.shape == (20_000, 10)
    np.testing.assert_array_equal(y, np.repeat([0, 1], 10_000))
    for label in (0, 1):
        mine = x[y == label]
        np.testing.assert_allclose(mine.mean(0), label, atol=0.05)  # 5 sd of a mean
        np.testing.assert_allclose(np.cov(mine.T), np.eye(10), atol=0.07)
    bayes = np.mean((x.sum(1) > 5) == y)  # Phi(sqrt(10) / 2) = 0.9431
    assert bayes == pytest.approx(0.9431, abs=0.008)


def test_spiral_is_the_one_of_the_paper():
    x, y = map(np.asarray, points.spiral(jax.random.key(0), 100))
    t = np.linspace(0, 4 * np.pi, 100)
    plus = np.column_stack([t * np.cos(t), t * np.sin(t)])
    minus = np.column_stack([(t + np.pi) * np.cos(t), (t + np.pi) * np.sin(t)])
    np.testing.assert_allclose(x, np.concatenate([plus, minus]), atol=2e-5)
    np.testing.assert_allclose(x[99], [4 * np.pi, 0], atol=2e-5)
    np.testing.assert_allclose(x[100], [np.pi, 0], atol=2e-5)
    np.testing.assert_array_equal(y, np.repeat([0, 1], 100))


def test_sinusoid_fills_the_disc_of_radius_two_evenly():
    x, y = map(np.asarray, points.sinusoid(jax.random.key(0), 20_000))
    squared = (x.astype(np.float64) ** 2).sum(1) / 4
    assert squared.max() <= 1 + 1e-6
    # The squared radius of a uniform point of the disc is uniform (Kolmogorov, 0.1%).
    assert stats.kstest(squared, "uniform").statistic < 1.95 / 20_000**0.5
    angle = (np.arctan2(x[:, 1], x[:, 0]) + np.pi) / (2 * np.pi)
    assert stats.kstest(angle, "uniform").statistic < 1.95 / 20_000**0.5
    side = 1.5 * x[:, 0].astype(np.float64) + np.sin(1.5 * x[:, 1].astype(np.float64))
    clear = abs(side) > 1e-5
    np.testing.assert_array_equal((y == 1)[clear], (side > 0)[clear])


@pytest.mark.parametrize(
    ("noise", "name"),
    [
        # a program each: every generator at one rate, at the others in slow
        pytest.param(noise, name, marks=[] if noise == 0.1 else [pytest.mark.slow])
        for noise in synthetic.NOISES
        for name in points.GENERATORS
    ],
)
def test_synthetic_splits_flip_an_exact_share_each(name, noise):
    protocol = training.Protocol(test_points=250)
    draw = jax.jit(training.draw_splits, static_argnums=(1, 2, 3))
    sets = draw(jax.random.key(1), name, noise, protocol)
    half = 1 if name == "sinusoid" else 2
    sizes = [100 * half, 100 * half, 500]
    assert [len(one.x) for one in sets] == sizes
    for one, size in zip(sets, sizes, strict=True):
        flips = int((one.noisy != one.clean).sum())
        assert flips == size * round(100 * noise) // 100
        assert set(np.unique(one.noisy)) == {0, 1}
    other = draw(jax.random.key(2), name, noise, protocol)[2]
    assert (other.noisy != sets[2].noisy).any()


@pytest.mark.slow  # compiles two trainings; the network has tests of its own
@pytest.mark.parametrize("level", [0.0, 0.4])
def test_synthetic_run_equals_an_explicit_loop_over_epochs(level):
    key = jax.random.key(5)
    metrics = jax.jit(training.trainer("sinusoid", 0.1, TINY))(jnp.float32(level), key)

    data_key, init_key = jax.random.split(key)
    draw = jax.jit(training.draw_splits, static_argnums=(1, 2, 3))
    sets = draw(data_key, "sinusoid", 0.1, TINY)
    train, validation, _ = sets
    net = networks.MLP(TINY.widths, 2, batch_norm=True)
    model = jax.jit(net.init, static_argnames="train")(init_key, train.x, train=True)
    optimizer = optax.adam(TINY.learning_rate)
    state = optimizer.init(model["params"])

    def mean_loss(params, batch_stats):
        seen = {"params": params, "batch_stats": batch_stats}
        logits, new = net.apply(seen, train.x, train=True, mutable=["batch_stats"])
        log_p = jax.nn.log_softmax(logits)[jnp.arange(len(train.x)), train.noisy]
        return -log_p.mean(), new["batch_stats"]

    @jax.jit
    def step(model, state):
        (loss, batch_stats), grads = jax.value_and_grad(mean_loss, has_aux=True)(
            model["params"], model["batch_stats"]
        )
        sign = jnp.where(loss < level, -1.0, 1.0)
        grads = jax.tree.map(lambda g: sign * g, grads)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(model["params"], updates)
        return {"params": params, "batch_stats": batch_stats}, state, loss

    predict = jax.jit(lambda model, x: jax.nn.log_softmax(net.apply(model, x)))

    def reached(model, one, labels):
        log_p = np.asarray(predict(model, one.x), np.float64)
        right = log_p.argmax(1) == np.asarray(labels)
        chosen = log_p[np.arange(len(labels)), np.asarray(labels)]
        return -chosen.mean(), right.mean()

    models_seen, losses = [model], []
    for _ in range(TINY.epochs):
        model, state, loss = step(model, state)
        models_seen.append(model)
        losses.append(float(loss))
    accuracies = [reached(m, validation, validation.noisy)[1] for m in models_seen]
    best = int(np.argmax(accuracies))
    assert 0 < best < TINY.epochs  # neither end: the snapshot is one of the middle
    np.testing.assert_allclose(metrics["train_loss"], losses, rtol=2e-4)
    np.testing.assert_allclose(metrics["validation_accuracy"], accuracies, atol=1e-6)
    for which, model in (("last", models_seen[-1]), ("best", models_seen[best])):
        expected = [
            [reached(model, one, y) for y in (one.noisy, one.clean)] for one in sets
        ]
        np.testing.assert_allclose(metrics[which], expected, rtol=1e-3)
    if level:
        assert min(losses) < level < max(losses)
        assert abs(losses[-1] - level) < 0.1


@pytest.mark.slow  # a network of its own; the loop above holds the best epoch too
def test_synthetic_best_epoch_may_be_before_training():
    still = dataclasses.replace(TINY, learning_rate=0.0, epochs=2)
    train = jax.jit(training.trainer("sinusoid", 0.1, still))
    metrics = train(jnp.float32(0.0), jax.random.key(23))
    before, *after = metrics["validation_accuracy"].tolist()
    assert before > max(after)  # the running statistics move, the weights do not
    assert float(metrics["best"][1, 0, 1]) == before
    assert float(metrics["last"][1, 0, 1]) == after[-1]


@pytest.mark.slow  # compiles the study; tests of the sweep resume a small one
def test_synthetic_resumed_equals_uninterrupted(tmp_path, capsys):
    def run():
        keys = jax.random.split(jax.random.key(0), 2)
        result = synthetic.run_cell(
            *("sinusoid", 0.1, training.SMOKE),
            levels=[0.0, 0.3],
            keys=keys,
            work=tmp_path,
        )
        entries = findings.summarise("sinusoid", 0.1, result)
        return entries, findings.by_level("sinusoid", 0.1, result)

    whole = run()
    (kept,) = tmp_path.iterdir()
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 4 // jax.device_count()
    kept.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed while it wrote
    assert run() == whole
    # the torn line stays, and is run again
    assert len(kept.read_bytes().splitlines()) == len(lines) + 1
    capsys.readouterr()
