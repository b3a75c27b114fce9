"""What is measured of a model: cheap measures on the way, and dear ones at the end."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.training import cross_entropy, loss_and_accuracy, value_and_grad
from benchmarks.unlearning.problems import Data, Problem, Set, per_example
from benchmarks.unlearning.settings import Constants

SETS = ("forget", "test", "retain")
COLUMNS = (
    *(f"{one}_{what}" for one in SETS for what in ("loss", "accuracy")),
    "auc",
    "kl",
)
GAP = ("forget_accuracy", "test_accuracy", "retain_accuracy", "auc")
DEEP = ("relearn", "attack", "verbatim")


class Lira(NamedTuple):
    """What shadow models tell of the forget examples, then of as many test examples.

    Attributes:
      mean: of the confidences of those that have not seen an example, and of those that
        have, [2, n].
      sd: of these confidences about their means, over all examples, [2].
    """

    mean: jax.Array
    sd: jax.Array


def readings(
    problem: Problem, data: Data, gold_logs: jax.Array, params: Any
) -> jax.Array:
    """The COLUMNS.

    Args:
      gold_logs: log-probabilities of the golds on the forget set, [golds, forget, ...].
    """
    x, y = data.forget
    logits = problem.logits(params, x)
    forget = per_example(cross_entropy(logits, y))
    test_x, test_y = data.test
    test_logits = problem.logits(params, test_x)
    test = per_example(cross_entropy(test_logits, test_y))
    retain = loss_and_accuracy(problem.logits(params, data.retain[0]), data.retain[1])
    logs = jax.nn.log_softmax(logits)
    divergence = (jnp.exp(gold_logs) * (gold_logs - logs)).sum(-1).mean()
    by_set = (loss_and_accuracy(logits, y), loss_and_accuracy(test_logits, test_y))
    return jnp.concatenate(
        [*by_set, retain, jnp.stack([auc(forget, test), divergence])]
    )


def auc(lower: jax.Array, higher: jax.Array) -> jax.Array:
    """The share of pairs in which the first is lower; a tie is half of one."""
    below = lower[:, None] < higher[None]
    return jnp.mean(below + 0.5 * (lower[:, None] == higher[None]))


def confidence(losses: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of the probability p = exp(-loss) of the label."""
    losses = jnp.maximum(losses, 1e-7)
    return -losses - jnp.log(-jnp.expm1(-losses))


def attack(problem: Problem, data: Data, lira: Lira, params: Any) -> jax.Array:
    """AUC of a likelihood-ratio attack that tells forget from test examples.

    Carlini et al., Membership Inference Attacks From First Principles, 2022, with the
    shadows of the memorised model: what unlearning does is not in them.
    """
    count = len(data.forget[1])
    x, y = challenge(data)
    seen = confidence(cross_entropy(problem.logits(params, x), y))
    log_densities = -(((seen - lira.mean) / lira.sd[:, None]) ** 2) / 2
    ratio = log_densities[1] - log_densities[0]
    return auc(ratio[count:], ratio[:count])


def challenge(data: Data) -> Set:
    """The forget examples, and as many of the test set."""
    count = len(data.forget[1])
    (x, y), (test_x, test_y) = data.forget, data.test
    return jnp.concatenate([x, test_x[:count]]), jnp.concatenate([y, test_y[:count]])


def verbatim(problem: Problem, data: Data, params: Any) -> jax.Array:
    """How many characters of its second half a forgotten passage is continued by.

    The mean over the passages, of the greedy continuation before its first mistake; up
    to there it has read the passage itself, so one call decides.
    """
    x, y = data.forget
    right = problem.logits(params, x).argmax(-1) == y
    second = right[:, x.shape[1] // 2 :]
    return jnp.cumprod(second, axis=1).sum(1).mean()


def relearned(
    problem: Problem,
    constants: Constants,
    data: Data,
    back: jax.Array,
    params: Any,
) -> jax.Array:
    """Steps on one half of the forget set until the loss of the other half is back.

    Args:
      back: the loss of the other half that counts as back.

    Returns:
      The number of steps of Adam on the whole half; `constants.relearn` if it is not
      back by then.
    """
    x, y = data.forget
    half = len(y) // 2
    optimizer = optax.adam(constants.train_rate)

    def loss_fn(params: Any) -> jax.Array:
        return cross_entropy(problem.logits(params, x[:half]), y[:half]).mean()

    def other(params: Any) -> jax.Array:
        return cross_entropy(problem.logits(params, x[half:]), y[half:]).mean()

    def away(carry: Any) -> jax.Array:
        params, _, steps = carry
        return (steps < constants.relearn) & ~(other(params) <= back)

    def step(carry: Any) -> Any:
        params, state, steps = carry
        _, grads = value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, steps + 1

    start = params, optimizer.init(params), jnp.int32(0)
    return jax.lax.while_loop(away, step, start)[2].astype(jnp.float32)


def gap(seen: np.ndarray, golds: np.ndarray) -> np.ndarray:
    """The mean distance to the golds of the columns GAP, in points; [..., COLUMNS]."""
    which = [COLUMNS.index(name) for name in GAP]
    return 100 * np.abs(seen - golds)[..., which].mean(-1)
