"""The methods: plain training, two rivals, and each of the family as an expression."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks import own_rules, pixels
from benchmarks.family import before
from benchmarks.family.training import Method, Protocol, Seen, Watch
from flood_optax import flood_loss, flood_mean, levels, shapes
from flood_optax.objective import relax_loss

LEVELS = {  # by the share of flipped labels
    0.0: (0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    0.2: (0.05, 0.1, 0.2, 0.4, 0.6, 0.8),
}
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def tail_mean(losses: jax.Array, q: float = 0.5) -> jax.Array:
    """The conditional value at risk, at its minimiser t."""
    t = lax.stop_gradient(jnp.quantile(losses, q))
    return t + jnp.maximum(losses - t, 0).mean() / (1 - q)


def by_class(seen: Seen, largest: jax.Array) -> jax.Array:
    """Levels in proportion to how frequent the class is."""
    return flood_mean(
        seen.losses,
        largest * seen.frequency,
        over="segment",
        segment_ids=seen.labels,
        num_segments=pixels.CLASSES,
    )


def by_held_out(seen: Seen, gamma: jax.Array) -> jax.Array:
    """A level for each example, from models that left it out."""
    level = levels.adaflood(seen.held_out, gamma)
    return flood_mean(seen.losses, level, over="example")


def at_level(seen: Seen, _: jax.Array) -> jax.Array:
    """The level is found on the way, and not the number that is chosen."""
    return flood_mean(seen.losses, seen.level)


def decayed(
    number: jax.Array, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(cast(float, number)), inner)


def sharpness_aware(
    number: jax.Array, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(number))
    return optax.contrib.sam(inner, adversary, opaque_mode=True)


def average(params: Any, target: Any, epoch: jax.Array, protocol: Protocol) -> Any:
    """A moving average of the model, which does not lag while it is warm."""
    warm = epoch < protocol.warm_epochs
    pace = jnp.where(warm, 1.0, 1 - protocol.decay)
    return optax.incremental_update(params, target, pace)


def on_plateau(
    _: jax.Array, number: jax.Array, protocol: Protocol
) -> tuple[Any, Watch]:
    """From no flooding upwards, by steps of the number."""
    step = cast(float, number)
    init, update = own_rules.on_plateau(step=step, patience=protocol.patience)
    return init(), cast(Watch, update)


METHODS: dict[str, Method] = {
    "plain": Method("plain training", "-", (0.0,)),
    "weight_decay": Method(
        "weight decay",
        "decay",
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        optimizer=decayed,
    ),
    "sam": Method(
        "SAM", "radius", (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), optimizer=sharpness_aware
    ),
    "flooding": Method(
        "flooding", "level", LEVELS, lambda s, b: flood_mean(s.losses, b)
    ),
    "pause": Method(
        "pause (no ascent)",
        "level",
        LEVELS,
        lambda s, b: flood_mean(s.losses, b, shape=shapes.pause()),
    ),
    "iflood": Method(
        "iFlood", "level", LEVELS, lambda s, b: flood_mean(s.losses, b, over="example")
    ),
    "softad": Method(
        "SoftAD",
        "level",
        LEVELS,
        lambda s, b: flood_mean(s.losses, b, over="example", shape=shapes.soft()),
    ),
    "class_wise": Method("class-wise", "largest level", LEVELS, by_class),
    "coce": Method(
        "COCE (tail mean)",
        "level",
        LEVELS,
        lambda s, b: flood_loss(tail_mean(s.losses), b),
    ),
    "relax_loss": Method(
        "RelaxLoss",
        "level",
        LEVELS,
        lambda s, b: relax_loss(s.logits, s.labels, b, epoch=s.epoch),
    ),
    "adaflood": Method(
        "AdaFlood", "gamma", SHARES, by_held_out, prepare=before.held_out
    ),
    "adaflood_last_layer": Method(
        "AdaFlood, last layer re-fitted",
        "gamma",
        SHARES,
        by_held_out,
        prepare=before.held_out_by_last_layer,
    ),
    "wavebound": Method(
        "WaveBound, whole batch",
        "epsilon",
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        lambda s, e: flood_mean(s.losses, levels.wavebound(s.target_loss, e)),
        deploy=average,
    ),
    "accordance": Method(
        "level from accordance (Flooding-X)",
        "threshold",
        (-0.05, 0.0, 0.05, 0.1, 0.2, 0.3),
        at_level,
        prepare=before.level_from_accordance,
    ),
    "plateau": Method(
        "level on plateau",
        "step",
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
        at_level,
        watch=on_plateau,
    ),
}
