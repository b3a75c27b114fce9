"""flooded and flood_loss: what they call, return, and refuse."""

import functools
import inspect
import typing

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flood_optax import (
    FloodInfo,
    flood,
    flood_loss,
    flooded,
    penalty,
    shapes,
    sharpness,
)
from tests import oracles


def test_flood_loss_level_broadcasts_to_the_loss():
    losses = np.array([[0.05, 0.7, 0.31], [1.9, 0.02, 0.44]])
    levels = np.array([0.1, 0.6, 0.4])
    result = flood_loss(jnp.asarray(losses, jnp.float32), levels)
    np.testing.assert_allclose(result, oracles.bend(losses, levels)[0], rtol=1e-6)


def quartic(params, x, *, scale=1.0):
    return scale * jnp.mean((params["a"] * x**2 - params["b"]) ** 2)


PARAMS = {"a": jnp.float32(0.7), "b": jnp.float32(-0.2)}
X = jnp.array([0.3, -1.1, 0.8])


def test_flooded_calls_loss_fn_once_and_keeps_its_name():
    calls = []

    def loss_fn(w):
        """Documented."""
        calls.append(w)
        return w**2

    wrapped = flooded(loss_fn, 0.5, return_info=True)
    jax.value_and_grad(wrapped, has_aux=True)(0.3)
    assert len(calls) == 1
    assert (wrapped.__name__, wrapped.__doc__) == ("loss_fn", "Documented.")


def test_flooded_has_aux_passes_aux_through():
    def loss_fn(w):
        return w**2, {"w": w}

    (value, aux), slope = jax.value_and_grad(
        flooded(loss_fn, 0.5, has_aux=True), has_aux=True
    )(0.5)
    assert (value, aux["w"], slope) == (0.75, 0.5, -1.0)


@pytest.mark.parametrize("has_aux", [False, True])
def test_flooded_return_info_is_the_raw_loss(has_aux):
    def loss_fn(w):
        return (w**2, "aux") if has_aux else w**2

    value, info = flooded(loss_fn, 0.5, has_aux=has_aux, return_info=True)(0.5)
    assert isinstance(info, FloodInfo)
    assert value == 0.75
    assert (info.loss, info.level, info.multiplier) == (0.25, 0.5, -1.0)
    assert info.aux == ("aux" if has_aux else None)


def test_flooded_jit_traces_once_over_changing_levels():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, level):
        return jax.grad(flooded(quartic, level))(params, X)

    for level in (0.1, 0.3, 5.0, -jnp.inf):
        step(PARAMS, jnp.float32(level))


# ---- what flooded returns ----


def square(w: jax.Array, scale: float = 1.0) -> jax.Array:
    return jnp.sum(scale * w**2)


FLOODED = flooded(square, 0.5)


@functools.wraps(FLOODED)
def wrapped(*args):
    return FLOODED(*args)


class Model:
    loss = FLOODED


HIDDEN = {
    "itself": FLOODED,
    "partial": functools.partial(functools.partial(FLOODED), scale=2.0),
    "wraps": wrapped,
    "method": Model().loss,
    "jit": jax.jit(FLOODED),
    "jit of partial": jax.jit(functools.partial(FLOODED, scale=2.0)),
    "checkpoint": jax.checkpoint(FLOODED),
    "tree_util.Partial": jax.tree_util.Partial(FLOODED),
    "filter_jit": eqx.filter_jit(FLOODED),
    "nnx.jit": nnx.jit(FLOODED),
}
W = jnp.array([0.5, 0.1])
TAKERS = {
    "flooded": lambda f: flooded(f, 0.2),
    "penalty.objective": lambda f: penalty.objective(f, 0.1),
    "penalty.value_and_grad": lambda f: penalty.value_and_grad(f, 0.1),
    "penalty.pair_displacement": lambda f: penalty.pair_displacement(f, W, 0.1),
    "penalty.level_set_drift": lambda f: penalty.level_set_drift(f, W),
    "sharpness.gradient_norm": lambda f: sharpness.gradient_norm(f, W),
    "sharpness.hessian_trace": lambda f: sharpness.hessian_trace(
        f, W, key=jax.random.key(0), num_samples=2
    ),
    "sharpness.top_eigenvalue": lambda f: sharpness.top_eigenvalue(
        f, W, key=jax.random.key(0), num_iterations=1
    ),
}


@pytest.mark.parametrize("call", TAKERS)
def test_a_flooded_function_is_refused_and_its_original_is_not(call):
    """-11.6 was the trace of a flooded bowl, and two floods are plain training."""
    for function in HIDDEN.values():
        with pytest.raises(ValueError, match=r"\(loss_fn\)` is flooded already, got"):
            TAKERS[call](function)
    for original in (square, vars(FLOODED)["__wrapped__"], jax.jit(square)):
        jax.eval_shape(lambda f=original: (TAKERS[call](f), 0.0)[1])


def test_the_original_of_a_flooded_penalty_has_its_penalty():
    """`inspect.unwrap` finds the bare loss, which a remedy must not name."""
    penalised = penalty.objective(square, 0.5)
    with pytest.raises(ValueError, match=r"`.__wrapped__` of what `flooded` returned"):
        flooded(flooded(penalised, 0.5), 0.25)
    assert vars(flooded(penalised, 0.5))["__wrapped__"] is penalised


def test_a_flooded_value_fn_is_refused():
    optimizer = flood(optax.scale_by_backtracking_linesearch(5), 0.5)
    value, grad = jax.value_and_grad(square)(W)
    search = functools.partial(
        optimizer.update, grad, optimizer.init(W), W, value=value, grad=grad
    )
    with pytest.raises(ValueError, match=r"update\(value_fn=...\)` is flooded already"):
        search(value_fn=FLOODED)
    search(value_fn=square)


@pytest.mark.parametrize("has_aux", [False, True])
def test_annotations_say_what_is_returned_with_info(has_aux):
    def plain(w: jax.Array) -> jax.Array:
        return w**2

    def with_aux(w: jax.Array) -> tuple[jax.Array, str]:
        return w**2, "aux"

    loss_fn = with_aux if has_aux else plain
    kept = flooded(loss_fn, 0.5, has_aux=has_aux)
    assert typing.get_type_hints(kept) == typing.get_type_hints(loss_fn)
    assert inspect.signature(kept) == inspect.signature(loss_fn)
    shown = flooded(loss_fn, 0.5, has_aux=has_aux, return_info=True)
    hints = typing.get_type_hints(shown)
    assert hints["w"] is jax.Array
    signature = inspect.signature(shown)
    assert [*signature.parameters] == ["w"]
    for returned in (hints["return"], signature.return_annotation):
        value, info = typing.get_args(returned)
        assert (value, typing.get_origin(info)) == (jax.Array, FloodInfo)
    got = shown(jnp.float32(0.1))
    assert isinstance(got[0], jax.Array)
    assert isinstance(got[1], FloodInfo)
    unsaid = flooded(lambda w: w**2, 0.5, return_info=True)
    assert "return" not in typing.get_type_hints(unsaid)


def test_no_gradient_flows_through_the_info():
    """Of none of its fields: the soft multiplier has a derivative, the loss too."""
    for field in ("loss", "level", "multiplier"):
        slope = jax.grad(
            lambda w, level, field=field: getattr(
                flooded(lambda w: w**2, level, shape=shapes.soft(), return_info=True)(
                    w
                )[1],
                field,
            ),
            (0, 1),
        )(0.3, 0.5)
        assert slope == (0.0, 0.0), field
