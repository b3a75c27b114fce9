"""What the data say before the training: the share of wrong labels, and which ones."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.rivals.settings import Constants, Problem
from benchmarks.training import cross_entropy, grad, scan
from flood_optax import levels


class Known(NamedTuple):
    """Of a training set.

    Attributes:
      rate: the share of wrong labels by the leave-one-out scores.
      upheld: 1 where the class of the largest leave-one-out score is the label, else 0.
      confident: 0 where confident learning finds another class, else 1.
      held_out: each example's loss under a network that has not seen it, or 0.
    """

    rate: jax.Array
    upheld: jax.Array
    confident: jax.Array
    held_out: jax.Array


def nothing(n: int) -> Known:
    """For sequences, of which none of this is asked."""
    return Known(jnp.float32(0), *jnp.zeros((3, n)))


def known(
    problem: Problem, constants: Constants, x: jax.Array, y: jax.Array, key: jax.Array
) -> Known:
    """Of a training set as it is given; the key is of the networks of the folds."""
    if problem.is_text:
        return nothing(len(y))
    scores = levels.leave_one_out(np.asarray(x), np.asarray(y), problem.classes)
    logits = held_out_logits(problem, constants, x, y, key)
    return Known(
        levels.noise_rate(scores, y),
        (scores.argmax(-1) == y).astype(jnp.float32),
        1.0 - contradicted(jax.nn.softmax(logits), y),
        cross_entropy(logits, y),
    )


def contradicted(probs: jax.Array, labels: jax.Array) -> jax.Array:
    """1 for the labels that confident learning takes for wrong, else 0.

    An example is counted as of the class whose probability is largest among those that
    reach their threshold: the mean probability of the class over the examples that are
    labelled so. Its label is wrong if that is another class (Northcutt et al. 2021, the
    off-diagonals of the confident joint).
    """
    given = jax.nn.one_hot(labels, probs.shape[-1])
    number = given.sum(0)
    mean = (given * probs).sum(0) / jnp.maximum(number, 1)
    reached = (probs >= jnp.where(number > 0, mean, jnp.inf)[None]) & (probs > 0)
    true = jnp.where(reached, probs, -1.0).argmax(-1)
    return (reached.any(-1) & (true != labels)).astype(jnp.float32)


def held_out_logits(
    problem: Problem, constants: Constants, x: jax.Array, y: jax.Array, key: jax.Array
) -> jax.Array:
    """[n, c] by the networks of the folds, each trained for a part of the steps."""
    size, network = problem.size, problem.network
    steps = max(1, round(constants.held_out * size.steps))
    optimizer = optax.adam(1e-3)

    def mean_loss(params: Any, at: jax.Array) -> jax.Array:
        return cross_entropy(network.logits(params, x[at]), y[at]).mean()

    def fit(indices: jax.Array, key: jax.Array) -> Any:
        init_key, batch_key = jax.random.split(key)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            at = jax.random.choice(key, indices, (size.batch,), replace=False)
            updates, state = optimizer.update(grad(mean_loss)(params, at), state)
            return (optax.apply_updates(params, updates), state), None

        params = network.init(init_key, x[:1])
        start = params, optimizer.init(params)
        return scan(step, start, jax.random.split(batch_key, steps))[0][0]

    def evaluate(params: Any, indices: jax.Array) -> jax.Array:
        return network.logits(params, x[indices])

    return levels.held_out(
        fit, evaluate, len(y), num_folds=constants.folds, key=key, vmap=True
    )
