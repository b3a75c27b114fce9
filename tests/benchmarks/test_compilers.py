"""What is read out of a compiled program, without a compiler for accelerators."""

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.compilers import hlo, summary
from flood_optax import flood

# Two all-reduces of one channel, and one all-gather driven on by two kernels.
PROGRAM = """\
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[128,96]) -> bf16[128,384] {
  %p = bf16[128,96]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[128,384]{1,0} all-gather(%p), channel_id=7, dimensions={1}
}

%beside (q: bf16[128,96]) -> bf16[128,384] {
  %q = bf16[128,96]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[128,384]{1,0} all-gather(%q), channel_id=7, dimensions={1}
}

ENTRY %main (x: f32[10], y: bf16[128,96]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %y = bf16[128,96]{1,0} parameter(1)
  %one = bf16[128,384]{1,0} fusion(%y), kind=kLoop, calls=%start
  %two = bf16[128,384]{1,0} fusion(%y), kind=kLoop, calls=%beside
  %done = token[] custom-call(%x), custom_call_target="xla_python_gpu_callback"
  %same = f32[10]{0} all-reduce(%x), channel_id=1, to_apply=%add
  ROOT %all-reduce = f32[10]{0} all-reduce(%same), channel_id=1, to_apply=%add
}
"""
REPORT = """\
Memory Space: default (color=0)
Total bytes: 20768256 (19.81MiB)
  cumulative_size;       size

Memory Space: vmem (color=1)
Total bytes: 26952192 (25.70MiB)
"""


def test_collective_in_several_kernels_counts_once():
    found = hlo.Program(PROGRAM).collectives()
    assert found == [("all-gather", 128 * 96 * 2), *[("all-reduce", 40)] * 2]
    apart = PROGRAM.replace("%q), channel_id=7", "%q), channel_id=8")
    assert len(hlo.Program(apart).collectives()) == 4


def test_callback_is_a_host_transfer():
    program = hlo.Program(PROGRAM)
    assert program.host_transfers() == ["xla_python_gpu_callback"]
    assert program.custom_calls() == {"xla_python_gpu_callback": 1}


def test_kernels_are_counted_outside_of_fusions():
    names = [one.name for one in hlo.Program(PROGRAM).kernels]
    assert names == ["one", "two", "done", "same", "all-reduce"]


def test_memory_is_that_of_the_device_and_not_of_the_chip():
    assert hlo.main_memory(REPORT) == 20768256
    with pytest.raises(ValueError, match="No main memory in the report"):
        hlo.main_memory(REPORT.partition("\n\n")[2])


def test_rows_are_compared_with_their_own_reference():
    def row(form, size, **more):
        empty = {"collectives": [], "custom_calls": {}, "host_transfers": []}
        setting = {"target": "t", "model": "m", "dtype": "d", "fsdp": False}
        sizes = dict.fromkeys(summary.RATIOS, size)
        return {**setting, "form": form, "kernels": size, **sizes, **empty, **more}

    rows = [
        row("plain", 10),
        row("MultiSteps(4)", 20),
        row("optax form", 11, collectives=[("all-reduce", 4)]),
        row("wrapper, every_k=4", 15, custom_calls={"callback": 1}),
    ]
    flooded, window = summary.compared(rows, summary.references())
    assert flooded["memory_bytes_ratio"] == 1.1
    assert (flooded["more_collectives"], flooded["more_collective_bytes"]) == (1, 4)
    assert (window["memory_bytes_ratio"], window["more_kernels"]) == (0.75, -5)
    assert window["new_custom_calls"] == ["callback"]


# --- a window of micro-batches: what of it is a branch at run time ---

PARAMS = {"w": jnp.ones((8, 4)), "b": jnp.ones(4)}
BATCHES = jnp.ones((4, 2, 8))


def accumulation(level):
    return flood(optax.adam(1e-2), level, every_k=2)


def multi_steps(level):
    del level
    return optax.MultiSteps(optax.adam(1e-2), 2)


def step(optimizer, carry, x, scale=1.0):
    params, state = carry
    loss_fn = lambda p: scale * jnp.mean((jnp.tanh(x @ p["w"]) + p["b"]) ** 2)
    value, grads = jax.value_and_grad(loss_fn)(params)
    given = {} if isinstance(optimizer, optax.MultiSteps) else {"value": value}
    updates, state = optimizer.update(grads, state, params, **given)
    return optax.apply_updates(params, updates), state


def start(optimizer):
    return PARAMS, optimizer.init(PARAMS)


def trained(make, level, scale=1.0):
    """A training whose window begins with it, and ends alike at every level."""
    optimizer = make(level)
    move = lambda carry, x: (step(optimizer, carry, x, scale), None)
    return jax.lax.scan(move, start(optimizer), BATCHES)[0]


def one_update(make):
    return jax.jit(lambda carry, x: step(make(0.5), carry, x)), start(make(0.5))


def mapped_states(make):
    """Each run has a window of its own, as for all that is known of it."""
    stack = lambda leaf: jnp.stack([leaf] * 3)
    several = jax.vmap(lambda carry, x: step(make(0.5), carry, x), (0, None))
    return jax.jit(several), jax.tree.map(stack, start(make(0.5)))


def mapped_levels(make):
    """As `sweep.run` maps: the runs differ by their level, not by their windows."""
    several = jax.vmap(lambda level, _: trained(make, level, level), (0, None))
    return jax.jit(several), jnp.array([0.1, 0.2, 0.4])


@pytest.mark.parametrize(
    ("make", "mapped", "branches"),
    [
        (accumulation, one_update, 1),
        (accumulation, mapped_levels, 1),
        (accumulation, mapped_states, 0),
        (multi_steps, one_update, 0),
        (multi_steps, mapped_levels, 0),
    ],
)
def test_window_is_a_branch_unless_runs_have_windows_of_their_own(
    make, mapped, branches
):
    """docs/accelerators.md: a conditional skips the inner optimizer, a select not."""
    function, first = mapped(make)
    program = hlo.Program(function.lower(first, BATCHES[0]).compile().as_text())
    assert program.conditionals() == branches
