"""Where levels come from: schedules, other models, validation, gradients."""

import numbers
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.accordance import accordance_level, gradient_accordance
from flood_optax.bend import compare_dtype
from flood_optax.checks import broadcast_level, check_scalar_level, real_array

__all__ = [
    "PlateauState",
    "accordance_level",
    "adaflood",
    "entropy_floor",
    "gradient_accordance",
    "held_out_losses",
    "on_plateau",
    "warmup",
    "wavebound",
]


def warmup(
    level: ArrayLike | Callable[[jax.Array], ArrayLike], start_step: int
) -> Callable[[jax.Array], jax.Array]:
    r"""Returns a schedule that floods from a step on.

    b(t) = -inf, which is off, for t < ``start_step``, and ``level`` from there on: a
    high level from the first step would suppress early learning.

    Args:
      level: a scalar, or a schedule from the step (not shifted) to one.
      start_step: the first step that floods, an int >= 0; windows under ``every_k``.

    Returns:
      A schedule step -> level for `flood_optax.scale_by_flood` and
      `flood_optax.flood`, a float32 scalar.

    Raises:
      TypeError: if ``level`` is no number or ``start_step`` no int.
      ValueError: if ``level`` is NaN, +inf or not a scalar, or ``start_step`` negative.

    Examples:
      >>> schedule = warmup(0.25, start_step=2)
      >>> print([float(schedule(step)) for step in range(4)])
      [-inf, -inf, 0.25, 0.25]
    """
    if not callable(level):
        check_scalar_level(level, "warmup(level=...)")
    if not isinstance(start_step, jax.Array):
        _check_int("warmup(start_step=...)", start_step, least=0)

    def level_at(step: ArrayLike) -> jax.Array:
        now = jnp.asarray(level(jnp.asarray(step)) if callable(level) else level)
        now = now.astype(jnp.float32)
        return jnp.where(jnp.asarray(step) < start_step, -jnp.inf, now)

    return level_at


def adaflood(
    held_out_loss: ArrayLike,
    gamma: ArrayLike,
    *,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 0.0,
) -> jax.Array:
    r"""Returns the level of each example from its loss under a model that left it out.

    :math:`\theta_i = -\log((1 - \gamma) e^{-(\alpha a_i + \beta)} + \gamma)` with
    :math:`a_i` = ``held_out_loss``: between 0 and :math:`-\log\gamma` where
    :math:`z = \alpha a_i + \beta \ge 0`, z itself for :math:`\gamma = 0` and 0 for
    :math:`\gamma = 1`. Neither overflows nor cancels. Hard and mislabelled examples get
    high levels. Flood with ``flood_mean(losses, theta[indices], over="example")``.
    Losses of densities, which may be negative, take ``(1 - gamma) * held_out_loss``.

    Args:
      held_out_loss: real floats of any shape, such as from `held_out_losses`; +inf
        gives the cap :math:`-\log\gamma`.
      gamma: a scalar in [0, 1], how far to trust the label over the held-out model.
      alpha: a finite scalar, the slope of a correction of the held-out loss.
      beta: a finite scalar, its offset.

    Returns:
      Levels of the shape of ``held_out_loss``, float32 at least.

    Raises:
      TypeError: if ``held_out_loss`` is no real float, or another argument no number.
      ValueError: if a concrete ``held_out_loss`` has NaN, or another is out of range.

    Examples:
      >>> levels = adaflood(jnp.array([0.0, 0.1, 2.0, 50.0]), gamma=0.25)
      >>> print([f"{level:.3f}" for level in levels])
      ['0.000', '0.074', '1.046', '1.386']

    References:
      Bae et al., AdaFlood, TMLR 2024, https://arxiv.org/abs/2311.02891
    """
    a = real_array(held_out_loss, "adaflood(held_out_loss)")
    if not isinstance(a, Tracer) and (missing := np.isnan(a).sum()):
        raise ValueError(
            f"`adaflood(held_out_loss)` must not be NaN, got {missing} of {a.size} "
            "entries: the model of their fold has diverged, or was never evaluated."
        )
    _check_number("adaflood(gamma=...)", gamma, "in [0, 1]", lambda g: 0 <= g <= 1)
    _check_number("adaflood(alpha=...)", alpha, "finite", np.isfinite)
    _check_number("adaflood(beta=...)", beta, "finite", np.isfinite)
    dtype = compare_dtype(a.dtype)
    g = jnp.asarray(gamma, dtype)
    z = jnp.asarray(alpha, dtype) * a.astype(dtype) + jnp.asarray(beta, dtype)
    # The logarithm of 1 + change, exact near level 0; far from it the sum of two terms.
    change = (1 - g) * jnp.expm1(-jnp.maximum(z, -1))
    near = (change > -0.5) & (z > -1)
    far_level = -jnp.logaddexp(jnp.log1p(-g) - z, jnp.log(g))
    return jnp.where(near, -jnp.log1p(jnp.where(near, change, 0)), far_level)


def held_out_losses(
    fit: Callable[[jax.Array, jax.Array], Any],
    evaluate: Callable[[Any, jax.Array], ArrayLike],
    num_examples: int,
    *,
    num_folds: int,
    key: jax.Array,
    vmap: bool = False,
) -> jax.Array:
    r"""Returns each example's loss under a model that was fitted without it.

    A random permutation of the n examples is cut into K = ``num_folds`` blocks, of
    sizes that differ by one at most; each block is evaluated under a model fitted on
    the others. The result is keyed by dataset index: **entry i is that of example i**.
    Any model will do, of JAX or not. In AdaFlood's cheap variant one network is trained
    on everything, and ``fit`` only re-initialises and fits its last layer.

    Args:
      fit: (train_indices [n_train] int32, key) -> model, any object; with ``vmap`` a
        pytree of arrays.
      evaluate: (model, indices [n_held_out]) -> losses [n_held_out], real floats in the
        order of the indices; without augmentation and dropout.
      num_examples: n, an int >= 2.
      num_folds: K, an int from 2 to n.
      key: a JAX PRNG key; the permutation and each fold get a key of their own.
      vmap: whether to train all folds in one program by `jax.vmap`, which needs
        traceable functions and a K that divides n; otherwise fold by fold, one model at
        a time. The folds, their keys and, to rounding, the losses are the same.

    Returns:
      Losses of shape (num_examples,), of the dtype that ``evaluate`` returns.

    Raises:
      TypeError: if n or K is no int, or the losses no real floats.
      ValueError: if n or K is out of range, or there is not one loss per index.

    Examples:
      >>> y = jnp.array([1.0, 2.0, 4.0, 9.0])
      >>> losses = held_out_losses(
      ...     fit=lambda indices, key: y[indices].mean(),
      ...     evaluate=lambda mean, indices: jnp.abs(y[indices] - mean),
      ...     num_examples=4,
      ...     num_folds=4,
      ...     key=jax.random.key(0),
      ... )
      >>> print([f"{loss:.2f}" for loss in losses])  # |1 - 5|, |2 - 14/3|, ...
      ['4.00', '2.67', '0.00', '6.67']

    References:
      Bae et al., AdaFlood, TMLR 2024, https://arxiv.org/abs/2311.02891
    """
    _check_int("held_out_losses(num_examples=...)", num_examples, least=2)
    _check_int("held_out_losses(num_folds=...)", num_folds, least=2)
    if num_folds > num_examples or (vmap and num_examples % num_folds):
        rule = "divide" if vmap else "be at most"
        raise ValueError(
            f"`held_out_losses(num_folds=..., vmap={vmap})` must {rule} num_examples, "
            f"{num_examples}, got {num_folds}."
        )

    def fold(train: jax.Array, held_out: jax.Array, fold_key: jax.Array) -> jax.Array:
        losses = evaluate(fit(train, fold_key), held_out)
        losses = real_array(losses, "held_out_losses(evaluate)'s losses")
        if losses.shape != held_out.shape:
            raise ValueError(
                "`held_out_losses(evaluate)` must return one loss per index, shape "
                f"{held_out.shape}, got {losses.shape}."
            )
        return losses

    # Slices, not single keys stacked again: JAX's check of key reuse follows them.
    keys = jax.random.split(key, num_folds + 1)
    order_key, fold_keys = keys[0], keys[1:]
    order = jax.random.permutation(order_key, num_examples).astype(jnp.int32)
    blocks = jnp.array_split(order, num_folds)
    rests = [jnp.concatenate(blocks[:k] + blocks[k + 1 :]) for k in range(num_folds)]
    if vmap:
        folds = jnp.stack(rests), jnp.stack(blocks), fold_keys
        losses = jax.vmap(fold)(*folds).ravel()
    else:
        losses = jnp.concatenate(list(map(fold, rests, blocks, fold_keys)))
    return jnp.zeros_like(losses).at[order].set(losses)


def wavebound(target_loss: ArrayLike, epsilon: ArrayLike) -> jax.Array:
    r"""Returns levels a little below the loss of a slowly moving target model.

    :math:`b = L(\tau) - \epsilon` with :math:`L(\tau)` = ``target_loss`` on the same
    mini-batch, :math:`\tau` a moving average of the parameters
    (`optax.incremental_update`). No gradient flows into it. Where the models agree the
    loss is :math:`\epsilon` above its level and descends. In the paper the losses are
    [steps, features], each a mean over the batch, and the objective is
    ``flood_loss(losses, wavebound(target_losses, epsilon)).mean()``.

    Args:
      target_loss: real floats of any shape, that of the loss to flood.
      epsilon: finite and non-negative; a scalar, or broadcasts to ``target_loss``.

    Returns:
      Levels of the shape and dtype of ``target_loss``.

    Raises:
      TypeError: if ``target_loss`` is not of a real float dtype.
      ValueError: if ``epsilon`` is negative, not finite or does not broadcast.

    Examples:
      >>> print(wavebound(jnp.array([0.5, 0.25]), epsilon=0.125))
      [0.375 0.125]

    References:
      Cho et al., WaveBound, NeurIPS 2022, https://arxiv.org/abs/2210.14303
    """
    loss = real_array(target_loss, "wavebound(target_loss)")
    gap = broadcast_level(epsilon, loss.shape, "wavebound(epsilon=...)")
    if not isinstance(gap, Tracer) and not bool((jnp.isfinite(gap) & (gap >= 0)).all()):
        raise ValueError(
            f"`wavebound(epsilon=...)` must be non-negative and finite, got {epsilon}."
        )
    return jax.lax.stop_gradient(loss - gap.astype(loss.dtype))


def entropy_floor(target_probs: ArrayLike) -> jax.Array:
    r"""Returns the smallest cross-entropy that soft targets leave reachable.

    :math:`\min_q -\sum_c p_c \log q_c = -\sum_c p_c \log p_c` with p =
    ``target_probs``: the entropy of the targets, 0 for a one-hot row. Under label
    smoothing or mixup no loss lies below it, and a constant level below it never acts:
    give levels relative to it, ``flood_mean(losses, entropy_floor(p) + b,
    over="example")``, or ``entropy_floor(p).mean() + b`` for the batch.

    Args:
      target_probs: real floats [..., num_classes]; rows non-negative, with sum 1.

    Returns:
      The floor of each example, [...], float32 at least. No gradient flows into it.

    Raises:
      TypeError: if ``target_probs`` is not of a real float dtype.
      ValueError: if it has no axis, or concrete rows that are no probabilities.

    Examples:
      >>> floor = entropy_floor(jnp.array([[0.0, 1.0], [0.1, 0.9]]))
      >>> print([f"{nats:.4f}" for nats in floor])
      ['0.0000', '0.3251']
    """
    probs = real_array(target_probs, "entropy_floor(target_probs)")
    if probs.ndim == 0:
        raise ValueError("`entropy_floor(target_probs)` must have an axis of classes.")
    tolerance = float(cast(Any, jnp.finfo)(probs.dtype).eps) ** 0.5
    probs = jax.lax.stop_gradient(probs.astype(compare_dtype(probs.dtype)))
    total = jnp.asarray(probs.sum(-1))
    valid = (probs >= 0).all() & (abs(total - 1) <= tolerance).all()
    if not isinstance(valid, Tracer) and not valid:
        raise ValueError(
            "`entropy_floor(target_probs)` must be rows of probabilities, got numbers "
            f"from {probs.min()} and sums from {total.min()} to {total.max()}."
        )
    # The second term, 0 for a sum of 1, is what rounded targets add to the minimum.
    entropy: Callable[[Any], jax.Array] = jax.scipy.special.entr
    return entropy(probs).sum(-1) - entropy(total)


class PlateauState(NamedTuple):
    """What `on_plateau` remembers; scalars, float32 but for ``waited``, an int32.

    Attributes:
      level: the level in force.
      best: the best metric so far; for mode="min" metrics are negated.
      waited: updates in the window so far.
      window_best: the best metric among those updates.
      before: what it is compared with: the best of the window before at this level, inf
        after a new best, -inf after a move.
    """

    level: jax.Array
    best: jax.Array
    waited: jax.Array
    window_best: jax.Array
    before: jax.Array


def on_plateau(
    initial: float,
    *,
    step: float,
    patience: int,
    mode: Literal["max", "min"],
    minimum: float = 0.0,
    maximum: float = float("inf"),
) -> tuple[
    Callable[[], PlateauState],
    Callable[[PlateauState, ArrayLike], tuple[jax.Array, PlateauState]],
]:
    r"""Returns a level that moves when a validation metric stops improving.

    A window ends after ``patience`` updates in a row without a new best metric. The
    level then moves by ``step``, within [``minimum``, ``maximum``],

    * up, if the metric decays at the level in force (the model overfits): its best in
      the window is worse than in the one before, or than the best just left behind;
    * down, if it has ceased to decay, but is still worse than its best: the level costs
      more than it saves;
    * up, if it is as good as its best: the level has cost nothing yet.

    The window after a move is the first to compare with, and moves the level only in
    the last case: what counts is the trend at a level, not the effect of the step. So
    the level hovers at the lowest that keeps the metric from decaying. The rule is
    ours. A metric equal to the best is no new best, a NaN metric never is one.

    Args:
      initial: the level to start from, in [minimum, maximum].
      step: > 0, by how much it moves.
      patience: an int >= 1; in updates, usually epochs.
      mode: "max" if a higher metric is better (accuracy), "min" for a validation loss.
      minimum: the lowest level, finite.
      maximum: the highest, +inf for none.

    Returns:
      (init, update): ``init()`` gives a PlateauState and ``update(state, metric)`` the
      level to use from now on, a float32 scalar, and the next state; both can be jitted
      and scanned. Take the metric from plain evaluation, which is never flooded.

    Raises:
      TypeError: if an argument is no number or ``patience`` no int.
      ValueError: if one is out of range, ``mode`` unknown or a metric no scalar.

    Examples:
      >>> init, update = on_plateau(0.0, step=0.25, patience=1, mode="max")
      >>> state, levels = init(), []
      >>> for accuracy in (0.7, 0.8, 0.7, 0.6, 0.5, 0.6, 0.7):
      ...     level, state = update(state, accuracy)
      ...     levels.append(float(level))
      >>> print(levels)
      [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.25]
    """
    _check_number("on_plateau(minimum=...)", minimum, "finite", np.isfinite)
    _check_number("on_plateau(maximum=...)", maximum, "a level", lambda m: m > -np.inf)
    between = f"finite and in [{minimum}, {maximum}]"
    _check_number(
        "on_plateau(initial=...)",
        initial,
        between,
        lambda b: bool(np.isfinite(b)) and minimum <= b <= maximum,
    )
    _check_number("on_plateau(step=...)", step, "positive", lambda s: 0 < s < np.inf)
    _check_int("on_plateau(patience=...)", patience, least=1)
    if mode not in ("max", "min"):
        raise ValueError(
            f'`on_plateau(mode=...)` must be "max" or "min", got {mode!r}.'
        )

    def init() -> PlateauState:
        # An array for each field: a train step that donates the state frees them all.
        level, best, window_best, before = (
            jnp.full([], number, jnp.float32)
            for number in (initial, -jnp.inf, -jnp.inf, jnp.inf)
        )
        waited = jnp.zeros([], jnp.int32)
        return PlateauState(level, best, waited, window_best, before)

    def update(
        state: PlateauState, metric: ArrayLike
    ) -> tuple[jax.Array, PlateauState]:
        if np.shape(metric) != ():
            raise ValueError(
                "`on_plateau().update(metric)` must be a scalar, got shape "
                f"{np.shape(metric)}."
            )
        score = jnp.asarray(metric, jnp.float32) * (1 if mode == "max" else -1)
        improved = score > state.best
        best = jnp.where(improved, score, state.best)
        window = jnp.where(score > state.window_best, score, state.window_best)
        before = jnp.where(improved, jnp.inf, state.before)
        waited = jnp.where(improved, 0, state.waited + 1)
        ends = waited >= patience
        moves = ends & ((before > -jnp.inf) | (window == best))
        lowers = (before <= window) & (window < best)
        moved = jnp.clip(state.level + jnp.where(lowers, -step, step), minimum, maximum)
        level = jnp.where(moves, moved, state.level).astype(jnp.float32)
        return level, PlateauState(
            level=level,
            best=best,
            waited=jnp.where(ends, 0, waited),
            window_best=jnp.where(ends | improved, -jnp.inf, window),
            before=jnp.where(moves, -jnp.inf, jnp.where(ends, window, before)),
        )

    return init, update


def _check_int(call: str, given: Any, *, least: int) -> None:
    if isinstance(given, bool) or not isinstance(given, numbers.Integral | np.integer):
        raise TypeError(f"`{call}` must be an int, got {given!r}.")
    if given < least:
        rule = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"`{call}` must {rule}, got {given}.")


def _check_number(
    call: str, given: Any, rule: str, holds: Callable[[float], bool]
) -> None:
    """Checks a scalar argument; the numbers of tracers are not known."""
    if np.shape(given) != ():
        raise ValueError(f"`{call}` must be a scalar, got shape {np.shape(given)}.")
    if isinstance(given, Tracer):
        return
    number: Any = given.item() if hasattr(given, "item") else given
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"`{call}` must be a real number, got {given!r}.")
    if not holds(float(number)):
        raise ValueError(f"`{call}` must be {rule}, got {given}.")
