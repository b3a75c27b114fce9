"""Many levels and seeds in one program: against single runs, one by one."""

import functools
import inspect
import re
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flood_optax
from flood_optax import sweep
from flood_optax.sweep import placement
from tests import processes

LEVELS = (0.0, 0.2, -np.inf, 0.7)
KEYS = jax.random.split(jax.random.key(0), 3)


def loss_fn(w):
    return jnp.exp(w) - w - 1.0  # asymmetric; least, 0, at w = 0


def train(level, key, steps=30):
    def step(w, _):
        grad = jax.grad(flood_optax.flooded(loss_fn, level))(w)
        w = w - 0.1 * grad
        return w, loss_fn(w)

    w = jax.random.uniform(key, (2,), minval=0.5, maxval=1.5)[1]
    w, losses = jax.lax.scan(step, w, length=steps)
    return {"w": w, "losses": losses, "below": (losses < level).sum()}


every_strategy = pytest.mark.parametrize("strategy", ["vmap", "map", "shard"])


@pytest.fixture(scope="module")
def expected():
    """The losses by NumPy from the definition, in float64."""
    starts = [jax.random.uniform(k, (2,), minval=0.5, maxval=1.5)[1] for k in KEYS]
    w, levels = np.tile(np.float64(starts), (4, 1)), np.array(LEVELS)[:, None]
    losses = []
    for _ in range(30):
        sign = np.where(np.exp(w) - w - 1.0 < levels, -1.0, 1.0)
        w = w - 0.1 * sign * (np.exp(w) - 1.0)
        losses.append(np.exp(w) - w - 1.0)
    return np.stack(losses, axis=-1)


# --- run: traces, compilations, layout ------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "processes", "expected"),
    [
        *[("cpu", 1, "map"), ("gpu", 1, "vmap"), ("tpu", 1, "vmap")],
        *[("cpu", 2, "shard"), ("tpu", 4, "shard")],
    ],
)
def test_run_without_a_strategy_is_the_fastest_that_trains_no_run_twice(
    monkeypatch, backend, processes, expected
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    trainer, context = placement.placement(None, None)
    due, same_context = placement.placement(expected, None)
    assert getattr(trainer, "func", trainer) == getattr(due, "func", due)
    assert context is same_context
    assert inspect.signature(sweep.run).parameters["strategy"].default is None


@every_strategy
def test_run_traces_and_compiles_once_for_51_levels_and_10_keys(strategy, compiled):
    chex.clear_trace_counter()
    counted = chex.assert_max_traces(n=1)(train)
    keys = jax.random.split(jax.random.key(1), 10)
    sweep.run(train, [0.1], keys[:1], strategy=strategy)  # which puts arguments apart
    before = compiled()
    result = sweep.run(
        lambda level, key: counted(level, key),
        np.linspace(0, 0.5, 51),
        keys,
        strategy=strategy,
        chunk_size=100,  # 510 runs: the last chunk is padded
    )
    assert compiled() == before + 1
    assert result.metrics["losses"].shape == (51, 10, 30)


@every_strategy
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 100])
def test_run_equals_single_runs_in_numpy(strategy, chunk_size, expected):
    result = sweep.run(train, LEVELS, KEYS, strategy=strategy, chunk_size=chunk_size)
    np.testing.assert_allclose(result.metrics["losses"], expected, rtol=1e-4, atol=1e-6)
    below = (expected < np.array(LEVELS)[:, None, None]).sum(axis=-1)
    np.testing.assert_array_equal(result.metrics["below"], below)
    assert below[1].min() > 5
    assert below[3].max() < 30
    assert result.metrics["below"].dtype == np.int32


def test_run_result_is_indexed_by_level_then_key():
    def train(level, key):
        return {"level": level, "draw": jax.random.uniform(key), "fixed": np.ones(2)}

    result = sweep.run(train, LEVELS, KEYS)
    np.testing.assert_array_equal(
        result.metrics["level"], np.float32(LEVELS)[:, None] + np.zeros(3, np.float32)
    )
    draws = [float(jax.random.uniform(key)) for key in KEYS]
    np.testing.assert_array_equal(result.metrics["draw"], np.float32([draws] * 4))
    assert result.metrics["fixed"].shape == (4, 3, 2)
    np.testing.assert_array_equal(result.levels, LEVELS)
    assert result.axes == ("level", "key")
    np.testing.assert_array_equal(result.keys, jax.random.key_data(KEYS))


def test_run_keys_may_be_given_in_any_form():
    expected = sweep.run(train, LEVELS, KEYS).metrics
    words = jax.random.key_data(KEYS)
    for keys in (words, np.asarray(words), [KEYS[0], KEYS[1], KEYS[2]]):
        chex.assert_trees_all_equal(sweep.run(train, LEVELS, keys).metrics, expected)


@pytest.mark.usefixtures("x64")
def test_run_levels_of_float64_stay_float64():
    seen = []

    def train(level, key):
        seen.append(level.dtype)
        return {"level": level}

    levels = np.array([0.1, 0.1 + 1e-12])
    result = sweep.run(train, levels, KEYS)
    np.testing.assert_array_equal(result.metrics["level"][:, 0], levels)
    assert seen == [np.float64]


@pytest.fixture
def programs(monkeypatch):
    """The programs that `sweep.run` calls, each with what it gives them."""
    calls = []

    def spied(program):
        def call(*arguments):
            calls.append((program, *arguments))
            return program(*arguments)

        return call

    vmapped, over_cores = placement.vmapped, placement.over_cores

    def first_of_the_runs(program, runs, keep):
        calls.append((program, *runs[0]))
        return over_cores(program, runs, keep)

    monkeypatch.setattr(placement, "vmapped", lambda traced: spied(vmapped(traced)))
    monkeypatch.setattr(placement, "over_cores", first_of_the_runs)
    return calls


def lowered(program, *arguments):
    return program.lower(*arguments).compile()


@pytest.mark.slow
def test_map_memory_does_not_grow_with_the_number_of_levels(programs):
    def train(level, key):
        big = jax.random.normal(key, (200, 200)) * level
        return {"trace": jnp.trace(big @ big @ big)}

    def temporary_bytes(strategy, number):
        levels = jnp.linspace(0, 1, number)
        sweep.run(train, levels, KEYS[:1], strategy=strategy)
        return lowered(*programs[-1]).memory_analysis().temp_size_in_bytes

    assert temporary_bytes("map", 64) == temporary_bytes("map", 4)
    assert temporary_bytes("vmap", 64) > 8 * temporary_bytes("vmap", 4)


def draws_much(level, key):
    """Half of its work, its batches, depends on the key alone."""

    def step(w, key):
        x = jax.random.normal(key, (8, 8))
        w = w - 0.1 * jax.grad(flood_optax.flooded(loss_of, level))(w, x @ x)
        return w, loss_of(w, x)

    def loss_of(w, x):
        return jnp.mean((x @ w) ** 2)

    w, losses = jax.lax.scan(step, jnp.ones(8), jax.random.split(key, 4))
    return {"w": w, "losses": losses}


@pytest.mark.parametrize("num_keys", [1, 3])
def test_vmap_computes_what_depends_on_a_key_once_for_all_levels(programs, num_keys):
    levels, keys = jnp.linspace(0, 1, 16), KEYS[:num_keys]
    result = sweep.run(draws_much, levels, keys, strategy="vmap")
    ((program, *given),) = programs
    flops = lowered(program, *given).cost_analysis()["flops"]
    by_hand = jax.jit(jax.vmap(draws_much, (0, None)))
    assert (
        flops <= num_keys * lowered(by_hand, levels, keys[0]).cost_analysis()["flops"]
    )
    every_run = jax.jit(jax.vmap(draws_much))  # draws for every level
    apart = lowered(every_run, levels, jnp.stack([keys[0]] * 16))
    assert flops < 0.6 * num_keys * apart.cost_analysis()["flops"]
    for j, key in enumerate(keys):
        alone = {name: x[:, j] for name, x in result.metrics.items()}
        chex.assert_trees_all_close(alone, by_hand(levels, key), rtol=1e-5)


@pytest.mark.parametrize(
    ("num_levels", "num_keys", "chunk_size", "devices", "shapes"),
    [
        (33, 1, 32, 1, [(1, 17)] * 2),  # 34 runs for 33, not 64
        (16, 4, None, 1, [(4, 16)]),
        (16, 4, 32, 1, [(2, 16)] * 2),
        (16, 4, 47, 1, [(2, 16)] * 2),
        (16, 5, 48, 1, [(3, 16)] * 2),
        (10, 2, 7, 1, [(1, 5)] * 4),
        (64, 1, None, 8, [(8, 8)]),  # a part of the levels on each device
        (16, 4, None, 8, [(8, 8)]),
        (5, 8, 5, 4, [(4, 5)] * 2),
        (3, 1, 99, 4, [(4, 1)]),
    ],
)
def test_chunks_are_balanced_and_hold_every_run(
    num_levels, num_keys, chunk_size, devices, shapes
):
    number = num_levels * num_keys
    levels, words = np.arange(num_levels), np.arange(num_keys)[:, None]
    runs = placement.Runs(np.arange(number), levels, words)
    tables = placement.tables(runs, chunk_size, watched=False, devices=devices)
    assert [table.shape for table in tables] == shapes
    np.testing.assert_array_equal(np.unique(tables), np.arange(number))
    for table in tables:  # a row is of one key
        np.testing.assert_array_equal(runs.of(table)[1][..., 0], (table % num_keys))
        assert (table % num_keys == table[:, :1] % num_keys).all()


@every_strategy
def test_chunks_of_missing_runs_are_balanced(
    strategy, monkeypatch, tmp_path, computed, expected
):
    monkeypatch.setattr(placement, "number_of_cores", lambda: 1)
    path = tmp_path / "sweep.jsonl"
    sweep.run(train, LEVELS[:1], KEYS[:1], path=path)
    options = {"strategy": strategy, "chunk_size": 8, "path": path}
    result = sweep.run(train, LEVELS, KEYS, **options)
    assert computed == [1, *([7, 4] if strategy == "vmap" else [6, 5])]
    np.testing.assert_allclose(result.metrics["losses"], expected, rtol=1e-4, atol=1e-6)


def test_run_progress_advances_once_a_chunk(bars):
    sweep.run(train, LEVELS, KEYS, progress=True, chunk_size=5)
    assert bars.updates == [(4, 12)] * 3


def test_run_progress_puts_no_callback_into_the_program(programs):
    sweep.run(train, LEVELS, KEYS, progress=True, chunk_size=5)
    text = lowered(*programs[0]).as_text()
    assert not re.search(r"custom_call_target=\S*callback", text)
    assert "while" in text  # it is the program that was looked at


def test_progress_without_tqdm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install 'flood_optax\[bench\]'"):
        sweep.run(train, LEVELS, KEYS, progress=True)


# --- run: how it calls what it trains, and the notes of its errors -------------------


def test_run_branch_on_the_level_gets_a_note():
    def shaped_by_level(level, key):
        return {"a": jnp.zeros(3 if level > 0.5 else 2)}

    error = jax.errors.TracerBoolConversionError
    with pytest.raises(error, match="Attempted boolean conversion") as caught:
        sweep.run(shaped_by_level, LEVELS, KEYS)
    notes = "".join(caught.value.__notes__)
    assert "`sweep.run(train)` must be traceable: it is traced once" in notes


@pytest.mark.parametrize(
    ("function", "note"),
    [
        (lambda b, k: {"x": float(b)}, "must be traceable.*instead of `float.level.`"),
        (lambda k, b: {"x": jax.random.uniform(k) * b}, r"called with \(level, key\)"),
    ],
    ids=["float", "swapped without names"],
)
def test_run_error_of_train_has_a_note_that_says_how_it_is_called(function, note):
    with pytest.raises(Exception, match=r"concrete value|PRNG key") as caught:
        sweep.run(function, LEVELS, KEYS)
    assert re.search(note, " ".join(caught.value.__notes__))


def test_run_train_may_have_more_arguments_that_need_not_be_given():
    bound, either = functools.partial(train, steps=4), lambda *runs: train(*runs)
    for function, steps in ((bound, 4), (jax.jit(bound), 4), (train, 30), (either, 30)):
        losses = sweep.run(function, LEVELS, KEYS).metrics["losses"]
        assert losses.shape == (4, 3, steps)


@pytest.mark.parametrize("seeds", [[0, 1, 2], (3, 5), np.arange(2)], ids=str)
def test_run_takes_the_keys_that_the_refusal_of_seeds_names(seeds):
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    draws = sweep.run(lambda b, k: {"x": jax.random.uniform(k)}, [0.1], keys).metrics
    alone = [jax.random.uniform(jax.random.key(int(seed))) for seed in seeds]
    np.testing.assert_array_equal(draws["x"][0], np.stack(alone))


# --- run: many devices, many processes ------------------------------------------------

SHARDED = """
    import jax, jax.numpy as jnp, numpy as np
    from flood_optax import sweep
    assert jax.device_count() == 4
    data = jnp.linspace(0.0, 1.0, 50)

    def train(level, key):
        noisy = data + jax.random.normal(key, (50,))

        def body(w, x):
            w = w - 0.1 * jnp.where((w - x) ** 2 < level, -1, 1) * (w - x)
            return w, w

        w, curve = jax.lax.scan(body, 0.0, noisy)
        return {"w": w, "curve": curve, "positive": w > 0}

    levels, keys = [0.0, 0.1, 0.3, 0.5, 0.9], jax.random.split(jax.random.key(2), 2)
    expected = sweep.run(train, levels, keys, strategy="map").metrics

    def check(strategy="shard", **options):
        metrics = sweep.run(train, levels, keys, strategy=strategy, **options).metrics
        assert metrics.keys() == expected.keys()
        for name, value in metrics.items():
            assert value.dtype == expected[name].dtype
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)

    check()
    check(chunk_size=1)
    check(mesh=jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b")))
    check(mesh=jax.sharding.Mesh(np.array(jax.devices()[:3]), ("a",)), chunk_size=2)
    from flood_optax.sweep import placement

    placement.on_cpu, actual = lambda mesh: False, placement.on_cpu
    check()  # as on accelerators
    check(chunk_size=2)
    placement.on_cpu = actual
    from jax.sharding import AxisType

    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
        check(mesh=mesh)
        with jax.set_mesh(mesh):
            for strategy in ("map", "vmap", "shard"):
                check(strategy=strategy)
            check(mesh=mesh, chunk_size=1)
            spread = jax.device_put(data, jax.NamedSharding(mesh, jax.P()))
        local = data
        for data in (spread, np.asarray(spread)):
            refused = isinstance(data, jax.Array)
            try:
                check()
            except ValueError as error:
                assert refused and "`np.asarray(array)`" in str(error), error
            else:
                assert not refused
        data = local
    print("agree")
"""


@pytest.mark.slow
def test_shard_agrees_over_four_devices_that_do_not_divide_the_runs():
    process = processes.start("-c", textwrap.dedent(SHARDED), devices=4)
    returned, out, err = processes.end(process)
    assert (returned, out) == (0, "agree\n"), err
