"""Trains a language model on padded text in unequal parts: is it the large batch?

A small transformer reads the language reference of CPython, a paragraph a sequence. A
window holds four micro-batches on two devices, eight parts with different numbers of
tokens. One large batch on one device is the reference; the parts must reach its loss
curve, and without `weight=` they do not. Parts of which each sequence is flooded by
itself must reach the curve of the large batch so flooded.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pydoc_data import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P

import flood_optax
from benchmarks import record, report

LEARNING_RATE, SEED = 3e-3, 0
DEVICES, EVERY_K = 2, 4
CHARACTERS = "\0" + "".join(map(chr, range(32, 127)))  # the first one is padding


class Size(NamedTuple):
    """Windows, sequences of a part, characters of a sequence, features, the level."""

    windows: int
    rows: int
    length: int
    width: int
    level: float


FULL, SMOKE = Size(200, 4, 96, 64, 2.5), Size(60, 1, 24, 16, 3.6)


class Transformer(nnx.Module):
    """One block of causal attention over characters, float64 with 64-bit types."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        wide, kind = size.width, jnp.result_type(float)
        embed = functools.partial(nnx.Embed, param_dtype=kind, rngs=rngs)
        linear = functools.partial(nnx.Linear, param_dtype=kind, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, wide, param_dtype=kind, rngs=rngs)
        self.embed = embed(len(CHARACTERS), wide)
        self.place = embed(size.length, wide)
        self.attend = nnx.MultiHeadAttention(
            4, wide, decode=False, param_dtype=kind, rngs=rngs
        )
        self.hidden, self.back = linear(wide, 4 * wide), linear(4 * wide, wide)
        self.norms = nnx.List([norm() for _ in range(3)])
        self.out = linear(wide, len(CHARACTERS))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens) + self.place(jnp.arange(tokens.shape[-1]))
        x += self.attend(self.norms[0](x), mask=nnx.make_causal_mask(tokens))
        x += self.back(nnx.gelu(self.hidden(self.norms[1](x))))
        return self.out(self.norms[2](x))


def paragraphs(size: Size) -> np.ndarray:
    """Tokens [windows, micro-batches, rows of all devices, length + 1], padded by 0."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    code = {character: i for i, character in enumerate(CHARACTERS)}
    coded = [
        [code[c] for c in " ".join(part.split()) if c in code][: size.length + 1]
        for part in text.split("\n\n")
    ]
    coded = [part for part in coded if len(part) > 1]
    shape = (size.windows, EVERY_K, DEVICES * size.rows)
    rng = np.random.default_rng(SEED)
    tokens = np.zeros((*shape, size.length + 1), np.int32)
    for row, i in zip(
        tokens.reshape(-1, size.length + 1),
        rng.integers(len(coded), size=int(np.prod(shape))),
        strict=True,
    ):
        row[: len(coded[i])] = coded[i]
    return tokens


# ---- what is trained: a sum over the tokens that count, and their number ----


def losses_and_mask(
    graph: Any, params: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    logits = nnx.merge(graph, params)(tokens[:, :-1])
    labels = tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, labels != 0


def sum_and_count(
    graph: Any, params: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    losses, mask = losses_and_mask(graph, params, tokens)
    return jnp.sum(losses, where=mask), jnp.sum(mask)


def sequences_and_count(
    graph: Any, level: float, params: Any, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of sequences that are flooded each by itself, counted by their tokens."""
    losses, mask = losses_and_mask(graph, params, tokens)
    # () for each part by itself: what is flooded is no mean over the devices
    mean = flood_optax.flood_mean(
        losses, level, over="sequence", where=mask, axis_name=()
    )
    return mean * jnp.sum(mask), jnp.sum(mask)


Step = Callable[[Any, Any, jax.Array], tuple[Any, Any]]


def large_batch(total_of: Any, level: float) -> tuple[Any, Step]:
    """The reference: all tokens of a window at once, on one device."""
    optimizer = flood_optax.flood(optax.adam(LEARNING_RATE), level)

    def mean_of(params: Any, tokens: jax.Array) -> jax.Array:
        total, count = total_of(params, tokens.reshape(-1, tokens.shape[-1]))
        return total / count

    def step(params: Any, state: Any, window: jax.Array) -> tuple[Any, Any]:
        value, grads = jax.value_and_grad(mean_of)(params, window)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    return optimizer, step


def parts(
    total_of: Any, level: float, *, weigh_gradients: bool, weight: bool
) -> tuple[Any, Step]:
    """A window as micro-batches on devices, its parts weighed or not."""
    optimizer = flood_optax.flood(
        optax.adam(LEARNING_RATE), level, every_k=EVERY_K, axis_name="data"
    )

    def micro_step(carry: Any, tokens: jax.Array) -> tuple[Any, None]:
        params, state = carry
        local = lax.pcast(params, "data", to="varying")
        sums = jax.value_and_grad(total_of, has_aux=True)
        (total, count), grads = sums(local, tokens)
        if weigh_gradients:
            of_all = lax.psum(count, "data")
            grads = jax.tree.map(lambda g: lax.psum(g, "data") / of_all, grads)
        else:
            grads = lax.pmean(jax.tree.map(lambda g: g / count, grads), "data")
        extra = {"weight": count} if weight else {}
        updates, state = optimizer.update(
            grads, state, params, value=total / count, **extra
        )
        return (optax.apply_updates(params, updates), state), None

    def step(params: Any, state: Any, window: jax.Array) -> tuple[Any, Any]:
        return lax.scan(micro_step, (params, state), window)[0]

    mesh = Mesh(np.array(jax.devices()), ("data",))
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), P(), P(None, "data")),
        out_specs=(P(), P()),
    )
    return optimizer, mapped


weighed = functools.partial(parts, weigh_gradients=True, weight=True)
FORMS = {
    "one large batch": large_batch,
    "parts, weighed": weighed,
    "parts, their gradients weighed": functools.partial(
        parts, weigh_gradients=True, weight=False
    ),
    "parts, nothing weighed": functools.partial(
        parts, weigh_gradients=False, weight=False
    ),
}
SEQUENCES = {
    "each sequence, one large batch": large_batch,
    "each sequence, parts, weighed": weighed,
}


def train(form: str, size: Size) -> dict[str, list[float]]:
    """At each window the loss over all its tokens, and the loss that met the level."""
    tokens = paragraphs(size)
    graph, params = nnx.split(Transformer(size, nnx.Rngs(SEED)), nnx.Param)
    total_of = functools.partial(sum_and_count, graph)
    if form in SEQUENCES:  # the loss is flooded, and the optimizer floods no more
        flooded_of = functools.partial(sequences_and_count, graph, size.level)
        optimizer, step = SEQUENCES[form](flooded_of, -np.inf)
    else:
        optimizer, step = FORMS[form](total_of, size.level)

    def each(carry: Any, window: jax.Array) -> Any:
        params, state = carry
        total, count = total_of(params, window.reshape(-1, size.length + 1))
        params, state = step(params, state, window)
        met = optax.tree.get(state, "flood_value")
        return (params, state), {"loss": total / count, "met": met}

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> Any:
        return lax.scan(each, (params, optimizer.init(params)), tokens)[1]

    curves = run(params, jnp.asarray(tokens))
    return {name: np.asarray(curve).tolist() for name, curve in curves.items()}


# ---- the record ----


def in_a_process(*, smoke: bool) -> dict[str, dict[str, list[float]]]:
    """The curves of all forms, from a process with two devices and 64-bit types."""
    flags = f"--xla_force_host_platform_device_count={DEVICES}"
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.language", *(["--smoke"] * smoke)],
        cwd=record.REPOSITORY,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def summarise(
    curves: Mapping[str, Mapping[str, list[float]]], level: float
) -> list[dict[str, Any]]:
    """How far each curve is from the large batch's, and how often its sign is wrong."""
    rows: list[dict[str, Any]] = []
    for form, curve in curves.items():
        loss, met = np.array(curve["loss"]), np.array(curve["met"])
        batch = next(iter(SEQUENCES if form in SEQUENCES else FORMS))
        signs = int(((loss < level) != (met < level)).sum())
        rows.append(
            {
                "form": form,
                "distance": float(np.abs(loss - curves[batch]["loss"]).max()),
                # of a sequence each has a sign of its own
                "wrong_signs": None if form in SEQUENCES else signs,
                "steps": len(loss),
                "last_losses": float(loss[-len(loss) // 4 :].mean()),
            }
        )
    return rows


def tables(payload: Mapping[str, Any]) -> dict[str, str]:
    """The generated table of docs/results.md."""
    shown = [
        {**row, "signs": "-" if signs is None else f"{signs} of {row['steps']}"}
        for row in payload["rows"]
        for signs in [row["wrong_signs"]]
    ]
    made = report.table(
        shown,
        {
            "a window of eight unequal parts": "{form}",
            "largest distance to the large batch's loss curve": "{distance:.1e}",
            "steps with the wrong sign": "{signs}",
            "mean loss of the last quarter": "{last_losses:.3f}",
        },
    )
    return {"language": f"{made}\n\n{report.provenance(payload)}"}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The curves of all forms, and what they come to."""
    curves = in_a_process(smoke=args.smoke)
    size = SMOKE if args.smoke else FULL
    tokens = paragraphs(size)[..., 1:].reshape(
        size.windows, EVERY_K, DEVICES, size.rows, size.length
    )
    counts = (tokens != 0).sum((-1, -2))
    return {
        "protocol": size._asdict() | {"every_k": EVERY_K, "devices": DEVICES},
        "tokens_of_a_part": {"least": int(counts.min()), "most": int(counts.max())},
        "rows": summarise(curves, size.level),
        "curves": curves,
    }


if __name__ == "__main__":
    chosen = SMOKE if "--smoke" in sys.argv else FULL
    print(json.dumps({form: train(form, chosen) for form in FORMS | SEQUENCES}))
