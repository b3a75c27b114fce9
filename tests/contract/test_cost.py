"""What flooding costs, by the compiler's own count: no clock."""

import functools
import gzip
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import by_hand
from flood_optax import average_params, flood, flooded, scale_by_flood
from tests.marks import slow_but

SIZES = (64, 256, 256, 10)


def problem(sizes=SIZES):
    keys = jax.random.split(jax.random.key(0), 5)
    params = [
        (jax.random.normal(keys[0], (m, n)) / m**0.5, jnp.zeros(n))
        for m, n in itertools.pairwise(sizes)
    ]
    x = jax.random.normal(keys[3], (128, 64))
    y = jax.random.randint(keys[4], (128,), 0, 10)

    def loss_fn(params):
        hidden = x
        for w, b in params[:-1]:
            hidden = jax.nn.relu(hidden @ w + b)
        w, b = params[-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ w + b, y)
        return losses.mean()

    return loss_fn, params


def step_of(form, sizes=SIZES):
    loss_fn, params = problem(sizes)
    inner = optax.adam(1e-3)
    optimizer = {
        "optax form": optax.chain(scale_by_flood(0.3), inner),
        "wrapper": flood(inner, 0.3),
        "sign one-liner": optax.chain(by_hand.sign(0.3), inner),
        "band": optax.chain(scale_by_flood(0.3, band=0.06), inner),
        "wrapper with band": flood(inner, 0.3, band=0.06),
    }.get(form, optax.with_extra_args_support(inner))
    objective = flooded(loss_fn, 0.3) if form == "loss form" else loss_fn

    def step(params, state):
        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return step, params, optimizer.init(params)


@functools.cache
def compiled(form):
    step, *arguments = step_of(form)
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


@pytest.mark.parametrize(
    "form", ["loss form", "optax form", "wrapper", "band", "wrapper with band"]
)
def test_flooded_step_costs_what_the_plain_step_costs(form):
    plain, flooding = compiled("plain"), compiled(form)
    flops = [c.cost_analysis()["flops"] for c in (flooding, plain)]
    # one multiplication of each gradient, as the sign one-liner's, and some scalars
    assert flops[1] < flops[0] <= 1.0034 * flops[1]
    if form != "loss form":  # one multiplication of each gradient, and some scalars
        one_liner = compiled("sign one-liner").cost_analysis()["flops"]
        assert 0 < flops[0] - one_liner <= 200
    memory = [c.memory_analysis().temp_size_in_bytes for c in (flooding, plain)]
    assert memory[0] <= 1.002 * memory[1]


@pytest.mark.parametrize(
    ("form", "scalars", "per_leaf"),
    [
        *(("loss form", 30, 0), ("optax form", 50, 1), ("wrapper", 50, 1)),
        *(("band", 60, 1), ("wrapper with band", 60, 1)),
    ],
)
def test_flooding_adds_few_equations_whatever_the_model(form, scalars, per_leaf):
    """Some for the loss, and one for each gradient: the sign one-liner adds two."""

    def added(sizes):
        def count(form):
            step, *arguments = step_of(form, sizes)
            return len(jax.make_jaxpr(step)(*arguments).eqns)

        return count(form) - count("plain")

    leaves, more_leaves = 2 * (len(SIZES) - 1), 8
    few, many = added(SIZES), added((*SIZES[:-1], 32, 32, 32, 32, SIZES[-1]))
    assert many - few == per_leaf * more_leaves
    assert 0 < few - per_leaf * leaves <= scalars


@pytest.mark.parametrize(
    "given", [{}, pytest.param({"weight": 2.0}, marks=pytest.mark.slow, id="weighted")]
)
def test_window_holds_and_moves_no_more_than_one_written_by_hand(given):
    loss_fn, params = problem()

    def measured(optimizer, **given):
        def step(params, state, given):
            value, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(
                grads, state, params, value=value, **given
            )
            return optax.apply_updates(params, updates), state

        arguments = params, optimizer.init(params), given
        done = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
        return np.array(
            [
                done.memory_analysis().temp_size_in_bytes,
                done.cost_analysis()["bytes accessed"],
            ]
        )

    inner = optax.adam(1e-3)
    ours = measured(flood(inner, 0.3, every_k=4), **given)
    hand = measured(by_hand.window(inner, 0.3, 4))
    multi_steps = optax.MultiSteps(inner, 4).gradient_transformation()
    stock = measured(optax.with_extra_args_support(multi_steps))
    assert (ours <= hand + 2048).all(), (ours, hand)  # some scalars
    assert (ours < 0.9 * stock).all()


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", slow_but(["sgd"], ["sgd", "adam", "windows"]))
def test_average_reads_and_writes_itself_and_reads_the_new_parameters(name):
    """As the recipe by hand does, and with no memory more than its own."""
    loss_fn, params = problem()
    inner = optax.sgd(1e-3) if name == "sgd" else optax.adam(1e-3)

    def make(*average):
        if name == "windows":
            return flood(optax.chain(inner, *average), 0.3, every_k=4)
        return optax.chain(scale_by_flood(0.3), inner, *average)

    def measured(optimizer, *kept):
        def step(params, state, *kept):
            value, grads = jax.value_and_grad(loss_fn)(params)
            updates, state = optimizer.update(grads, state, params, value=value)
            params = optax.apply_updates(params, updates)
            kept = [optax.incremental_update(params, a, 0.01) for a in kept]
            return params, state, *kept

        arguments = params, optimizer.init(params), *kept
        donated = range(len(arguments))
        done = jax.jit(step, donate_argnums=tuple(donated)).lower(*arguments).compile()
        return np.array(
            [
                done.cost_analysis()["bytes accessed"],
                done.memory_analysis().temp_size_in_bytes,
                done.memory_analysis().alias_size_in_bytes,
                size(arguments),
            ]
        )

    plain = measured(make())
    more = (measured(make(average_params(0.99))) - plain) / size(params)
    recipe = (measured(make(), params) - plain) / size(params)
    # In windows it reads the parameters and their updates in a branch of its own, and
    # the branch that waits hands the average on: what is counted is the sum of both.
    reads = 6 if name == "windows" else 3
    np.testing.assert_allclose(more[0], reads, atol=0.01)
    np.testing.assert_allclose(recipe[0], 3, atol=0.01)
    largest = max(leaf.nbytes for leaf in params[1]) / size(params)
    assert more[1] <= (largest + 1e-3 if name == "windows" else 0)
    np.testing.assert_allclose(more[2:], 1, atol=1e-3)  # kept in place


@pytest.mark.parametrize(
    ("form", "without"), [("band", "optax form"), ("wrapper with band", "wrapper")]
)
def test_band_costs_a_few_scalars(form, without):
    banded, plain = compiled(form), compiled(without)
    flops = [c.cost_analysis()["flops"] for c in (banded, plain)]
    assert 0 < flops[0] - flops[1] <= 1e-5 * flops[1]
    memory = [c.memory_analysis().temp_size_in_bytes for c in (banded, plain)]
    assert memory[0] <= memory[1] + 256


def executions(run, folder):
    """How many programs of XLA ran, by the profiler's own events."""
    for _ in range(2):
        run()  # compiles
    with jax.profiler.trace(folder):
        run()
    (written,) = folder.glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]
    return sum(event.get("name", "").endswith(ONE_EXECUTION) for event in events)


ONE_EXECUTION = "LoadedExecutable::ExecuteHelperOnSingleDevice"
LEAVES = {f"layer{i}": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)} for i in range(3)}


def eagerly(optimizer, steps=1, **extra):
    """A function that takes so many eager steps of Adam with 6 leaves."""
    optimizer = optax.with_extra_args_support(optimizer)
    carry = [optimizer.init(LEAVES)]
    value = jnp.float32(0.3)

    def run():
        for _ in range(steps):
            updates, carry[0] = optimizer.update(
                LEAVES, carry[0], LEAVES, value=value, **extra
            )
        jax.block_until_ready((updates, carry))

    return run


ADAM = optax.adam(1e-3)
EAGER = {
    # form -> a function of steps, how many programs more than plain Adam a step
    "chain": (eagerly(optax.chain(scale_by_flood(0.5), ADAM)), 2),
    "flood": (eagerly(flood(ADAM, 0.5)), 2),
    "band": (eagerly(optax.chain(scale_by_flood(0.5, band=0.1), ADAM)), 2),
    "weight": (eagerly(flood(ADAM, 0.5), weight=2.0), 6),
    # four micro-batches, a step of Adam: less than one more
    "windows": (eagerly(flood(ADAM, 0.5, every_k=4), steps=4), 14),
}


@pytest.fixture(scope="module")
def executions_without_flooding(tmp_path_factory):
    """Of a step of plain Adam, and of one behind the sign one-liner."""
    behind = optax.chain(by_hand.sign(0.3), ADAM)
    folders = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("sign")
    return [*map(executions, map(eagerly, (ADAM, behind)), folders)]


@pytest.mark.parametrize("form", EAGER)
def test_flooding_runs_few_programs_more_eagerly(
    form, tmp_path, executions_without_flooding
):
    plain, sign = executions_without_flooding
    assert 60 < plain < sign  # there are such events
    run, more = EAGER[form]
    found = executions(run, tmp_path)
    assert plain < found <= plain + more
