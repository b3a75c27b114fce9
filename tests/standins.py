"""What the stand-ins for trainers share: a problem, and what each must do with it."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flood_optax import scale_by_flood

X = jax.random.normal(jax.random.key(0), (64, 4))
Y = jnp.sin(X[:, 0]) + 0.3 * X[:, 1]
VALID = X[::-1] * 0.5, jnp.sin(X[::-1, 0] * 0.5) + 0.15 * X[::-1, 1]
START = jnp.zeros(4)
STEPS = 120


def squares(w, x=X, y=Y):
    return jnp.mean((x @ w - y) ** 2)


def sgd(level):
    """A rate that suits a loss whose level is .2 of its scale."""
    return optax.sgd(0.02 / level)


def scaled(level, w, x=X, y=Y):
    """The loss that floats at this level where `squares` floats at .2."""
    return level / 0.2 * squares(w, x, y)


def settles(losses, level, within=0.1):
    last = np.asarray(losses)[-20:]
    assert abs(last.mean() - level) < within * level, last
    assert 0.2 <= np.mean(last < level) <= 0.8, last


def refuses_a_flood_in_the_optimizer(train, optimizer):
    with pytest.raises(ValueError, match="needs the current loss"):
        train(optax.chain(scale_by_flood(0.2), optimizer))


def module(monkeypatch, name, **contents):
    """Makes a module importable, and the packages that it is in."""
    parent, _, last = name.rpartition(".")
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    if parent and parent not in sys.modules:
        module(monkeypatch, parent)
    if parent:
        setattr(sys.modules[parent], last, made)
    return made
