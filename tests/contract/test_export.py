"""jax.export of whole train steps: any platform, any batch size, to bytes and back."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from flood_optax import (
    AverageState,
    FloodState,
    FloodWindow,
    FloodWrapperState,
    average_params,
    flood,
    flood_mean,
    flooded,
    levels,
    scale_by_flood,
    shapes,
)
from tests.marks import slow_but

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
LEVEL = 0.9

# Optax registers none of its own states: whoever serialises them does it, once.
for _state in (
    optax.EmptyState,
    optax.MaskedNode,
    optax.MaskedState,
    optax.ScaleByAdamState,
    optax.TraceState,
):
    export.register_namedtuple_serialization(
        _state, serialized_name=f"optax.{_state.__name__}"
    )


def losses_fn(params, x, y):
    return (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


def loss_fn(params, x, y):
    return losses_fn(params, x, y).mean()


def parameters():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=4), jnp.float32),
    }


def batch(rows, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(np.tanh(x).sum(1) + 0.5)


ADAM = optax.with_extra_args_support(optax.adam(0.05))
SKIPPED = optax.chain(
    optax.masked(optax.trace(0.5), {"w": True, "v": False}), optax.scale(-0.1)
)
OPTIMIZERS = {
    "chain": optax.chain(scale_by_flood(LEVEL), ADAM),
    "schedule": optax.chain(scale_by_flood(levels.warmup(LEVEL, 2)), ADAM),
    "band": optax.chain(scale_by_flood(LEVEL, band=0.1), ADAM),
    "average": optax.chain(scale_by_flood(LEVEL), ADAM, average_params(0.5)),
    "wrapper": flood(optax.sgd(0.05, momentum=0.9), LEVEL),
    "window": flood(optax.adam(0.05), LEVEL, every_k=2),
    "skipping": flood(
        SKIPPED,
        LEVEL,
        every_k=lambda window: 1 + window,
        should_skip_update_fn=optax.skip_not_finite,
    ),
}
OBJECTIVES = {
    "flooded": flooded(loss_fn, LEVEL, shape=shapes.soft()),
    "flood_mean": lambda *args: flood_mean(losses_fn(*args), LEVEL, over="example"),
}
FORMS = {name: (loss_fn, made) for name, made in OPTIMIZERS.items()} | {
    name: (made, ADAM) for name, made in OBJECTIVES.items()
}


def train_step(form):
    objective, optimizer = FORMS[form]

    def step(params, state, x, y):
        value, grads = jax.value_and_grad(objective)(params, x, y)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    params = parameters()
    return step, params, optimizer.init(params)


def exported(form, symbolic):
    """The step for all platforms, of one batch size or of any."""
    step, params, state = train_step(form)
    (rows,) = export.symbolic_shape("rows") if symbolic else (6,)
    x = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
    y = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return export.export(jax.jit(step), platforms=PLATFORMS)(params, state, x, y)


@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed", "symbolic"])
@pytest.mark.parametrize("form", FORMS)
def test_export_of_a_train_step_is_portable(form, symbolic):
    program = exported(form, symbolic)
    assert program.platforms == PLATFORMS
    text = program.mlir_module()
    assert "stablehlo." in text
    # JAX itself checks that a symbolic batch is not empty
    calls = set(re.findall(r"custom_call @(\w+)", text))
    assert calls == ({"shape_assertion"} if symbolic else set())
    assert "callback" not in text
    sizes = [str(aval.shape[0]) for aval in program.in_avals[-2:]]
    assert sizes == (["rows"] * 2 if symbolic else ["6"] * 2)


@pytest.mark.parametrize("form", slow_but(["chain"], FORMS))  # two programs each
def test_export_serialised_step_trains_as_the_step_itself(form):
    """Written to bytes and read back; 24 steps, batches of 6, 5, 6, 5, ... rows."""
    pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers.")
    program = export.deserialize(exported(form, symbolic=True).serialize())
    call = jax.jit(program.call)
    step, params, state = train_step(form)
    step = jax.jit(step)
    original = restored = (params, state)
    values = []
    for i in range(24):
        rows = batch(6 - i % 2, seed=i)
        *original, value = step(*original, *rows)
        *restored, restored_value = call(*restored, *rows)
        values.append(float(value))
        chex.assert_trees_all_close(
            (restored, restored_value), (original, value), rtol=2e-5, atol=1e-6
        )
        chex.assert_trees_all_equal_structs(restored[1], state)
        chex.assert_trees_all_equal_shapes_and_dtypes(restored[1], state)
    if form in OPTIMIZERS:
        assert min(values) < LEVEL < max(values)
        # the counters survived: some windows or steps were below, not all
        below = optax.tree.get(restored[1], "flood_below")
        assert 0 < below < optax.tree.get(restored[1], "flood_step")


@pytest.mark.parametrize(
    "state",
    [AverageState, FloodState, FloodWindow, FloodWrapperState],
    ids=lambda s: s.__name__,
)
def test_export_states_are_registered_under_their_public_name(state):
    """The name is in every serialised program: it must not change."""
    with pytest.raises(ValueError, match="uplicate"):
        export.register_namedtuple_serialization(
            state, serialized_name=f"flood_optax.{state.__name__}"
        )
