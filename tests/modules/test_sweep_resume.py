"""Sweeps that are killed and started again: they do what is missing, and end equal."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import textwrap
import time
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flood_optax import FloodWarning, sweep
from flood_optax.sweep import journal, traced
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
    return sweep.run(train, LEVELS, KEYS, chunk_size=2).metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The file of a sweep that ended: a header and six chunks."""
    path = tmp_path_factory.mktemp("sweep") / "finished.jsonl"
    sweep.run(train, LEVELS, KEYS, chunk_size=2, path=path)
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return pathlib.Path(shutil.copy(finished, tmp_path / "sweep.jsonl"))


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def resumed(path, **options):
    return sweep.run(train, LEVELS, KEYS, path=path, **({"chunk_size": 2} | options))


def python(code, *arguments):
    return processes.start("-c", SWEPT + textwrap.dedent(code), *arguments)


# --- what a killed process, or a full disk, leaves ------------------------------------

KILLED = """
    import os, signal, sys, time
    from flood_optax.sweep.journal import Journal
    add, calls = Journal.add, []

    def fatal(self, runs, rows):
        add(self, runs, rows)
        calls.append(runs)
        {dies}

    Journal.add = fatal
    sweep.run(train, LEVELS, KEYS, path=sys.argv[1], **OPTIONS)
"""
TORN = """
        if len(calls) == 3:
            os.truncate(sys.argv[1], os.path.getsize(sys.argv[1]) - 100)
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "by",
    [
        "itself, within a line",
        pytest.param("another, at any time", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path, whole, computed, finished, by
):
    path, alone = tmp_path / "sweep.jsonl", by.startswith("itself")
    code = textwrap.dedent(KILLED).format(
        dies=TORN.strip() if alone else "time.sleep(0.2 if len(calls) < 5 else 300)"
    )
    process, deadline = python(code, path), time.monotonic() + 240
    while not alone and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= 3:
            process.kill()
            break
        time.sleep(0.01)
    assert processes.end(process)[0] == -signal.SIGKILL
    left = path.read_bytes()
    assert finished.read_bytes().startswith(left)
    kept = left.count(b"\n") - 1
    assert kept == 2 if alone else 2 <= kept < 6
    chex.assert_trees_all_equal(resumed(path).metrics, whole)
    assert computed == [2] * (6 - kept)


def flipped(lines, number):
    """With a bit of a line, counted from 1, that is another."""
    damaged = bytearray(lines[number - 1])
    damaged[40] ^= 1
    return [*lines[: number - 1], bytes(damaged), *lines[number:]]


# what the lines of the file become -> the chunks that are missing
FAULTS = {
    "empty": (lambda lines: [], 6),
    "cut in the header": (lambda lines: [lines[0][:40]], 6),
    "cut between chunks": (lambda lines: lines[:4], 3),
    "cut before the line end": (lambda lines: [*lines[:3], lines[3][:-1]], 3),
    "cut within a line": (lambda lines: [*lines[:3], lines[3][:-100]], 4),
    "bit in the first chunk": (lambda lines: flipped(lines, 2), 1),
    "bit in the second": (lambda lines: flipped(lines, 3), 1),
    "bit in the last": (lambda lines: flipped(lines, 7), 1),
    "torn, the next glued to it": (
        lambda lines: [*lines[:2], lines[2][:100], *lines[3:]],
        1,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_file_with_a_fault_costs_the_chunks_it_lost(copy, whole, computed, fault):
    damage, missing = FAULTS[fault]
    copy.write_bytes(b"".join(damage(lines_of(copy))))
    for _ in range(2):  # the second finds nothing left to do
        found = resumed(copy).metrics
        assert computed == [2] * missing
        chex.assert_trees_all_equal(found, whole)
        chex.assert_trees_all_equal_dtypes(found, whole)


def test_file_is_written_by_tenths_of_the_runs_unless_told(tmp_path):
    path = tmp_path / "sweep.jsonl"
    sweep.run(train, LEVELS, KEYS, strategy="vmap", path=path)
    assert len(lines_of(path)) == 1 + 6  # twelve runs, two at a time


@pytest.mark.parametrize("strategy", ["map", "shard"])
def test_resumed_by_another_strategy_agrees_to_rounding(
    copy, whole, computed, strategy
):
    copy.write_bytes(b"".join(lines_of(copy)[:3]))
    found = resumed(copy, strategy=strategy, chunk_size=3).metrics
    assert computed == [3, 3, 2]
    for name, value in found.items():
        np.testing.assert_allclose(
            value.astype(float), whole[name].astype(float), rtol=1e-2
        )


FULL_DISK = """
    import json, resource, sys
    folder, *limits = sys.argv[1:]
    sweep.run(train, LEVELS, KEYS, **OPTIONS)  # compiled while there is room
    for limit in limits:
        size = int(limit), resource.RLIM_INFINITY
        found = []
        for _ in range(2):  # the second finds it still full
            resource.setrlimit(resource.RLIMIT_FSIZE, size)
            try:
                sweep.run(train, LEVELS, KEYS, path=f"{folder}/{limit}", **OPTIONS)
            except OSError as error:
                found.append(" ".join([str(error), *error.__notes__]))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(json.dumps(found))
"""
WHOLE_LINES = [0, 1, 3, 6]


@pytest.fixture(scope="module")
def full_disks(tmp_path_factory, finished):
    """By the lines that fit: the file, and the errors of two attempts."""
    folder = tmp_path_factory.mktemp("full")
    lines = lines_of(finished)
    limits = [len(b"".join(lines[:number])) + 60 for number in WHOLE_LINES]
    code, out, err = processes.end(python(FULL_DISK, folder, *limits))
    assert code == 0, err
    errors = [json.loads(line) for line in out.splitlines()]
    files = [folder / str(limit) for limit in limits]
    return dict(zip(WHOLE_LINES, zip(files, errors, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("whole_lines", WHOLE_LINES)
def test_full_disk_raises_and_the_file_goes_on_when_there_is_room(
    full_disks, whole, computed, whole_lines
):
    kept = 2 * max(whole_lines - 1, 0)
    path, errors = full_disks[whole_lines]
    assert len(errors) == 2
    note = f"keeps {kept} of 12 runs. When it can be written to again"
    assert not whole_lines or all(note in error for error in errors)
    chex.assert_trees_all_equal(resumed(path).metrics, whole)
    assert sum(computed) == 12 - kept


def test_path_may_be_a_symbolic_link(tmp_path, whole):
    target, link = tmp_path / "data" / "sweep.jsonl", tmp_path / "link.jsonl"
    target.parent.mkdir()
    link.symlink_to(target)  # to a file that is not there yet
    for _ in range(2):
        chex.assert_trees_all_equal(resumed(link).metrics, whole)
        assert link.is_symlink()
        assert target.read_bytes().count(b"\n") == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "link.jsonl"]


# --- several processes ----------------------------------------------------------------


def test_two_processes_may_start_one_file_at_once(tmp_path, whole, monkeypatch):
    path, read_bytes = tmp_path / "sweep.jsonl", pathlib.Path.read_bytes

    def absent(self):
        raise FileNotFoundError(self)

    lines = []
    monkeypatch.setattr(pathlib.Path, "exists", lambda self: False)
    monkeypatch.setattr(pathlib.Path, "read_bytes", absent)
    for levels in (LEVELS[:2], LEVELS[2:]):  # neither sees what the other wrote
        sweep.run(train, levels, KEYS, path=path, chunk_size=2)
        lines.append(read_bytes(path).count(b"\n"))
    monkeypatch.undo()
    assert lines == [4, 8]
    chex.assert_trees_all_equal(resumed(path).metrics, whole)
    assert read_bytes(path).count(b"\n") == 8  # nothing was run again


RUN = "import sys\nsweep.run(train, LEVELS, KEYS, path=sys.argv[1], **OPTIONS)"


@pytest.mark.slow
def test_processes_that_share_one_file_end_alike(tmp_path, whole):
    path = tmp_path / "sweep.jsonl"
    for process in [python(RUN, path) for _ in range(2)]:
        code, _, err = processes.end(process)
        assert code == 0, err
    before = path.read_bytes()
    assert 7 <= before.count(b"\n") <= 14
    chex.assert_trees_all_equal(resumed(path).metrics, whole)
    assert path.read_bytes() == before


@pytest.mark.slow  # starts a process
def test_fingerprint_is_the_same_in_another_process(copy):
    before = copy.read_bytes()
    code, _, err = processes.end(python(RUN, copy))
    assert code == 0, err
    assert copy.read_bytes() == before


JOIN = """
import hashlib, os, pathlib, signal, sys, time, jax
rank, number, address, path, dies = sys.argv[1:]
jax.distributed.initialize(address, int(number), int(rank))
"""
TOGETHER = """
from flood_optax.sweep.journal import Journal
add, chunks = Journal.add, []

def counted(self, runs, rows):
    add(self, runs, rows)
    chunks.append(len(runs))
    if rank == dies and len(chunks) == 2:
        while pathlib.Path(path).read_bytes().count(b"\\n") < 3:  # the first writes
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

Journal.add = counted
own = path if rank == "0" else path + ".unseen"  # the first alone reads and writes
found = sweep.run(train, LEVELS, KEYS, path=own, chunk_size=1).metrics
assert not pathlib.Path(path + ".unseen").exists()
content = b"".join(found[name].tobytes() for name in sorted(found))
print(sum(chunks), hashlib.sha256(content).hexdigest())
"""


def started_together(number, path, dies="nobody"):
    code, given = JOIN + SWEPT + TOGETHER, (processes.free_address(), path, dies)
    return [
        processes.start("-c", code, rank, number, *given, devices=2)
        for rank in range(number)
    ]


def ended(ranks):
    try:
        return [processes.end(rank) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow  # starts eight processes
@pytest.mark.parametrize("dies", [0, 1])
def test_sweep_of_two_processes_of_which_one_is_killed_goes_on_in_any_number(
    tmp_path, whole, dies
):
    path = tmp_path / "sweep.jsonl"
    ranks = started_together(2, path, dies)
    ranks[dies].wait(timeout=300)
    ranks[1 - dies].kill()  # as a cluster does, once one of them has failed
    codes = [code for code, *_ in ended(ranks)]
    # JAX may have aborted the other one by itself, as its peer was gone
    assert codes[dies] == -signal.SIGKILL
    assert codes[1 - dies] != 0
    content = b"".join(whole[name].tobytes() for name in sorted(whole))
    digest = hashlib.sha256(content).hexdigest()
    for number in (3 - dies, 1):
        copied = shutil.copy(path, tmp_path / f"{number}.jsonl")
        for code, out, err in ended(started_together(number, copied)):
            assert code == 0, err
            assert out.split()[-2:] == ["4", digest]  # 8 of 12 runs were there


# --- the same training at more levels, with more keys ---------------------------------

MORE_LEVELS = [0.3, 0.0, -np.inf, 0.15, 0.2, 0.1]
MORE_KEYS = jnp.stack([*jax.random.split(jax.random.key(8), 2), *KEYS[::-1]])


@pytest.fixture(scope="module")
def more():
    return sweep.run(train, MORE_LEVELS, MORE_KEYS).metrics


def test_file_of_fewer_levels_and_keys_is_extended(copy, computed, more):
    extended = sweep.run(train, MORE_LEVELS, MORE_KEYS, path=copy)
    assert sum(computed) == 6 * 5 - 4 * 3
    chex.assert_trees_all_equal(extended.metrics, more)
    np.testing.assert_array_equal(extended.levels, MORE_LEVELS)
    np.testing.assert_array_equal(extended.keys, jax.random.key_data(MORE_KEYS))
    computed.clear()
    part = sweep.run(train, MORE_LEVELS[1:4], MORE_KEYS[1:3], path=copy)
    assert computed == []
    chex.assert_trees_all_equal(
        part.metrics, {name: x[1:4, 1:3] for name, x in more.items()}
    )


@pytest.mark.parametrize("torn", [0, 100])
def test_extension_that_is_killed_goes_on_where_it_was(
    copy, computed, whole, more, torn
):
    sweep.run(train, [0.3, *LEVELS, 0.15], KEYS, path=copy, chunk_size=2)
    os.truncate(copy, len(b"".join(lines_of(copy)[:9])) - torn)
    assert computed == [2, 2, 2]
    extended = sweep.run(train, MORE_LEVELS, KEYS, path=copy, chunk_size=2)
    assert computed == [2, 2, 2, 2, *([2] if torn else [])]
    of_keys = {name: x[:, :1:-1] for name, x in more.items()}
    chex.assert_trees_all_equal(extended.metrics, of_keys)
    chex.assert_trees_all_equal(resumed(copy).metrics, whole)  # the first call


# --- files of another sweep -----------------------------------------------------------


def test_path_in_a_missing_directory_fails_before_training(tmp_path, computed):
    with pytest.raises(FileNotFoundError, match="missing"):
        resumed(tmp_path / "missing" / "sweep.jsonl")
    assert computed == []


def test_progress_of_a_resumed_sweep_starts_where_it_was(copy, bars):
    copy.write_bytes(b"".join(lines_of(copy)[:3]))
    resumed(copy, progress=True)
    assert bars.closed[0] == (4, 12, 12)


def with_another_header(lines, **changed):
    """The lines as they would be with another header."""
    header = json.loads(lines[0].partition(b" ")[2]) | changed
    text = json.dumps(header).encode()
    return [b"%08x %s\n" % (zlib.crc32(text), text), *lines[1:]]


def other_metrics(level, key):
    return train(level, key) | {"more": level}


def other_operation(level, key):
    return train(level, key) | {"w": -train(level, key)["w"]}


OTHER_DATA = namespace["DATA"].at[7].add(0.001)
OF_THIS, OTHER_TRAIN = r"`sweep.run\(path=...\)` must be .*", "another train function"
NOW = traced.settings()
# what is swept, or what the lines have become, or a setting -> what the error says
OTHERS = {
    "raw keys": ((train, LEVELS, jax.random.key_data(KEYS)), "another kind of keys"),
    "metrics": ((other_metrics, LEVELS, KEYS), "other metrics"),
    "rate": ((lambda b, k: train(b, k, rate=0.2), LEVELS, KEYS), OTHER_TRAIN),
    "operation": ((other_operation, LEVELS, KEYS), OTHER_TRAIN),
    "data": ((lambda b, k: train(b, k, data=OTHER_DATA), LEVELS, KEYS), OTHER_TRAIN),
    "torn": (lambda lines: [b"0badc0de"], "is something else"),
    "table": (lambda lines: [b"level,accuracy\n0.1,0.9\n"], "something else. Give an"),
    "binary": (lambda lines: [b"\xff\x00\n"], "is something else. Give another"),
    # its fingerprint did not see all data, so its numbers cannot be trusted
    "earlier version": (
        lambda lines: with_another_header(lines, format="flood_optax.sweep/1"),
        "a file of this version, got sweep",
    ),
    "version of jax": (
        lambda lines: with_another_header(lines, settings=NOW | {"jax": "0.7.0"}),
        rf"with jax 0.7.0 .now {re.escape(jax.__version__)}., .* Set that back",
    ),
    "random numbers": (
        jax.threefry_partitionable(False),
        "jax_threefry_partitionable True .now False.",
    ),
    "precision": (
        jax.default_matmul_precision("highest"),
        "jax_default_matmul_precision None .now highest.",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_file_of_another_sweep_is_refused_and_kept(copy, whole, computed, case):
    other, message = OTHERS[case]
    arguments, setting = (train, LEVELS, KEYS), contextlib.nullcontext()
    if isinstance(other, tuple):
        arguments = other
    elif hasattr(other, "__enter__"):
        setting = other
    else:
        copy.write_bytes(b"".join(other(lines_of(copy))))
    before = copy.read_bytes()
    with setting, pytest.raises(ValueError, match=OF_THIS + message):
        sweep.run(*arguments, path=copy)
    assert copy.read_bytes() == before
    if setting is other:  # set back, as the error says
        chex.assert_trees_all_equal(resumed(copy).metrics, whole)
    assert computed == []


def test_file_of_the_version_before_is_read_and_extended(copy, whole, computed):
    # Its header held the grid, of which the chunks gave numbers, and no settings.
    header, *chunks = (json.loads(x.partition(b" ")[2]) for x in lines_of(copy)[:4])
    for number, chunk in enumerate(chunks):
        chunk["runs"] = [2 * number, 2 * number + 1]
    levels = [repr(float(np.float32(b))) for b in LEVELS]
    header |= {"format": "flood_optax.sweep/2", "levels": levels}
    header["keys"] = [header.pop("key"), jax.random.key_data(KEYS).tolist()]
    del header["settings"]
    copy.write_bytes(b"".join(map(journal._line, [header, *chunks])))
    with pytest.warns(
        FloodWarning, match="does not say with which version and settings"
    ):
        found = resumed(copy)
    assert computed == [2, 2, 2]
    chex.assert_trees_all_equal(found.metrics, whole)
    chex.assert_trees_all_equal(resumed(copy).metrics, whole)  # says so now
    partition = pytest.raises(ValueError, match="partition")
    with jax.threefry_partitionable(False), partition:
        resumed(copy)
