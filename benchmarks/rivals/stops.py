"""Where to stop without a validation set: Label Wave, and the gradients' evidence."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.training import grad


class Stop(NamedTuple):
    """A rule on the way: the weights it would stop at so far, and what it remembers."""

    models: Any  # in the order of the readouts
    ended: jax.Array
    memory: Any


def keep(old: Any, new: Any, where: jax.Array) -> Any:
    """The new one where asked."""
    return jax.tree.map(lambda a, b: jnp.where(where, b, a), old, new)


class Wave(NamedTuple):
    """What Label Wave remembers.

    Attributes:
      predicted: the classes of the training examples at the last check.
      least: of the changes so far.
      since: checks since then.
      checks: so far.
    """

    predicted: jax.Array
    least: jax.Array
    since: jax.Array
    checks: jax.Array


def wave_start(models: Any, predicted: jax.Array) -> Stop:
    far = jnp.int32(jnp.iinfo(jnp.int32).max)
    memory = Wave(predicted, far, jnp.int32(0), jnp.int32(0))
    return Stop(models, jnp.bool_(False), memory)


def wave(stop: Stop, models: Any, predicted: jax.Array, patience: int) -> Stop:
    """At a check: the model of the fewest changed predictions of training examples.

    It stops once that minimum is `patience` checks old. The change from the untrained
    network does not count. Yuan, Feng and Liu, ICLR 2025, https://arxiv.org/abs/2502.07551
    """
    before: Wave = stop.memory
    changes = jnp.where(
        before.checks > 0,
        (predicted != before.predicted).sum(),
        jnp.iinfo(jnp.int32).max,
    )
    first = before.checks < 1  # then the latest model is the best guess
    better = ~stop.ended & ((changes < before.least) | first)
    since = jnp.where(better, 0, before.since + 1)
    memory = Wave(
        predicted,
        jnp.where(better, changes, before.least).astype(jnp.int32),
        since.astype(jnp.int32),
        before.checks + 1,
    )
    ended = stop.ended | (since >= patience)
    return Stop(keep(stop.models, models, better), ended, memory)


def evidence_start(models: Any) -> Stop:
    return Stop(models, jnp.bool_(False), ())


def evidence(stop: Stop, models: Any, criterion: jax.Array) -> Stop:
    """At a check: the latest model, until the criterion is above 0."""
    kept = keep(models, stop.models, stop.ended)
    return Stop(kept, stop.ended | (criterion > 0), ())


def evidence_criterion(
    loss_fn: Callable[[Any, Any], jax.Array], params: Any, examples: Any
) -> jax.Array:
    r"""Above 0 where the gradient is no larger than its own noise.

    1 - (n / D) sum_k g_k^2 / s_k, of the mean gradient g of n examples and the sample
    variance s of theirs, over the D weights of which s is not 0. Mahsereci et al.,
    Early Stopping without a Validation Set, 2017, https://arxiv.org/abs/1703.09580

    Args:
      loss_fn: the loss of one example.
      params: of the network.
      examples: a tree of arrays [n, ...].
    """
    grads = jax.vmap(grad(loss_fn), (None, 0))(params, examples)
    n = len(jax.tree.leaves(examples)[0])

    def of_leaf(g: jax.Array) -> jax.Array:
        variance = g.var(0, ddof=1)
        noisy = variance > 0
        ratio = jnp.where(noisy, g.mean(0) ** 2 / jnp.where(noisy, variance, 1), 0)
        return jnp.stack([ratio.sum(), noisy.sum().astype(ratio.dtype)])

    total, number = jnp.stack([of_leaf(g) for g in jax.tree.leaves(grads)]).sum(0)
    return 1 - n * total / jnp.maximum(number, 1)
