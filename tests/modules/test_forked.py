"""Many levels that share a trunk: against separate runs, bit for bit."""

import gc
import textwrap
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flood_optax
from flood_optax import shapes, sweep
from flood_optax.sweep import trunk
from tests import processes
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("optimized")

TOY_STATE = jnp.float32(1.3)


def toy_batches(steps):
    return jnp.linspace(0.5, 1.5, steps)


def toy_step(w, x, level):
    def objective(w):
        return 0.7 * (jnp.exp(w * x) - w * x - 1.0) + 0.1 * w**3

    loss, grad = jax.value_and_grad(objective)(w)
    return w - 0.3 * jnp.where(loss < level, -1.0, 1.0) * grad, {"loss": loss, "w": w}


def mlp(form, optimizer, batch=32, steps=70):
    """An MLP on random labels; metrics the loss, the gradient norm and the count."""
    keys = jax.random.split(jax.random.key(3), 4)
    x = jax.random.normal(keys[0], (steps, batch, 8))
    y = jax.random.randint(keys[1], (steps, batch), 0, 3)
    x, y = x.at[:].set(x[:1]), y.at[:].set(y[:1])  # one batch again and again: it falls
    params = {
        "in": jax.random.normal(keys[2], (8, 24)) / 3,
        "out": jax.random.normal(keys[3], (24, 3)) / 5,
    }

    def loss_fn(params, x, y):
        logits = jax.nn.relu(x @ params["in"]) @ params["out"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def make(level):
        if form == "loss":
            return optimizer
        return optax.chain(flood_optax.scale_by_flood(level), optimizer)

    def step(carry, batch, level):
        params, state = carry
        if form == "loss":
            objective = flood_optax.flooded(loss_fn, level, return_info=True)
            (_, info), grads = jax.value_and_grad(objective, has_aux=True)(
                params, *batch
            )
            loss, below = info.loss, info.multiplier < 0
            updates, state = optimizer.update(grads, state, params)
        else:
            loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
            updates, state = make(level).update(grads, state, params, value=loss)
            below = optax.tree.get(state, "flood_below")
        metrics = {"loss": loss, "norm": optax.tree.norm(grads), "below": below}
        return (optax.apply_updates(params, updates), state), metrics

    return step, (params, make(0.0).init(params)), (x, y)


def separately(step, state, batches, levels):
    """The metrics of separate runs, each a scan jitted with the level as argument."""

    @jax.jit
    def alone(level):
        return jax.lax.scan(lambda s, b: step(s, b, level), state, batches)[1]

    return [jax.device_get(alone(jnp.asarray(level))) for level in levels]


def assert_same_bits(result, expected):
    for i, metrics in enumerate(expected):
        assert metrics.keys() == result.metrics.keys()
        for name, value in metrics.items():
            ours = result.metrics[name][i]
            assert (ours.dtype, ours.shape) == (value.dtype, value.shape)
            assert ours.tobytes() == value.tobytes(), (name, i)


def each_alone(step, state, batches, levels):
    """The metrics that `forked` itself gives for one level."""
    runs = [sweep.forked(step, state, batches, [level]).metrics for level in levels]
    return [{name: x[0] for name, x in metrics.items()} for metrics in runs]


PROBLEMS = {
    "toy": lambda: (toy_step, TOY_STATE, toy_batches(200), (0.03, 0.3, -np.inf, 0.1)),
    "toy, few steps": lambda: (toy_step, TOY_STATE, toy_batches(9), (0.03, 0.3, 0.1)),
    "mlp, loss form, momentum": lambda: (
        *mlp("loss", optax.sgd(0.3, momentum=0.9)),
        (0.8, 0.02, 0.2, 1.0),
    ),
    "mlp, optax form, adam": lambda: (
        *mlp("optax", optax.adam(0.02)),
        (0.3, 0.8, 0.05, -np.inf),
    ),
}


@pytest.mark.parametrize("name", slow_but(("toy", "toy, few steps"), PROBLEMS))
def test_forked_equals_separate_runs_bit_for_bit(name):
    step, state, batches, levels = PROBLEMS[name]()
    result = sweep.forked(step, state, batches, levels)
    assert_same_bits(result, separately(step, state, batches, np.float32(levels)))
    finite = [i for i, level in enumerate(levels) if level > 0]
    assert (result.metrics["loss"][finite] < np.array(levels)[finite, None]).any()
    assert result.axes == ("level", "step")
    assert result.steps_run < result.steps_separate


def descent(w, rate, level):
    """The loss is w, so the path is known: down by `rate`, and up below the level."""
    return w - rate * jnp.where(w < level, -1.0, 1.0), {"loss": w}


def test_forked_runs_the_steps_after_the_fork_and_no_more():
    # Losses 1, 15/16, ...: below 3/4 first at step 5, below 1/4 at 13, below 0 at 17;
    # 32 steps, so segments of one step.
    rates = jnp.full(32, 1 / 16)
    result = sweep.forked(descent, jnp.float32(1), rates, [0.25, 0.75, 0.0])
    forks = {0.25: 13, 0.75: 5}
    # Each branch runs from one step before its fork; the lowest level is the trunk.
    assert result.steps_run == 32 + sum(32 - fork + 1 for fork in forks.values())
    assert result.steps_separate == 96


def test_forked_at_a_tie_stays_with_the_trunk():
    # The loss is 1/2 at step 8, the level: it descends, and turns at step 9.
    result = sweep.forked(descent, jnp.float32(1), jnp.full(12, 1 / 16), [0.5, 0.0])
    expected = 1 - np.array([*range(10), 8, 9]) / 16
    np.testing.assert_array_equal(result.metrics["loss"][0], expected)


def test_forked_nan_loss_is_below_no_level():
    def step(w, x, level):
        w, metrics = descent(w, x, level)
        return w, {**metrics, "after": w}

    rates = jnp.full(20, 1 / 16).at[3].set(jnp.nan)
    result = sweep.forked(step, jnp.float32(1), rates, [0.5, 0.0])
    assert np.isnan(result.metrics["loss"][:, 4:]).all()
    np.testing.assert_array_equal(*result.metrics["loss"])
    assert result.steps_run == 20 + 2  # two steps at least are compared


def soft_step(w, x, level):
    return w - x * shapes.soft().multiplier(w - level), {"loss": w}


def logs_level(w, x, level):
    w, metrics = descent(w, x, level)
    return w, {**metrics, "level": level}


@pytest.mark.parametrize("steps", [32, 200])
@pytest.mark.parametrize("levels", [(0.25, 0.75), (-9.0, -8.0)], ids=["met", "never"])
@pytest.mark.parametrize("step", [soft_step, logs_level])
def test_forked_level_used_above_itself_is_refused(step, levels, steps):
    # A level that no loss meets is looked at too: there a soft shape acts as well.
    rates = jnp.full(steps, 1 / 16)
    with pytest.raises(ValueError, match=r"the metric '(loss|level)' differs"):
        sweep.forked(step, jnp.float32(1), rates, levels)


def test_forked_16_bit_losses_are_compared_in_float32():
    # 0.1 in bfloat16 is 0.10009765625, which is not below the float32 level 0.1, but
    # below 0.1003, which in bfloat16 is the same number.
    losses = np.array([1, 0.1, 0.0996], jnp.bfloat16)
    for level, fork in ((0.1, 2), (0.1003, 1)):
        for n in (1, 2, 3):
            found = trunk._fork(losses[:n], np.float32(level), np.float32(0))
            assert found == min(n, fork)


def flooded_step(loss_fn, rate, shape):
    """A step of the optax form on one number; its state remembers the level."""

    def step(carry, x, level):
        w, state = carry
        optimizer = optax.chain(
            flood_optax.scale_by_flood(level, shape=shape), optax.sgd(rate)
        )
        loss, grad = jax.value_and_grad(loss_fn)(w, x)
        updates, state = optimizer.update(grad, state, w, value=loss)
        w = optax.apply_updates(w, updates)
        return (w, state), {"loss": loss, "w": w, "update": updates}

    start = optax.chain(flood_optax.scale_by_flood(0.0), optax.sgd(rate))
    return step, lambda w: (w, start.init(w))


@pytest.mark.parametrize("shape", ["reflect", "pause", "asymmetric"])
@pytest.mark.parametrize("levels", [(-np.inf, 0.5, 0.2), (0.2, 0.5, 0.3), (-np.inf,)])
def test_forked_nan_loss_is_plain_training_at_the_level_off_alone(levels, shape):
    # A loss that is NaN with a finite gradient: a finite level makes NaN updates of it,
    # -inf takes them as they are, so the trunk of -inf goes on where no other does.
    def loss_fn(w, x):
        return w**2 + jax.lax.stop_gradient(jnp.where(x == 5, jnp.nan, 0.0))

    step, start = flooded_step(loss_fn, 0.1, getattr(shapes, shape)())
    batches = jnp.arange(40.0)
    levels = np.float32(levels)
    result = sweep.forked(step, start(jnp.float32(2)), batches, levels)
    assert_same_bits(result, separately(step, start(jnp.float32(2)), batches, levels))
    lost = np.isnan(result.metrics["w"][:, -1])
    np.testing.assert_array_equal(lost, levels > -np.inf)


def raw(bits, dtype):
    return np.array(bits, np.uint64 if dtype == np.int64 else np.uint32).view(dtype)


@pytest.mark.usefixtures("x64")
def test_forked_metrics_keep_every_bit():
    # Signs of zero, payloads of NaN, integers above 2**53, before and after the fork.
    payloads = raw([0x7FC00001, 0x7FC00002, 0xFFC00003, 0x7F800001] * 10, np.float32)
    zeros = np.where(np.arange(40) % 3 == 0, -0.0, 0.0).astype(np.float32)
    large = 2**62 + np.arange(40)
    batches = (np.linspace(0.5, 1.5, 40).astype(np.float32), payloads, zeros, large)

    def step(w, batch, level):
        x, *odd = batch
        w, metrics = toy_step(w, x, level)
        return w, metrics | dict(zip(("nan", "zero", "large"), odd, strict=True))

    levels = np.float32([0.0, 0.3, 0.1])
    result = sweep.forked(step, TOY_STATE, batches, levels)
    assert result.steps_run < result.steps_separate
    assert_same_bits(result, each_alone(step, TOY_STATE, batches, levels))
    for name, odd in zip(("nan", "zero", "large"), batches[1:], strict=True):
        assert [row.tobytes() for row in result.metrics[name]] == [odd.tobytes()] * 3


SHOWN = {  # two values of the level that compare equal in float64, or as numbers
    "sign of zero": lambda level: jnp.where(level > 0.4, -0.0, 0.0),
    "payload of NaN": lambda level: jax.lax.bitcast_convert_type(
        jnp.where(level > 0.4, 0x7FC00001, 0x7FC00000), jnp.float32
    ),
    "int64": lambda level: jnp.where(level > 0.4, 2**53, 2**53 + 1),
    "uint64": lambda level: (
        jnp.uint64(2**63) + jnp.where(level > 0.4, 0, 1).astype("uint64")
    ),
    "float64": lambda level: jnp.where(level > 0.4, 1.0, 1.0 + 2.0**-52),
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.usefixtures("x64")
def test_forked_sees_a_level_in_any_bit_of_a_metric(name):
    def step(w, x, level):
        w, metrics = descent(w, x, level)
        return w, {**metrics, "odd": SHOWN[name](level)}

    rates = jnp.full(32, 1 / 16, jnp.float32)
    with pytest.raises(ValueError, match="the metric 'odd' differs between the levels"):
        sweep.forked(step, jnp.float32(1), rates, np.float32([0.25, 0.5]))


def test_forked_traces_and_compiles_once_for_many_levels_and_seeds(compiled):
    levels, batches = np.linspace(0, 0.5, 21, dtype=np.float32), toy_batches(90)
    starts, results = jnp.float32([1.1, 1.2, 1.3]), []
    for w in starts:
        chex.clear_trace_counter()
        step = chex.assert_max_traces(n=1)(lambda *args: toy_step(*args))
        results.append(sweep.forked(lambda *args, f=step: f(*args), w, batches, levels))
    assert compiled("jit(advance)") == 1
    for w, result in zip(starts, results, strict=True):
        assert_same_bits(result, separately(toy_step, w, batches, levels[:4]))


def test_forked_sees_that_what_a_step_closes_over_has_changed(compiled):
    data, calls = {}, []

    def step(w, x, level):
        w, metrics = toy_step(w, x, level)
        return w, {**metrics, "data": x + data["x"]}

    def heard(w, x, level):
        jax.debug.callback(calls[-1].append, x)
        return toy_step(w, x, level)

    batches = toy_batches(7)
    for number in (0.0, 3.0, 3.0):
        data["x"] = jnp.full((), number)
        result = sweep.forked(step, TOY_STATE, batches, [0.0])
        np.testing.assert_array_equal(result.metrics["data"][0], batches + number)
    assert compiled("jit(advance)") == 2
    for _ in range(2):  # one callback cannot be told from another
        calls.append([])
        sweep.forked(heard, TOY_STATE, batches, [0.0])
        jax.effects_barrier()
    assert [len(each) for each in calls] == [7, 7]


def test_forked_sees_that_a_setting_has_changed_under_which_a_step_is_traced():
    def step(key, x, level):
        key, now = jax.random.split(key)
        return key, {"loss": x + jax.random.normal(now, (3,)).sum()}

    def draws():
        levels = [-np.inf]
        return sweep.forked(step, jax.random.key(0), toy_batches(3), levels).metrics

    (wide,) = draws()["loss"]
    with jax.threefry_partitionable(False):
        (narrow,) = draws()["loss"]
        key = jax.random.key(0)
        for x, found in zip(toy_batches(3), narrow, strict=True):
            key, expected = jax.jit(step)(key, x, 0.0)
            np.testing.assert_allclose(found, expected["loss"], rtol=1e-6)
    assert (wide != narrow).all()


@pytest.mark.slow
def test_forked_keeps_no_more_than_a_few_steps_alive():
    alive = []

    class Data(np.ndarray):
        """An array that can be watched."""

    def step_on(data):
        return lambda w, x, level: toy_step(w + jnp.asarray(data)[0], x, level)

    for number in range(8):
        data = np.full(1000, number / 100, np.float32).view(Data)
        alive.append(weakref.ref(data))
        sweep.forked(step_on(data), TOY_STATE, toy_batches(3), [0.0, 0.1])
        del data
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 4


@pytest.mark.parametrize("number", [9, 200])
def test_forked_reads_the_level_off_the_run_without_flooding(number):
    # Stop and flood: one run and a part.
    step, batches = toy_step, toy_batches(number)
    seen = []

    def level_of(metrics):
        seen.append(metrics)
        return metrics["loss"][number // 2]

    result = sweep.forked(step, TOY_STATE, batches, level_of)
    (plain,) = separately(step, TOY_STATE, batches, np.float32([-np.inf]))
    level = plain["loss"][number // 2]
    np.testing.assert_array_equal(result.levels, [-np.inf, level])
    (metrics,) = seen
    assert {type(x) for x in metrics.values()} == {np.ndarray}
    assert metrics["loss"].tobytes() == plain["loss"].tobytes()
    levels = np.float32([-np.inf, level])
    assert_same_bits(result, separately(step, TOY_STATE, batches, levels))
    first = int(np.argmax(plain["loss"] < level))
    segment = -(-number // 64)
    assert number < result.steps_run <= number + (number - first) + 1 + segment


CHOSEN = {
    "number": (0.1, [-np.inf, 0.1]),
    "list": ([0.3, 0.1], [-np.inf, 0.3, 0.1]),
    "with off": (np.float32([0.3, -np.inf]), [0.3, -np.inf]),
    "off": (-np.inf, [-np.inf]),
    "array": (jnp.float32(0.25), [-np.inf, 0.25]),
}


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CHOSEN)
def test_forked_levels_read_off_the_trunk_stand_beside_it(case, wide, compiled):
    chosen, levels = CHOSEN[case]

    def step(w, x, level):
        w, metrics = toy_step(w, x.astype(w.dtype), level)
        return w, {**metrics, "at": jnp.zeros_like(level) + len(case)}

    with jax.enable_x64(wide):
        result = sweep.forked(step, TOY_STATE, toy_batches(50), lambda _: chosen)
        assert compiled("jit(advance)") == 1
        np.testing.assert_array_equal(np.float32(result.levels), np.float32(levels))
        assert result.metrics["at"].dtype == (np.float64 if wide else np.float32)
        alone, kind = (each_alone, np.float64) if wide else (separately, np.float32)
        levels = result.levels.astype(kind)
        assert_same_bits(result, alone(step, TOY_STATE, toy_batches(50), levels))


def raises(error, message):
    return pytest.raises(error, match=rf"`sweep.forked\(levels\)'s result` {message}")


@pytest.mark.parametrize(
    ("level_of", "refused"),
    [
        (lambda m: np.nan, raises(ValueError, "must not be NaN")),
        (lambda m: None, raises(TypeError, "must be real numbers")),
        (lambda m: [0.1, 0.1], raises(ValueError, "must be distinct")),
        (lambda m: [[0.1]], raises(ValueError, r"must have the shape \[levels\]")),
        (lambda m: m["accuracy"], pytest.raises(KeyError, match="accuracy")),
    ],
    ids=["nan", "none", "equal", "shape", "fails"],
)
def test_forked_error_of_the_function_of_the_trunk_has_the_trunk(level_of, refused):
    with refused as caught:
        sweep.forked(toy_step, TOY_STATE, toy_batches(5), level_of)
    assert "metrics are the attribute `metrics`" in " ".join(caught.value.__notes__)
    (plain,) = separately(toy_step, TOY_STATE, toy_batches(5), np.float32([-np.inf]))
    chex.assert_trees_all_equal(caught.value.metrics, plain)


ON_DEVICES = """
    import jax, jax.numpy as jnp, numpy as np
    from flood_optax import flooded, sweep
    from flood_optax.sweep import cores

    def loss_fn(w, x):
        return (jnp.exp(w * x) - w * x - 1.0).mean()

    def step(w, x, level):
        objective = flooded(loss_fn, level, return_info=True)
        (_, info), grad = jax.value_and_grad(objective, has_aux=True)(w, x)
        return w - 0.3 * grad, {"loss": info.loss}

    batches, levels = jnp.linspace(0.5, 1.5, 320).reshape(40, 8), [0.0, 0.03, 0.2]
    expected = sweep.forked(step, jnp.float32(1.3), batches, levels).metrics["loss"]
    assert (expected[2] < 0.2).sum() > 5 and (expected[1] > 0.03).sum() > 5
    # Threads that enter one collective in other orders would wait for one another.
    cores.ThreadPoolExecutor = None
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
        place = jax.NamedSharding(mesh, jax.P(None, "data"))
        with jax.set_mesh(mesh):
            spread = jax.device_put(batches, place)
            result = sweep.forked(step, jnp.float32(1.3), spread, levels)
        np.testing.assert_allclose(result.metrics["loss"], expected, atol=1e-5)
    print("agree")
"""


@pytest.mark.slow
def test_forked_agrees_on_a_mesh_one_branch_at_a_time():
    process = processes.start("-c", textwrap.dedent(ON_DEVICES), devices=4)
    returned, out, err = processes.end(process)
    assert (returned, out) == (0, "agree\n"), err


def test_forked_level_read_off_a_loss_of_the_trunk_is_a_tie():
    """A mean of 25, so that a compiled step may compare more digits than it returns."""
    step, state, batches = mlp("loss", optax.sgd(0.3), batch=25, steps=24)
    for at in range(4, 20, 5):
        result = sweep.forked(step, state, batches, lambda m, at=at: m["loss"][at])
        below = result.metrics["loss"] < result.levels[1]
        assert (below.argmax(axis=1) == at + 1).all()  # both descend at the tie


def test_forked_progress_counts_every_step(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar(tqdm.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    sweep.forked(toy_step, TOY_STATE, toy_batches(9), [0.0, 0.1, 0.2], progress=True)
    assert (27, 27) in bars
