"""A causal transformer over the characters of a text too short for it.

The text is the language reference of CPython. A training set of it is read for many
epochs, as where there is less text than one would train on.
"""

import functools
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.characters import CHARACTERS, CLASSES, Transformer, coded, cut
from benchmarks.pools import Sets
from benchmarks.rivals.settings import SIZES, flip

__all__ = ["CHARACTERS", "CLASSES", "Transformer", "draw", "pieces"]

LENGTH = 32  # characters of a sequence
SIZE = SIZES["text"]


@functools.cache
def pieces() -> np.ndarray:
    """The text, int32 [pieces, LENGTH + 1]: no piece overlaps another."""
    text = " ".join(topics.topics[name] for name in sorted(topics.topics))
    return cut(coded(text), LENGTH + 1)


def draw(key: jax.Array, flips: jax.Array) -> Sets:
    """Sequences [n, LENGTH], and the character after each of their characters.

    Args:
      key: of the pieces of the text, no piece in two sets, and of the flips.
      flips: the share of the characters to predict, in training and validation, that
        are replaced by others; exact, and it may be traced. All that is read is clean.
    """
    pieces_key, *keys = jax.random.split(key, 3)
    text = pieces()
    order = jax.random.permutation(pieces_key, len(text))[
        : SIZE.train + SIZE.validation + SIZE.test
    ]
    chosen = jnp.asarray(text)[order]
    ends = SIZE.train, SIZE.train + SIZE.validation
    train, validation, test = (
        (part[:, :-1], part[:, 1:]) for part in jnp.split(chosen, ends)
    )
    return Sets(
        (train[0], flip(keys[0], train[1], flips, CLASSES)),
        (validation[0], flip(keys[1], validation[1], flips, CLASSES)),
        test,
    )
