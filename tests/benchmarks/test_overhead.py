"""The tables of the cost compare each step with its own reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import by_hand, overhead
from flood_optax import flood, scale_by_flood

ENVIRONMENT = dict.fromkeys(
    ("commit", "dirty", "command", "jax", "optax", "cpu_count", "cpu")
)


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


SGD = optax.sgd(0.1)
PAIRS = {  # ours, and what people write
    "sign": (
        optax.chain(scale_by_flood(0.3), SGD),
        optax.chain(by_hand.sign(0.3), SGD),
    ),
    "band": (
        optax.chain(scale_by_flood(0.3, band=0.1), SGD),
        optax.chain(by_hand.band(0.3, 0.1), SGD),
    ),
    "window": (flood(SGD, 0.3, every_k=3), by_hand.window(SGD, 0.3, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rival_by_hand_takes_the_steps_of_what_it_is_compared_with(name):
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    losses = (0.5, 0.25, 0.15, 0.35, 0.45, 0.25, 0.1, 0.15, 0.41)

    def updates_of(optimizer):
        state, found = optimizer.init(params), []
        for i, loss in enumerate(losses, 1):
            grads = jax.tree.map(lambda x, i=i: x * i, params)
            updates, state = optimizer.update(
                grads, state, params, value=jnp.float32(loss)
            )
            found += [np.asarray(x) for x in jax.tree.leaves(updates)]
        return found

    ours, rival = map(updates_of, PAIRS[name])
    for mine, other in zip(ours, rival, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)
    signs = [bool(x > 0) for x in ours[::2] if x.any()]
    assert len(set(itertools.pairwise(signs))) > 1  # up and down


@pytest.mark.slow
def test_eager_rows_are_of_every_form_and_a_window_long():
    at = overhead.problem("mlp")
    tried = overhead.variants(at.losses, SGD, rivals=False)
    calls = overhead.eagerly(tried, at)
    assert next(iter(calls)) == "plain, eagerly"
    (_, state) = calls["wrapper, every_k=4, eagerly"]()
    assert state.flood_state.flood_step == 1  # four micro-batches are a window
