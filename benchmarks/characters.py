"""Characters of the language reference of CPython, and a transformer over them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.networks import keep

CHARACTERS = "".join(map(chr, range(32, 127)))
CLASSES = len(CHARACTERS)


def coded(text: str) -> np.ndarray:
    """Codes of the printable characters, int32; white space becomes one blank."""
    code = {character: i for i, character in enumerate(CHARACTERS)}
    return np.array([code[c] for c in " ".join(text.split()) if c in code], np.int32)


def cut(codes: np.ndarray, size: int) -> np.ndarray:
    """Pieces [n, size] that do not overlap; a rest is left out."""
    return codes[: len(codes) // size * size].reshape(-1, size)


def normed(h: jax.Array) -> jax.Array:
    return h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Blocks of attention and a hidden layer, each behind a norm and none with a bias.

    All that is trained is matrices, so a decay of the weights is one of all of them.
    """

    width: int = 64
    heads: int = 2
    blocks: int = 2

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        """Normal numbers, in each matrix of variance 1 / its rows."""
        wide = self.width
        block = {
            "attend": (wide, 3 * wide),
            "mix": (wide, wide),
            "hidden": (wide, 4 * wide),
            "back": (4 * wide, wide),
        }
        shapes = {
            "characters": (CLASSES, wide),
            "places": (x.shape[-1], wide),
            "blocks": [block] * self.blocks,
            "out": (wide, CLASSES),
        }
        is_shape = lambda one: isinstance(one, tuple)
        leaves, tree = jax.tree.flatten(shapes, is_leaf=is_shape)
        keys = jax.random.split(key, len(leaves))
        made = [
            jax.random.normal(k, shape, jnp.float32) * shape[0] ** -0.5
            for k, shape in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, made)

    def logits(
        self,
        params: Any,
        x: jax.Array,
        drop: Callable[[jax.Array, int], jax.Array] = keep,
    ) -> jax.Array:
        """Of the character after each of x [n, T]; [n, T, CLASSES].

        `drop` is laid over what each of the 2 x blocks branches adds, place 0, 1, ...
        """
        h = params["characters"][x] + params["places"]
        for i, block in enumerate(params["blocks"]):
            h += drop(self.attended(block, normed(h)), 2 * i)
            hidden = jax.nn.relu(normed(h) @ block["hidden"])
            h += drop(hidden @ block["back"], 2 * i + 1)
        return normed(h) @ params["out"]

    def attended(self, block: Any, h: jax.Array) -> jax.Array:
        n, length, wide = h.shape
        split = (h @ block["attend"]).reshape(n, length, 3, self.heads, -1)
        query, key, value = (split[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return mixed.reshape(n, length, wide) @ block["mix"]
