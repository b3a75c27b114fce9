"""Sweeps that are killed and started again: they do what is missing, and end equal."""

import pathlib
import shutil
import signal
import textwrap
import time

import chex
import jax
import numpy as np
import pytest

from flood_optax import journal, sweep
from tests import processes

# What is swept stands in a string, so that another process can sweep the same.
SWEPT = """
import jax, jax.numpy as jnp, numpy as np
from flood_optax import flooded, sweep

DATA = jnp.linspace(0.5, 1.5, 64)
LEVELS, KEYS = [0.0, 0.1, 0.2, -np.inf], jax.random.split(jax.random.key(5), 3)

def train(level, key, rate=0.1, data=DATA):
    def loss_fn(w, x):
        return jnp.exp(w * x) - w * x - 1.0

    def step(w, x):
        loss, grad = jax.value_and_grad(flooded(loss_fn, level))(w, x)
        return w - rate * grad, loss

    w, losses = jax.lax.scan(step, jax.nn.relu(jax.random.normal(key)), data)
    last = losses[-3:].astype(jnp.bfloat16)
    odd = jnp.where(level > 0.1, 1 / (w > 9), 0 / (0 * w))  # infinite, or NaN
    return {"w": w, "losses": losses, "positive": w > 0.1, "last": last, "odd": odd}

OPTIONS = dict(chunk_size=2)
"""
namespace = {}
exec(SWEPT, namespace)
train, LEVELS, KEYS = (namespace[name] for name in ("train", "LEVELS", "KEYS"))


@pytest.fixture(scope="module")
def whole():
    return sweep.run(train, LEVELS, KEYS, chunk_size=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The file of a sweep that ended."""
    path = tmp_path_factory.mktemp("sweep") / "finished.jsonl"
    sweep.run(train, LEVELS, KEYS, chunk_size=2, path=path)
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copy(finished, tmp_path / "sweep.jsonl"))


@pytest.fixture
def computed(monkeypatch):
    """The numbers of runs that are appended, chunk by chunk."""
    chunks = []
    append = journal.append

    def spied(path, runs, metrics):
        chunks.append(len(runs))
        append(path, runs, metrics)

    monkeypatch.setattr(journal, "append", spied)
    return chunks


def python(code):
    return processes.start("-c", SWEPT + textwrap.dedent(code))


KILLED = """
    import os, pathlib, signal
    from flood_optax import journal
    append, calls = journal.append, []

    def fatal(path, runs, metrics):
        append(path, runs, metrics)
        calls.append(runs)
        if len(calls) == 3:
            torn = {torn}
            os.truncate(path, path.stat().st_size - torn)
            os.kill(os.getpid(), signal.SIGKILL)

    journal.append = fatal
    sweep.run(train, LEVELS, KEYS, path={path!r}, **OPTIONS)
"""


@pytest.mark.parametrize(
    ("torn", "missing"),
    [(0, [2, 2, 2]), (1, [2, 2, 2, 2]), (100, [2, 2, 2, 2])],
    ids=["between chunks", "before the line end", "within a line"],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path, whole, computed, torn, missing
):
    path = tmp_path / "sweep.jsonl"
    process = python(KILLED.format(path=str(path), torn=torn))
    assert processes.end(process)[0] == -signal.SIGKILL
    resumed = sweep.run(train, LEVELS, KEYS, path=path, chunk_size=2)
    assert computed == missing
    chex.assert_trees_all_equal(resumed.metrics, whole.metrics)
    chex.assert_trees_all_equal_dtypes(resumed.metrics, whole.metrics)
    again = sweep.run(train, LEVELS, KEYS, path=path, chunk_size=2)
    assert computed == missing  # nothing was left to do
    chex.assert_trees_all_equal(again.metrics, whole.metrics)


def test_killed_from_outside_at_any_time_and_resumed_equals_uninterrupted(
    tmp_path, whole
):
    path = tmp_path / "sweep.jsonl"
    process = python(f"""
    import time
    from flood_optax import journal
    append = journal.append
    journal.append = lambda *a: (append(*a), time.sleep(0.2))
    sweep.run(train, LEVELS, KEYS, path={str(path)!r}, **OPTIONS)
    """)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (
        not path.exists() or path.read_bytes().count(b"\n") < 3
    ):
        time.sleep(0.01)
    process.kill()
    assert processes.end(process)[0] == -signal.SIGKILL
    assert 3 <= path.read_bytes().count(b"\n") < 7
    resumed = sweep.run(train, LEVELS, KEYS, path=path, chunk_size=2)
    chex.assert_trees_all_equal(resumed.metrics, whole.metrics)


@pytest.mark.parametrize("strategy", ["map", "shard"])
def test_resumed_by_another_strategy_agrees_to_rounding(
    tmp_path, copy, whole, computed, strategy
):
    lines = copy.read_bytes().splitlines(keepends=True)
    copy.write_bytes(b"".join(lines[:3]))
    resumed = sweep.run(train, LEVELS, KEYS, path=copy, strategy=strategy, chunk_size=3)
    assert computed == [3, 3, 2]
    for name, value in resumed.metrics.items():
        np.testing.assert_allclose(
            value.astype(float), whole.metrics[name].astype(float), rtol=1e-2
        )


@pytest.mark.parametrize(
    "content", [b"", b"0badc0de", None], ids=["empty", "torn", "cut"]
)
def test_file_without_a_whole_first_line_starts_over(
    copy, finished, whole, computed, content
):
    first = finished.read_bytes().partition(b"\n")[0]
    copy.write_bytes(first[:40] if content is None else content)
    if content == b"0badc0de":
        with pytest.raises(ValueError, match="is something else"):
            sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2)
        assert copy.read_bytes() == content  # nobody's file is overwritten
        return
    result = sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2)
    assert sum(computed) == 12
    chex.assert_trees_all_equal(result.metrics, whole.metrics)


def test_damaged_line_in_the_middle_is_named(copy):
    content = bytearray(copy.read_bytes())
    lines = content.split(b"\n")
    middle = len(lines[0]) + len(lines[1]) + 40
    content[middle] ^= 1
    copy.write_bytes(content)
    with pytest.raises(ValueError, match=r"line 3 of sweep\.jsonl is damaged"):
        sweep.run(train, LEVELS, KEYS, path=copy)


def other_metrics(level, key):
    return train(level, key) | {"more": level}


OTHER_DATA = namespace["DATA"].at[7].add(0.001)
OTHERS = {
    "levels": ((train, [0.0, 0.1, 0.2, 0.3], KEYS), "other levels"),
    "order of levels": ((train, LEVELS[::-1], KEYS), "other levels"),
    "keys": (
        (train, LEVELS, jax.random.split(jax.random.key(6), 3)),
        "other keys",
    ),
    "number of keys": ((train, LEVELS, KEYS[:2]), "other keys"),
    "raw keys": ((train, LEVELS, jax.random.key_data(KEYS)), "other keys"),
    "metrics": ((other_metrics, LEVELS, KEYS), "other metrics"),
    "learning rate": (
        (lambda b, k: train(b, k, rate=0.2), LEVELS, KEYS),
        "another train function",
    ),
    "data": (
        (lambda b, k: train(b, k, data=OTHER_DATA), LEVELS, KEYS),
        "another train function",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_file_of_another_sweep_is_refused_and_kept(copy, finished, case):
    arguments, message = OTHERS[case]
    with pytest.raises(
        ValueError, match=r"`sweep.run\(path=...\)` must be .*" + message
    ):
        sweep.run(*arguments, path=copy)
    assert copy.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize("content", [b"level,accuracy\n0.1,0.9\n", b"\xff\x00\n"])
def test_file_of_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table.csv is something else. Give another"):
        sweep.run(train, LEVELS, KEYS, path=path)
    assert path.read_bytes() == content


def test_path_in_a_missing_directory_fails_before_training(tmp_path, computed):
    with pytest.raises(FileNotFoundError, match="missing"):
        sweep.run(train, LEVELS, KEYS, path=tmp_path / "missing" / "sweep.jsonl")
    assert computed == []


def test_progress_of_a_resumed_sweep_starts_where_it_was(copy, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar(tqdm.tqdm):
        def close(self):
            bars.append((self.initial, self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    lines = copy.read_bytes().splitlines(keepends=True)
    copy.write_bytes(b"".join(lines[:3]))
    sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2, progress=True)
    assert bars[0] == (4, 12, 12)
