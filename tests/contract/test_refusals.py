"""Bad input: each call of refusals.txt gets its error and words. The text is API."""

import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import scipy

import flood_optax
from flood_optax import flood_mean, levels, scale_by_flood, sweep
from flood_optax.objective import relax_loss

TABLE = pathlib.Path(__file__).with_name("refusals.txt").read_text("utf-8")
ROWS = dict(re.findall(r"^(\S.*)\n    (.+)$", TABLE, re.M))

GRADS, LOSSES = jnp.array([1.0, 2.0]), jnp.array([0.1, 0.4, 0.2])
PAIR, TREE = jnp.array([0.1, 0.4]), {"w": jnp.ones(3), "n": jnp.arange(3)}
EIGHT, NAMES = np.dtype(ml_dtypes.float8_e4m3fn), np.array(["cat", "dog"])
KEY, LEVELS = jax.random.key(0), (0.0, 0.2, -np.inf, 0.7)
KEYS = jax.random.split(KEY, 3)
X = np.random.default_rng(0).normal(size=(24, 4))
Y = np.arange(24) % 3
RESULT = sweep.Result(
    np.array([0.2, 0.0, 0.1]),
    {
        "acc": X[:3, :2],
        "loss": X.reshape(3, 2, 16)[..., :4],
        "cube": X[:2].reshape(1, 2, 2, 2),
    },
)


NAMES_OF = {name: getattr(flood_optax, name) for name in flood_optax.__all__}
NAMES_OF |= {"scipy": scipy, "relax_loss": relax_loss, "optax": optax}


def evaluate(call):
    return eval(call, {**NAMES_OF, **globals()})


def update(value, transform=None, **extra_args):
    transform = transform or scale_by_flood(0.5)
    return transform.update(
        GRADS, transform.init(GRADS), GRADS, value=value, **extra_args
    )


def segments(**changes):
    arguments = {"segment_ids": jnp.array([0, 1, 1]), "num_segments": 2} | changes
    return flood_mean(LOSSES, 0.1, over="segment", **arguments)


def hold_out(num_examples=6, num_folds=2, evaluate=None, key=KEY, **given):
    evaluate = evaluate or (lambda model, indices: jnp.ones(indices.shape))
    return levels.held_out_losses(
        lambda indices, key: (),
        *(evaluate, num_examples),
        num_folds=num_folds,
        key=key,
        **given,
    )


def train(level, key):
    return {"losses": jnp.full(30, jax.random.uniform(key) * level)}


@pytest.mark.filterwarnings("ignore::flood_optax.FloodWarning")
@pytest.mark.parametrize("call", ROWS)
def test_bad_input_gets_its_message(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        evaluate(call)
    got = f"{type(caught.value).__name__}: {caught.value}".replace("\n", " ")
    error, words = ROWS[call].split(": ", 1)
    assert got.startswith(error)
    assert words in got


def test_every_row_of_the_table_is_read():
    lines = [line for line in TABLE.splitlines() if line and line[0] != "#"]
    assert len(lines) == 2 * len(ROWS)


@pytest.mark.parametrize(
    "call", ["update(None)", "update(jnp.ones(1))", "flooded(lambda: LOSSES, 0.5)()"]
)
def test_errors_of_shapes_are_raised_at_trace_time(call):
    error, words = ROWS[call].split(": ", 1)
    with pytest.raises(ValueError, match=re.escape(words)):
        jax.jit(lambda _: evaluate(call))(0.0)
    assert error == "ValueError"
