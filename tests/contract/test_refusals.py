"""Bad input: each call of refusals.txt gets its error and words. The text is API.

A row is a call, its error and its words. `@name a | b` names a set; `<name>` in a row
stands for each of its members in turn.
"""

import itertools
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
from flood_optax import (
    flood,
    flood_loss,
    flood_mean,
    flooded,
    levels,
    penalty,
    scale_by_flood,
    sharpness,
    sweep,
)
from flood_optax.objective import relax_loss

TABLE = pathlib.Path(__file__).with_name("refusals.txt").read_text("utf-8")
SETS = {
    name: members.split(" | ")
    for name, members in re.findall(r"^@(\w+) (.+)$", TABLE, re.M)
}


def spelled_out():
    """The call, and its error and words, of every row and member of its sets."""
    for row in re.findall(r"^([^\s#@].*)\n    (.+)$", TABLE, re.M):
        used = [name for name in SETS if f"<{name}>" in row[0]]
        for members in itertools.product(*(SETS[name] for name in used)):
            call, words = row
            for name, member in zip(used, members, strict=True):
                call = call.replace(f"<{name}>", member)
                words = words.replace(f"<{name}>", member)
            yield call, words


ROWS = dict(spelled_out())

GRADS, LOSSES = jnp.array([1.0, 2.0]), jnp.array([0.1, 0.4, 0.2])
PAIR, TREE = jnp.array([0.1, 0.4]), {"w": jnp.ones(3), "n": jnp.arange(3)}
EIGHT, NAMES = np.dtype(ml_dtypes.float8_e4m3fn), np.array(["cat", "dog"])
KEY, LEVELS = jax.random.key(0), (0.0, 0.2, -np.inf, 0.7)
nan, inf = np.nan, np.inf  # as messages spell them
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
FORMS = {
    "scale_by_flood()": scale_by_flood(0.5),
    "flood(inner)": flood(optax.sgd(0.1), 0.5, every_k=2),
}
AT_LEVEL = {
    "flood_loss": lambda *level, **given: flood_loss(LOSSES, *level, **given),
    "flood_mean": lambda *level, **given: flood_mean(LOSSES, *level, **given),
    "flooded": lambda *level, **given: flooded(jnp.sum, *level, **given),
    "scale_by_flood": scale_by_flood,
    "flood": lambda *level, **given: flood(optax.sgd(0.1), *level, **given),
    "warmup": lambda level: levels.warmup(level, 3),
}
OF_LEVELS = {
    "run": lambda levels: sweep.run(train, levels, KEYS),
    "forked": lambda levels: sweep.forked(None, jnp.ones(2), jnp.ones(3), levels),
}
OF_LOSS = {
    "penalty.objective": lambda f, w, **given: penalty.objective(f, 0.1, **given)(w),
    "penalty.value_and_grad": lambda f, w, **given: penalty.value_and_grad(
        f, 0.1, **given
    )(w),
    "penalty.pair_displacement": lambda f, w: penalty.pair_displacement(f, w, 0.1),
    "penalty.level_set_drift": penalty.level_set_drift,
    "sharpness.gradient_norm": sharpness.gradient_norm,
    "sharpness.hessian_trace": lambda f, w, key=KEY, **given: sharpness.hessian_trace(
        f, w, key=key, num_samples=2, **given
    ),
    "sharpness.top_eigenvalue": lambda f, w, key=KEY, **given: sharpness.top_eigenvalue(
        f, w, key=key, num_iterations=2, **given
    ),
}
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
    fit = lambda indices, key: ()
    return levels.held_out_losses(
        fit, evaluate, num_examples, num_folds=num_folds, key=key, **given
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


def test_every_row_of_the_table_is_read_once():
    lines = [line for line in TABLE.splitlines() if line and line[0] not in "#@"]
    every = [call for call, _ in spelled_out()]
    assert len(lines) == 2 * len(re.findall("^    ", TABLE, re.M))
    assert len(every) == len(ROWS)
    assert not any(
        f"<{name}>" in word for row in ROWS.items() for word in row for name in SETS
    )


@pytest.mark.parametrize(
    "call",
    [
        *("update(None)", "update(jnp.ones(1))", "flooded(lambda: LOSSES, 0.5)()"),
        "flood_mean(LOSSES, 0.1, where=np.zeros(3, bool))",
    ],
)
def test_errors_of_shapes_are_raised_at_trace_time(call):
    error, words = ROWS[call].split(": ", 1)
    with pytest.raises(ValueError, match=re.escape(words)):
        jax.jit(lambda _: evaluate(call))(0.0)
    assert error == "ValueError"


# ---- what looks like it, and is taken ----


@pytest.mark.parametrize("level", [0, -3, -np.inf, np.float16(0.5), np.int32(2)])
@pytest.mark.parametrize("call", AT_LEVEL)
def test_legal_levels_are_taken(call, level):
    AT_LEVEL[call](level)


@pytest.mark.usefixtures("x64")
def test_levels_and_bands_that_float64_holds_are_taken_with_64_bits():
    for call in ("scale_by_flood", "flood"):
        AT_LEVEL[call](1e39)
        AT_LEVEL[call](-0.5, band=1e39)


def test_traced_levels_are_not_validated():
    @jax.jit
    def run(level):
        return flooded(lambda w: w**2, level)(0.5), update(0.3, scale_by_flood(level))

    run(jnp.nan)


@pytest.mark.parametrize("name", SETS["miss"])
@pytest.mark.parametrize("form", FORMS)
def test_names_that_only_flooding_could_mean_are_none_where_they_are_none(form, name):
    for inside in (FORMS[form], optax.chain(FORMS[form], optax.sgd(0.1))):
        update(0.3, inside, **{name: None})


def test_names_that_belong_to_others_in_the_chain_reach_them():
    seen = {}

    def other(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    names = {"loss": 0.25, "step": 7, "batch": LOSSES, "obj_fn": jnp.sum, "key": None}
    reader = optax.GradientTransformationExtraArgs(lambda _: (), other)
    update(0.3, optax.chain(scale_by_flood(0.5), reader), **names)
    assert seen == {"value": 0.3, **names}
    seen.clear()
    # what value_fn takes may have any name
    of_search = names | {"value_fn": jnp.sum, "weights": LOSSES, "level": 3}
    update(0.3, flood(reader, 0.2), **of_search)
    assert of_search.keys() <= seen.keys()
    assert seen["weights"] is LOSSES
