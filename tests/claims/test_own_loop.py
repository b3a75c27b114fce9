"""Levels in a loop of your own, by the code of choosing-b.md and distributed.md."""

import functools
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import chex
import jax
import numpy as np
import optax
import optuna
import orbax.checkpoint as ocp
import pytest

from flood_optax import flood
from tests import databases, processes
from tests.claims.test_docs import blocks
from tests.marks import slow_but

DOCS = pathlib.Path(__file__).parents[2] / "docs"
STOP_AND_FLOOD, SEARCH = DOCS / "choosing-b.md", DOCS / "distributed.md"
EPOCHS, LOOP = 12, ("def train_epoch", "def train_on")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")


def code(page, definition):
    """The block of the page that has the definition."""
    (block,) = [text for text in blocks(page.read_text()) if definition in text]
    return re.split(r"\n(?:with|scores =) ", block)[0]  # without the page's own run


# ---- stop and flood ----


def defined(names, *definitions):
    """What blocks of the page define that see these names."""
    for definition in definitions:
        text = code(STOP_AND_FLOOD, definition)
        exec(compile(text, str(STOP_AND_FLOOD), "exec"), names)
    names["EPOCHS"] = EPOCHS  # a shorter training
    return names


@functools.cache
def loop():
    names = {"__name__": "own_loop"}
    data = "noise_floor(0.2", "fit, valid, test ="
    return types.SimpleNamespace(**defined(names, *data, *LOOP))


@functools.cache
def accumulating():
    """The same loop, four batches to a window; an epoch of six leaves one open."""
    ours = loop()

    def optimizer(level):
        return flood(optax.adam(0.02), level, every_k=4)

    @jax.jit
    def train_step(state, x, y, level):
        params, opt_state = state
        value, grads = jax.value_and_grad(ours.loss_fn)(params, x, y)
        updates, opt_state = optimizer(level).update(
            grads, opt_state, params, value=value
        )
        closed = optax.tree.get(opt_state, "flood_step") > 0
        recorded = optax.tree.get(opt_state, "flood_value")
        recorded = jax.numpy.where(closed, recorded, value)  # none yet
        return (optax.apply_updates(params, updates), opt_state), recorded

    def start():
        params, _ = ours.start()
        return params, optimizer(-np.inf).init(params)

    names = defined({**vars(ours)}, *LOOP)
    names |= {"train_step": train_step, "start": start}
    return types.SimpleNamespace(**names)


LOOPS = {"loss form": loop, "windows": accumulating}


@pytest.fixture(scope="module", params=slow_but(["loss form"], LOOPS))
def plain(request, tmp_path_factory):
    ours = LOOPS[request.param]()
    with ocp.CheckpointManager(tmp_path_factory.mktemp("plain")) as manager:
        state, mean, least, scores = ours.plain_run(manager)
        seen = {"state": state, "mean": mean, "least": least, "scores": scores}
        yield types.SimpleNamespace(manager=manager, **{**vars(ours), **seen})


def whole(ours, level):
    """The run that is flooded from its first step on."""
    state = ours.start()
    for epoch in range(EPOCHS):
        state, _ = ours.train_epoch(state, epoch, level)
    return state


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(np.any(np.asarray(x) != np.asarray(y)) for x, y in pairs)


def test_branch_of_the_plain_run_is_the_flooded_run_bit_for_bit(plain):
    level = plain.levels.at_best(plain.mean, plain.scores, mode="max", window=3)
    begin = plain.fork(plain.least, level)
    assert 0 < begin < EPOCHS
    flooded = whole(plain, level)
    chex.assert_trees_all_equal(plain.train_on(plain.manager, level, begin), flooded)
    assert differ(flooded, plain.state)


def test_one_batch_below_the_level_is_the_fork_and_not_the_epochs_mean(plain):
    """Where the mean is below is too late: steps before it are turned around."""
    level = plain.mean[-4]
    begin, late = plain.fork(plain.least, level), plain.fork(plain.mean, level)
    assert begin < late < EPOCHS
    flooded = whole(plain, level)
    chex.assert_trees_all_equal(plain.train_on(plain.manager, level, begin), flooded)
    assert differ(plain.train_on(plain.manager, level, late), flooded)
    # and it is the latest epoch that can be the fork
    assert differ(plain.train_on(plain.manager, level, begin + 1), flooded)


def test_level_that_a_batch_loss_equals_is_plain_training_up_to_the_next(plain):
    lowest = np.minimum.accumulate(plain.least)
    at = int(np.flatnonzero(np.diff(lowest) < 0)[-3]) + 1
    level = plain.least[at]
    begin = plain.fork(plain.least, level)
    assert begin > at
    assert plain.fork(plain.least, np.nextafter(level, np.float32(np.inf))) == at
    flooded = whole(plain, level)
    chex.assert_trees_all_equal(plain.train_on(plain.manager, level, begin), flooded)


def test_level_that_no_loss_is_below_is_the_plain_run(plain):
    level = plain.least.min()
    assert plain.fork(plain.least, level) == EPOCHS
    chex.assert_trees_all_equal(
        whole(plain, level)[0], plain.state[0]
    )  # the states remember which level it was


def test_fork_is_at_a_nan_loss_and_nowhere_where_flooding_is_off():
    ours = loop()
    assert ours.fork(np.float32([2.0, np.nan, 0.5]), 1.0) == 1
    assert ours.fork(np.float32([2.0, 1.0, 0.5]), -np.inf) == 3


def test_fewer_checkpoints_give_the_same_branch(tmp_path):
    ours = loop()
    options = ocp.CheckpointManagerOptions(save_interval_steps=4)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        _, mean, least, _ = ours.plain_run(manager)
        level = mean[8]
        begin = ours.fork(least, level)
        assert begin not in manager.all_steps()
        branch = ours.train_on(manager, level, begin)
    chex.assert_trees_all_equal(branch, whole(ours, level))


# ---- the search by several processes ----

CENTRE, PATIENCE, LENGTH = 0.5, 4, 12
OVERFITTING = f"""
import numpy as np

def validation_curve(level):
    # more parameters than examples, in NumPy; the validation error rises again
    rng = np.random.default_rng(0)
    x, w, truth = rng.normal(size=(60, 40)), np.zeros(40), np.append(2.0, np.zeros(39))
    y = x @ truth + rng.normal(size=60)
    for epoch in range({LENGTH}):
        for _ in range(20):
            error = x[:30] @ w - y[:30]
            sign = 1 if np.mean(error**2) >= level else -1
            w = w - 0.02 * sign * x[:30].T @ error / 30
        yield -np.mean((x[30:] @ w - y[30:]) ** 2)
"""
WORKER = """
import itertools, os, pathlib, signal, sys, time

folder, storage, trials, workers, dies_in = pathlib.Path(sys.argv[1]), *sys.argv[2:]
if storage.startswith("/"):
    journal = optuna.storages.journal
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(storage))
search, number = objective, 0

def objective(trial):
    global number, validation_curve
    number += 1
    trial.set_user_attr("process", os.getpid())
    (folder / str(os.getpid())).touch()
    wait_for(lambda: len(list(folder.iterdir())) >= int(workers))  # each has one
    if number == int(dies_in):
        validation_curve = die_after_three(validation_curve)
    if number == 2 and dies_in == "0":
        wait_for((folder / "stale").exists)
    return search(trial)

def die_after_three(curve):
    def dying(level):
        yield from itertools.islice(curve(level), 3)
        time.sleep(2)  # a run without a heartbeat is not given back
        os.kill(os.getpid(), signal.SIGKILL)
    return dying

def wait_for(condition):
    until = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)

work(storage, int(trials))
"""
# what pyproject.toml ignores here, for the processes
FILTERS = "error", "ignore:RetryHeartbeat", "ignore:Argument ``"


def recipe():
    """The page's code for the search, which gives a run up after five seconds."""
    text = code(SEARCH, "def create_study")
    for minutes, seconds in ("interval=60", "interval=1"), ("period=120", "period=5"):
        assert minutes in text
        text = text.replace(minutes, seconds)
    return text


def searching(curve=OVERFITTING):
    names = {"__name__": "own_loop"}
    exec(compile(recipe(), str(SEARCH), "exec"), names)
    exec(code(SEARCH, "def give_back"), names)
    exec(curve, names)
    names["optuna"].logging.set_verbosity(names["optuna"].logging.WARNING)
    return types.SimpleNamespace(**names)


@pytest.fixture
def sqlite(tmp_path):
    return f"sqlite:///{tmp_path}/levels.db"


@pytest.fixture(scope="module")
def server():
    with databases.postgresql() as address:
        yield address


@pytest.fixture
def postgresql(server):
    """Without the study of another test."""
    yield server
    optuna.delete_study(study_name="level", storage=server)


def start_workers(tmp_path, storage, trials, fates):
    """A process for each fate: the run in which it is killed, 0 for none."""
    script, flags = tmp_path / "worker.py", tmp_path / "flags"
    script.write_text(recipe() + OVERFITTING + WORKER)
    flags.mkdir()
    started = []
    for fate in fates:
        arguments = script, flags, storage, trials, len(fates), fate
        started.append(processes.start(*arguments, filters=FILTERS))
        while len(list(flags.iterdir())) < len(started):  # the first has the first run
            assert started[-1].poll() is None, started[-1].stderr.read()
            time.sleep(0.05)
    return started, flags / "stale"


ALONE = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems.")


@ALONE
@pytest.mark.slow  # waits for the heartbeats of killed workers
@pytest.mark.parametrize(
    ("database", "workers", "dies_in"),
    [
        pytest.param("sqlite", 2, 1, id="an enqueued run"),
        pytest.param("sqlite", 2, 2, id="a later run"),
        pytest.param("postgresql", 3, 1, id="PostgreSQL"),
    ],
)
def test_level_of_a_killed_process_is_trained_by_another_and_counted_once(
    tmp_path, request, database, workers, dies_in
):
    ours, trials = searching(), 7
    storage = request.getfixturevalue(database)
    for _ in range(2):  # once is enough, twice is the same
        ours.create_study(storage, CENTRE, PATIENCE)
    fates = [dies_in] + (workers - 1) * [0]
    (doomed, *steady), stale = start_workers(tmp_path, storage, trials, fates)
    code_of_doomed, _, errors = processes.end(doomed)
    assert code_of_doomed == -signal.SIGKILL, errors
    time.sleep(7)  # its last heartbeat is older than the five seconds
    stale.touch()
    for process in steady:
        code_of_steady, _, errors = processes.end(process)
        assert code_of_steady == 0, errors

    state = ours.optuna.trial.TrialState
    study = ours.optuna.load_study(study_name="level", storage=storage)
    ended = study.get_trials(states=(state.COMPLETE, state.PRUNED))
    (lost,) = study.get_trials(states=(state.FAIL,))
    # what the others have begun when the last one ends is counted too
    total = len(ended)
    assert total == len(study.trials) - 1
    assert trials <= total <= trials + workers - 2
    by = [trial.user_attrs["process"] for trial in ended]
    assert by.count(doomed.pid) == dies_in - 1
    assert sum(by.count(process.pid) for process in steady) == total + 1 - dies_in
    assert lost.user_attrs["process"] == doomed.pid
    assert list(lost.intermediate_values) == [0, 1, 2]
    # its level was trained, once, by a process that lives
    (again,) = [trial for trial in ended if trial.params == lost.params]
    assert again.user_attrs["process"] != doomed.pid
    assert (lost.number in (0, 1)) == (dies_in == 1)
    for enqueued in (CENTRE, 0.0):
        assert [trial.params["level"] for trial in ended].count(enqueued) == 1
    for trial in ended:
        level = trial.params["level"]
        assert 0 <= level <= 2 * CENTRE
        curve = list(ours.validation_curve(level))
        assert trial.value == curve[len(trial.intermediate_values) - 1]

    # started again it goes on to the larger number, and not beyond it
    resumed = ours.work(storage, total + 1)
    assert len(resumed.get_trials(states=(state.COMPLETE, state.PRUNED))) == total + 1
    assert ours.work(storage, total + 1).trials[-1].number == total + 1
    assert resumed.best_trial.params["level"] > 0


@ALONE
@pytest.mark.slow
def test_journal_is_shared_by_processes_and_gives_back_what_a_killed_one_held(tmp_path):
    ours, journal = searching(), tmp_path / "levels.log"
    backend = ours.optuna.storages.journal.JournalFileBackend(str(journal))
    storage = ours.optuna.storages.JournalStorage(backend)
    ours.create_study(storage, CENTRE, PATIENCE)
    (doomed, steady), stale = start_workers(tmp_path, journal, 5, [1, 0])
    assert processes.end(doomed)[0] == -signal.SIGKILL
    stale.touch()
    code_of_steady, _, errors = processes.end(steady)
    assert code_of_steady == 0, errors
    study = ours.optuna.load_study(study_name="level", storage=storage)
    ended, running = (ours.optuna.trial.TrialState[s] for s in ("COMPLETE", "RUNNING"))
    (lost,) = study.get_trials(states=(running,))
    assert lost.params["level"] == CENTRE  # that of the rule
    ours.give_back(storage)
    study = ours.work(storage, 6)
    assert not study.get_trials(states=(running,))
    levels_ended = [t.params["level"] for t in study.trials if t.state != lost.state]
    assert levels_ended.count(CENTRE) == 2  # the failed run and the one that ended
    assert [t.state for t in study.trials if t.params == lost.params][-1] == ended


@pytest.mark.slow
@pytest.mark.parametrize("diverges", [">= 0", "> 0.3"], ids=["all", "high levels"])
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_search_whose_runs_end_in_nan_ends_after_as_many_runs(
    request, database, diverges
):
    ours = searching(
        "def validation_curve(level):\n"
        f"    yield from (0.5, float('nan') if level {diverges} else 0.5 + level)\n"
    )
    storage = request.getfixturevalue(database)
    ours.create_study(storage, CENTRE, PATIENCE)
    study = ours.work(storage, 9)
    assert len(study.trials) == 9
    ended_in_nan = [math.isnan(t.intermediate_values[1]) for t in study.trials]
    states = ["PRUNED" if nan else "COMPLETE" for nan in ended_in_nan]
    assert [trial.state.name for trial in study.trials] == states
    assert any(ended_in_nan)
    assert all(ended_in_nan) == (diverges == ">= 0")


def test_runs_that_are_behind_are_pruned_but_not_before_levels_differ():
    ours = searching()
    storage = ours.optuna.storages.InMemoryStorage()
    ours.create_study(storage, CENTRE, PATIENCE)
    study = ours.work(storage, 4)  # which the pruner lets end
    assert all(len(t.intermediate_values) == LENGTH for t in study.trials)
    study.enqueue_trial({"level": 2 * CENTRE})  # which underfits
    pruned = ours.work(storage, 5).trials[-1]
    assert pruned.state == ours.optuna.trial.TrialState.PRUNED
    assert PATIENCE <= max(pruned.intermediate_values) < LENGTH - 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="Its environment needs uv.")
def test_ray_tune_trains_the_levels_of_the_page_on_two_workers(tmp_path):
    (text,) = re.findall(
        r"```py\n(from ray import .*?)```", SEARCH.read_text(), re.DOTALL
    )
    script = tmp_path / "ray_tune.py"
    script.write_text(
        "import ray\nray.init(num_cpus=2, include_dashboard=False)\n"
        + OVERFITTING
        + text.replace("num_samples=24", "num_samples=5")
        + "print('best', best.config['level'], best.metrics['score'])\n"
    )
    environment = ["--no-project", "--isolated", "--with", "ray[tune],optuna,numpy"]
    run = subprocess.run(
        ["uv", "run", "--python", sys.executable, *environment, "python", str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    if "No solution found" in run.stderr or "Failed to fetch" in run.stderr:
        pytest.skip("Ray cannot be installed here.")
    assert run.returncode == 0, run.stderr[-3000:]
    (best,) = re.findall(r"^best (\S+) (\S+)$", run.stdout, re.MULTILINE)
    level, score = map(float, best)
    assert score == list(searching().validation_curve(level))[-1]
    ended = re.findall(r"TERMINATED +([\d.]+)", run.stdout)
    assert {"0.5", "0"} <= {*ended}
    assert level > 0
