"""Checkpoints: a restored run goes on bit for bit where it stopped.

This file is also a script, the run that is killed: `FILE DIRECTORY FORMAT [KILL_AT]`.
"""

import functools
import os
import pathlib
import pickle
import signal
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from flood_optax import (
    FloodState,
    average_params,
    averaged,
    flood,
    levels,
    scale_by_flood,
)
from flood_optax.flax import TrainState
from tests import forms, oracles, processes, stores
from tests.marks import slow_but

STEPS, STOP = 22, 11  # micro-steps; STOP is inside a window of 3 and after the warm-up
WEIGHTS = np.float32([3, 0, 5, 1, 16, 2, 7, 0, 1, 5, 2] * 2)


def level():
    """Off, then rising: its place in the schedule is part of the state."""
    return levels.warmup(optax.linear_schedule(2.0, 4.0, 20), 2)


ADAM = optax.adam(optax.exponential_decay(0.1, 10, 0.9))
FORMS = {
    "chain": optax.chain(scale_by_flood(level()), ADAM),
    "band": optax.chain(scale_by_flood(level(), band=0.3), ADAM),
    "wrapper": flood(ADAM, level()),
    "window": flood(ADAM, level(), every_k=3),
    "weighted": flood(ADAM, level(), every_k=3),
    "skipping": flood(
        ADAM,
        level(),
        every_k=lambda window: 2 + window % 2,
        should_skip_update_fn=optax.skip_not_finite,
    ),
    "average": flood(optax.chain(ADAM, average_params(0.5)), level(), every_k=3),
}


def loss_fn(params, x):
    return jnp.mean((jnp.sin(x @ params["w"]) + params["b"] - x[:, 0]) ** 2)


def fresh(form):
    params = {"w": jnp.array([0.3, -1.2, 0.8]), "b": jnp.float32(1.0)}
    return created(params, FORMS[form])


def created(params, optimizer):
    state = TrainState.create(apply_fn=None, params=params, tx=optimizer)
    return state.replace(step=jnp.zeros([], jnp.int32))  # flax starts with an int


@jax.jit
def train_step(state, x, **extra):
    value, grads = jax.value_and_grad(loss_fn)(state.params, x)
    if "weight" in extra:  # what counts nothing may be anything
        value = jnp.where(extra["weight"] == 0, jnp.nan, value)
    return state.apply_gradients(grads=grads, value=value, **extra)


def rows(step):
    return np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)


def train(state, start, stop):
    weigh = state.tx is FORMS["weighted"]
    for step in range(start, stop):
        extra = {"weight": WEIGHTS[step]} if weigh else {}
        state = train_step(state, rows(step), **extra)
    return state


@functools.cache
def trained(form, stop):
    """Without a stop before."""
    return train(fresh(form), 0, stop)


def pickle_save(path, state):
    leaves = state.step, state.params, state.opt_state
    path.write_bytes(pickle.dumps(jax.device_get(leaves)))


def pickle_restore(path, target):
    step, params, opt_state = pickle.loads(path.read_bytes())
    return target.replace(step=step, params=params, opt_state=opt_state)


EVERY_TIME = ("band", "weighted", "average")  # whose states hold all that others do
FORMATS = stores.FORMATS | {"pickle": (pickle_save, pickle_restore)}
quiet_orbax = pytest.mark.filterwarnings("ignore::DeprecationWarning:orbax")


def kept(file_format, path, tree, target):
    """The tree, saved and restored to itself."""
    save, restore = FORMATS[file_format]
    save(path / file_format, tree)
    restored = restore(path / file_format, target)
    chex.assert_trees_all_equal_structs(restored, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, tree)
    chex.assert_trees_all_equal(restored, tree)
    return restored


@quiet_orbax
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("form", slow_but(EVERY_TIME, FORMS))
def test_checkpoint_restored_run_ends_where_the_uninterrupted_one_ends(
    form, file_format, tmp_path
):
    stopped = trained(form, STOP)
    fields = [optax.tree.get(stopped.opt_state, name) for name in FloodState._fields]
    assert all(fields)  # each would be missed
    if form in ("window", "weighted", "skipping", "average"):
        window = stopped.opt_state.flood_window
        assert window.flood_mini_step > 0
        assert all(np.any(leaf) for leaf in jax.tree.leaves(window.flood_grad_mean))
        assert window.flood_value_mean > 0
    if form == "weighted":
        assert window.flood_weight == WEIGHTS[9:STOP].sum()
    if form == "average":
        mean = averaged(stopped.opt_state, stopped.params)
        for name, leaf in mean.items():
            assert (np.asarray(leaf) != stopped.params[name]).all()
    restored = kept(file_format, tmp_path, stopped, fresh(form))
    chex.assert_trees_all_equal(train(restored, STOP, STEPS), trained(form, STEPS))


@quiet_orbax
@pytest.mark.parametrize("file_format", stores.FORMATS)
def test_checkpoint_restores_integer_parameters_without_accumulators(
    file_format, tmp_path
):
    params = {"w": jnp.array([1.0, 2.0]), "index": jnp.array([3, 1])}
    optimizer = flood(optax.sgd(0.1), 0.5, every_k=2)
    grads = {"w": jnp.array([0.5, -1.0]), "index": jnp.array([0, 0])}
    _, state = optimizer.update(grads, optimizer.init(params), params, value=0.25)
    kept(file_format, tmp_path, state, optimizer.init(params))


@quiet_orbax
@pytest.mark.parametrize("file_format", stores.FORMATS)
@pytest.mark.parametrize("first", [None, 0.125], ids=["plain_first", "band_first"])
@pytest.mark.parametrize("form", ["scale_by_flood", "flood", "flood_every_k"])
def test_checkpoint_goes_on_with_a_band_and_without(form, first, file_format, tmp_path):
    slow = 0.625 + 0.3 * np.sin(np.arange(60) / 4)
    noise = np.random.default_rng(5).uniform(-0.1, 0.1, 60)
    before, after = np.split(np.float32(np.round(32 * (slow + noise)) / 32), [33])
    second = 0.125 if first is None else None
    make = functools.partial(forms.OPTAX[form], optax.trace(0.5), 0.625)
    old, new = make(band=first), make(band=second)
    one = jnp.ones([])

    def run(optimizer, state, losses):
        def step(state, loss):
            _, state = optimizer.update(one, state, one, value=loss)
            return state, [optax.tree.get(state, name) for name in FloodState._fields]

        return lax.scan(step, state, losses)

    run = jax.jit(run, static_argnums=0)
    state, _ = run(old, old.init(one), before)
    restored = kept(file_format, tmp_path, state, new.init(one))
    _, found = run(new, restored, after)
    chex.assert_trees_all_equal(found, run(new, state, after)[1])
    if form == "flood_every_k":
        return
    # by hand: the direction is that of the last loss before the checkpoint
    rises = oracles.strokes(before, 0.625, first or 0)[1][-1] < 0
    ends, half = [], second or 0
    for loss in after:
        ends.append(0.625 + half if rises else 0.625 - half)
        rises = loss < ends[-1]
    np.testing.assert_array_equal(found[1], np.float32(ends))


@quiet_orbax
@pytest.mark.parametrize("file_format", stores.FORMATS)
@pytest.mark.parametrize("form", ["chain", "wrapper"])
def test_checkpoint_of_plain_training_is_refused_then_taken_in_parts(
    form, file_format, tmp_path
):
    """Flooding from a plain checkpoint on: the tree differs, the inner state fits."""
    save, restore = FORMATS[file_format]
    plain = train(created(fresh(form).params, ADAM), 0, 5)
    save(tmp_path / "checkpoint", plain)
    with pytest.raises(ValueError, match="do not match"):  # flax's words, and orbax's
        restore(tmp_path / "checkpoint", fresh(form))
    old = restore(tmp_path / "checkpoint", created(fresh(form).params, ADAM))
    start = fresh(form).opt_state
    if form == "chain":
        opt_state = (start[0], old.opt_state)
    else:
        opt_state = start._replace(flood_inner_state=old.opt_state)
    state = fresh(form).replace(params=old.params, opt_state=opt_state)
    # off for two steps of its own schedule, which starts now
    chex.assert_trees_all_close(
        train(state, 5, 7).params, train(plain, 5, 7).params, rtol=1e-6
    )
    later = train(state, 5, 9)
    assert optax.tree.get(later.opt_state, "flood_step") == 4
    assert optax.tree.get(later.opt_state, "flood_below") > 0


# ---- a run that is killed ----


def run(directory, file_format, kill_at):
    """Trains, saves at every fourth step, resumes from the last save; may be killed."""
    save, restore = FORMATS[file_format]
    state, start = fresh("skipping"), 0
    saved = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
    if saved:
        start = max(saved)
        state = restore(directory / str(start), state)
    for step in range(start, STEPS):
        state = train_step(state, rows(step))
        if step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % 4 == 0:
            save(directory / str(step + 1), state)
    stores.flax_save(directory / "end", state)
    print(f"resumed from {start}")  # noqa: T201


def started(*arguments):
    quiet = ("default", "ignore::DeprecationWarning")
    return processes.end(processes.start(__file__, *arguments, filters=quiet))


@pytest.mark.slow  # starts two processes
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is of POSIX systems.")
@pytest.mark.parametrize("file_format", ["flax", "orbax"])
def test_checkpoint_killed_run_resumes_bit_for_bit(file_format, tmp_path):
    code, _, errors = started(tmp_path, file_format, STOP)
    assert code == -signal.SIGKILL, errors
    assert not (tmp_path / "end").exists()
    code, output, errors = started(tmp_path, file_format)
    assert code == 0, errors
    assert output.endswith("resumed from 8\n")
    end = stores.flax_restore(tmp_path / "end", fresh("skipping"))
    chex.assert_trees_all_equal(end, trained("skipping", STEPS))


if __name__ == "__main__":
    last = int(sys.argv[3]) if len(sys.argv) > 3 else None
    run(pathlib.Path(sys.argv[1]), sys.argv[2], last)
