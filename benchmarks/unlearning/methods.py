"""The methods: each is what it adds to the mean loss of the retained examples.

A method is handed what the model before unlearning tells of its own data, and no gold.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.unlearning.problems import per_example
from benchmarks.unlearning.settings import Constants
from flood_optax import Shape, flood_mean, shapes


class Known(NamedTuple):
    """What the model before unlearning tells.

    Attributes:
      tau: its mean loss on held-out examples, a scalar.
      ranked: a level for each forget example, [forget]: of its losses on held-out
        examples the quantile at which this one stands among the forget examples.
      summed: its loss of each forget example, of a passage the sum, [forget].
      by_class: the mean of its probabilities over the held-out examples (or characters)
        of each label, [classes, classes].
    """

    tau: jax.Array
    ranked: jax.Array
    summed: jax.Array
    by_class: jax.Array


class Seen(NamedTuple):
    """A batch to forget, and what is known of it.

    Attributes:
      logits: [n, classes], or [n, T, classes].
      labels, losses: [n], or [n, T].
      known: ranked and summed are those of this batch, [n].
      factor: of the level.
    """

    logits: jax.Array
    labels: jax.Array
    losses: jax.Array
    known: Known
    factor: jax.Array

    @property
    def examples(self) -> jax.Array:
        """The loss of each example, of a passage the mean over its characters."""
        return per_example(self.losses)


Term = Callable[[Seen, Constants], jax.Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
      title: as a table writes it.
      term: what is added to the mean loss of the retained batch; None: nothing is.
      ours: whether it holds a level.
      text: whether it is run on text.
    """

    title: str
    term: Term | None
    ours: bool = False
    text: bool = True


def grad_diff(seen: Seen, constants: Constants) -> jax.Array:
    """Gradient ascent. Liu et al., Continual Learning and Private Unlearning, 2022."""
    del constants
    return -seen.examples.mean()


def npo(seen: Seen, constants: Constants) -> jax.Array:
    """-2/beta log sigmoid(-beta log(p / p_before)), p of the whole passage.

    Zhang et al., Negative Preference Optimization, 2024, https://arxiv.org/abs/2404.05868
    """
    sums = seen.losses.reshape(len(seen.losses), -1).sum(-1)
    log_ratio = seen.known.summed - sums
    return 2 / constants.npo * jax.nn.softplus(constants.npo * log_ratio).mean()


def simnpo(seen: Seen, constants: Constants) -> jax.Array:
    """NPO without a reference, by the mean log-probability of a character.

    Fan et al., Simplicity Prevails, 2024, https://arxiv.org/abs/2410.07163
    """
    return (
        2 / constants.simnpo * jax.nn.softplus(-constants.simnpo * seen.examples).mean()
    )


def weighted_ascent(seen: Seen, constants: Constants) -> jax.Array:
    """Ascent weighted by the probability of the label, through which no gradient flows.

    Wang et al., Rethinking LLM Unlearning Objectives, ICLR 2025 (WGA, alpha = 1).
    """
    del constants
    weights = jax.lax.stop_gradient(jnp.exp(-seen.losses))
    return -(weights * seen.losses).mean()


def distilled(seen: Seen, constants: Constants) -> jax.Array:
    """KL to the mean prediction for unseen examples of the same label, as ReGUn's.

    https://arxiv.org/abs/2603.11210, without what is particular to it.
    """
    del constants
    target = seen.known.by_class[seen.labels]
    logs = jax.nn.log_softmax(seen.logits)
    return (jax.scipy.special.xlogy(target, target) - target * logs).sum(-1).mean()


SHAPES: dict[str, tuple[float, Shape]] = {  # the sign of losses and levels
    "reflect": (1.0, shapes.reflect()),
    "soft": (1.0, shapes.soft()),
    "clamp": (-1.0, shapes.pause()),
}
OVER = {"batch": "the batch", "each": "each", "ranked": "each at its rank"}


def held(name: str, over: str) -> Method:
    """The forget loss held at a level: of the batch, or of each example or passage.

    The clamp floods the negated loss, which pauses: ascent below the level, nothing
    above it.
    """
    sign, shape = SHAPES[name]

    def term(seen: Seen, constants: Constants) -> jax.Array:
        del constants
        level = seen.factor * (
            seen.known.ranked if over == "ranked" else seen.known.tau
        )
        return flood_mean(
            sign * seen.examples,
            sign * level,
            over="batch" if over == "batch" else "example",
            shape=shape,
        )

    return Method(f"{name}, {OVER[over]}", term, ours=True, text=over != "ranked")


METHODS: dict[str, Method] = {
    "retain": Method("retain only", None),
    "graddiff": Method("GradDiff", grad_diff),
    "npo": Method("NPO", npo),
    "simnpo": Method("SimNPO", simnpo),
    "wga": Method("weighted ascent", weighted_ascent),
    "distilled": Method("class-conditional distillation", distilled),
    **{f"{shape}_{over}": held(shape, over) for shape in SHAPES for over in OVER},
}


class Recipe(NamedTuple):
    """The rate of Adam, and the factor of the level: numbers, or arrays of them."""

    rate: Any
    factor: Any = 1.0


def recipes(method: Method, constants: Constants) -> list[Recipe]:
    """Every rate, and for those with a level other ones at the middle rate."""
    made = [Recipe(rate) for rate in constants.rates]
    if method.ours:
        made += [Recipe(constants.middle, factor) for factor in constants.factors]
    return made
