"""Sweeps that are killed and started again: they do what is missing, and end equal."""

import hashlib
import json
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
    add = journal.Journal.add

    def spied(self, runs, rows):
        chunks.append(len(runs))
        add(self, runs, rows)

    monkeypatch.setattr(journal.Journal, "add", spied)
    return chunks


def python(code, *arguments):
    return processes.start("-c", SWEPT + textwrap.dedent(code), *arguments)


KILLED = """
    import os, pathlib, signal
    from flood_optax.sweep.journal import Journal
    add, calls = Journal.add, []

    def fatal(self, runs, rows):
        add(self, runs, rows)
        calls.append(runs)
        if len(calls) == 3:
            torn = {torn}
            os.truncate({path!r}, os.path.getsize({path!r}) - torn)
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = fatal
    sweep.run(train, LEVELS, KEYS, path={path!r}, **OPTIONS)
"""


@pytest.mark.parametrize(
    ("torn", "missing"),
    [(0, [2, 2, 2]), (1, [2, 2, 2]), (100, [2, 2, 2, 2])],
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
    from flood_optax.sweep.journal import Journal
    add = Journal.add
    Journal.add = lambda *a: (add(*a), time.sleep(0.2))
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


def with_a_bit_flipped(path, line):
    """Damages a line of the file, counted from 1, and returns the content."""
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[line - 1])
    damaged[40] ^= 1
    lines[line - 1] = bytes(damaged)
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("line", [2, 3, 7])  # of 7: a header and six chunks
def test_damaged_line_costs_its_own_chunk(copy, whole, computed, line):
    with_a_bit_flipped(copy, line)
    for _ in range(2):
        resumed = sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2)
        assert computed == [2]
        chex.assert_trees_all_equal(resumed.metrics, whole.metrics)


def test_torn_line_with_the_next_one_glued_to_it_costs_its_own_chunk(
    copy, whole, computed
):
    lines = copy.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2][:100]
    copy.write_bytes(b"".join(lines))
    resumed = sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2)
    assert computed == [2]
    chex.assert_trees_all_equal(resumed.metrics, whole.metrics)


FULL_DISK = """
    import resource, sys
    limit = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        sweep.run(train, LEVELS, KEYS, path=sys.argv[1], **OPTIONS)
    except OSError as error:
        print(error, *error.__notes__)
"""


@pytest.mark.parametrize("whole_lines", [0, 1, 3, 6])
def test_full_disk_raises_and_the_file_goes_on_when_there_is_room(
    tmp_path, finished, whole, computed, whole_lines
):
    kept = 2 * max(whole_lines - 1, 0)
    path = tmp_path / "sweep.jsonl"
    lines = finished.read_bytes().splitlines(keepends=True)
    limit = len(b"".join(lines[:whole_lines])) + 60
    for _ in range(2):  # the second finds it still full
        code, out, err = processes.end(python(FULL_DISK, path, limit))
        assert code == 0, err
        if whole_lines:
            assert f"keeps {kept} of 12 runs. When it can be written to again" in out
    resumed = sweep.run(train, LEVELS, KEYS, path=path, chunk_size=2)
    assert sum(computed) == 12 - kept
    chex.assert_trees_all_equal(resumed.metrics, whole.metrics)


def test_path_may_be_a_symbolic_link(tmp_path, whole):
    target, link = tmp_path / "data" / "sweep.jsonl", tmp_path / "link.jsonl"
    target.parent.mkdir()
    link.symlink_to(target)  # to a file that is not there yet
    for _ in range(2):
        result = sweep.run(train, LEVELS, KEYS, path=link, chunk_size=2)
        chex.assert_trees_all_equal(result.metrics, whole.metrics)
        assert link.is_symlink()
        assert target.read_bytes().count(b"\n") == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "link.jsonl"]


def test_two_processes_may_start_one_file_at_once(
    tmp_path, whole, computed, monkeypatch
):
    path = tmp_path / "sweep.jsonl"
    read_bytes = pathlib.Path.read_bytes

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
    again = sweep.run(train, LEVELS, KEYS, path=path, chunk_size=2)
    chex.assert_trees_all_equal(again.metrics, whole.metrics)
    assert read_bytes(path).count(b"\n") == 8  # nothing was run again


def test_processes_that_share_one_file_end_alike(tmp_path, whole):
    path = tmp_path / "sweep.jsonl"
    code = "sweep.run(train, LEVELS, KEYS, path=sys.argv[1], **OPTIONS)"
    for process in [python("import sys\n" + code, path) for _ in range(2)]:
        code, _, err = processes.end(process)
        assert code == 0, err
    before = path.read_bytes()
    assert 7 <= before.count(b"\n") <= 14
    again = sweep.run(train, LEVELS, KEYS, path=path, chunk_size=2)
    chex.assert_trees_all_equal(again.metrics, whole.metrics)
    assert path.read_bytes() == before


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
found = sweep.run(train, LEVELS, KEYS, path=path, chunk_size=1).metrics
content = b"".join(found[name].tobytes() for name in sorted(found))
print(sum(chunks), hashlib.sha256(content).hexdigest())
"""


def started_together(number, path, dies="nobody"):
    code, given = JOIN + SWEPT + TOGETHER, (processes.free_address(), path, dies)
    return [
        processes.start("-c", code, rank, number, *given, devices=1)
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
    content = b"".join(whole.metrics[name].tobytes() for name in sorted(whole.metrics))
    digest = hashlib.sha256(content).hexdigest()
    for number in (3 - dies, 1):
        copied = shutil.copy(path, tmp_path / f"{number}.jsonl")
        for code, out, err in ended(started_together(number, copied)):
            assert code == 0, err
            assert out.split()[-2:] == ["8", digest]  # 4 of 12 runs were there


# --- the same training at more levels, with more keys ---------------------------------

MORE_LEVELS = [0.3, 0.0, -np.inf, 0.15, 0.2, 0.1]
MORE_KEYS = jnp.stack([*jax.random.split(jax.random.key(8), 2), *KEYS[::-1]])


def test_file_of_fewer_levels_and_keys_is_extended(copy, computed):
    extended = sweep.run(train, MORE_LEVELS, MORE_KEYS, path=copy)
    assert sum(computed) == 6 * 5 - 4 * 3
    expected = sweep.run(train, MORE_LEVELS, MORE_KEYS)
    chex.assert_trees_all_equal(extended.metrics, expected.metrics)
    np.testing.assert_array_equal(extended.levels, MORE_LEVELS)
    np.testing.assert_array_equal(extended.keys, jax.random.key_data(MORE_KEYS))
    computed.clear()
    part = sweep.run(train, MORE_LEVELS[1:4], MORE_KEYS[1:3], path=copy)
    assert computed == []
    cut = {name: x[1:4, 1:3] for name, x in expected.metrics.items()}
    chex.assert_trees_all_equal(part.metrics, cut)


@pytest.mark.parametrize("torn", [0, 100])
def test_extension_that_is_killed_goes_on_where_it_was(copy, computed, torn):
    killed = KILLED.format(path=str(copy), torn=torn).replace(
        "LEVELS, KEYS", "[0.3, *LEVELS, 0.15], KEYS"
    )
    assert processes.end(python(killed))[0] == -signal.SIGKILL
    extended = sweep.run(train, MORE_LEVELS, KEYS, path=copy, chunk_size=2)
    assert sum(computed) == 0 if not torn else 2
    expected = sweep.run(train, MORE_LEVELS, KEYS)
    chex.assert_trees_all_equal(extended.metrics, expected.metrics)
    again = sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2)  # the first call
    chex.assert_trees_all_equal(
        again.metrics, sweep.run(train, LEVELS, KEYS, chunk_size=2).metrics
    )


# --- files of another sweep -----------------------------------------------------------


def other_metrics(level, key):
    return train(level, key) | {"more": level}


OTHER_DATA = namespace["DATA"].at[7].add(0.001)
OTHERS = {
    "raw keys": ((train, LEVELS, jax.random.key_data(KEYS)), "another kind of keys"),
    "metrics": ((other_metrics, LEVELS, KEYS), "other metrics"),
    "learning rate": (
        (lambda b, k: train(b, k, rate=0.2), LEVELS, KEYS),
        "another train function",
    ),
    "operation": (
        (lambda b, k: train(b, k) | {"w": -train(b, k)["w"]}, LEVELS, KEYS),
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


def test_fingerprint_is_the_same_in_another_process(copy, computed):
    again = f"sweep.run(train, LEVELS, KEYS, path={str(copy)!r}, **OPTIONS)"
    before = copy.read_bytes()
    code, _, err = processes.end(python(again))
    assert code == 0, err
    assert copy.read_bytes() == before


def with_another_header(path, **changed):
    """The file as it would be with another header."""
    first, _, rest = path.read_bytes().partition(b"\n")
    header = json.loads(first.partition(b" ")[2]) | changed
    text = json.dumps(header).encode()
    path.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text) + rest)


def test_file_of_an_earlier_version_is_refused_and_kept(copy):
    # Its fingerprint did not see all data, so its numbers cannot be trusted.
    with_another_header(copy, format="flood_optax.sweep/1")
    before = copy.read_bytes()
    with pytest.raises(ValueError, match="must be a file of this version, got sweep"):
        sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2)
    assert copy.read_bytes() == before


def test_file_of_the_version_before_is_read_and_extended(copy, whole, computed):
    # Its header held the grid, of which the chunks gave numbers, and no settings.
    lines = copy.read_bytes().splitlines()[:4]
    header, *chunks = (json.loads(line.partition(b" ")[2]) for line in lines)
    for number, chunk in enumerate(chunks):
        chunk["runs"] = [2 * number, 2 * number + 1]
    header |= {
        "format": "flood_optax.sweep/2",
        "levels": [repr(float(np.float32(b))) for b in LEVELS],
    }
    header["keys"] = [header.pop("key"), jax.random.key_data(KEYS).tolist()]
    del header["settings"]
    copy.write_bytes(b"".join(map(journal._line, [header, *chunks])))
    with pytest.warns(
        FloodWarning, match="does not say with which version and settings"
    ):
        resumed = sweep.run(train, LEVELS, KEYS, path=copy, chunk_size=2)
    assert computed == [2, 2, 2]
    chex.assert_trees_all_equal(resumed.metrics, whole.metrics)
    again = sweep.run(train, LEVELS, KEYS, path=copy)  # says so now
    chex.assert_trees_all_equal(again.metrics, whole.metrics)
    with (
        jax.threefry_partitionable(False),
        pytest.raises(ValueError, match="partition"),
    ):
        sweep.run(train, LEVELS, KEYS, path=copy)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (jax.threefry_partitionable, "jax_threefry_partitionable True .now False."),
        (
            jax.default_matmul_precision,
            "jax_default_matmul_precision None .now highest.",
        ),
    ],
    ids=["random numbers", "precision"],
)
def test_file_of_other_settings_that_change_numbers_is_refused_and_kept(
    copy, whole, computed, context, message
):
    before = copy.read_bytes()
    value = "highest" if context is jax.default_matmul_precision else False
    with context(value), pytest.raises(ValueError, match=message):
        sweep.run(train, LEVELS, KEYS, path=copy)
    assert copy.read_bytes() == before
    again = sweep.run(train, LEVELS, KEYS, path=copy)  # set back, as the error says
    chex.assert_trees_all_equal(again.metrics, whole.metrics)
    assert computed == []


def test_file_of_another_version_of_jax_is_refused_and_kept(copy):
    now = traced.settings()
    with_another_header(copy, settings=now | {"jax": "0.7.0"})
    before = copy.read_bytes()
    message = rf"with jax 0.7.0 .now {re.escape(jax.__version__)}., .* Set that back"
    with pytest.raises(ValueError, match=message):
        sweep.run(train, LEVELS, KEYS, path=copy)
    assert copy.read_bytes() == before
