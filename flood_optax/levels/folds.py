"""Levels from models that never saw the example: hard and mislabelled ones show."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.checks import (
    NEVER_EVALUATED,
    as_integer,
    as_real_array,
    check_key,
    check_number,
    check_that,
)
from flood_optax.levels.blocks import assigned, check_known
from flood_optax.levels.meshes import replicated
from flood_optax.precision import wide


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

    Examples:
      >>> levels = adaflood(jnp.array([0.0, 0.1, 2.0, 50.0]), gamma=0.25)
      >>> print([f"{level:.3f}" for level in levels])
      ['0.000', '0.074', '1.046', '1.386']

    References:
      Bae et al., AdaFlood, TMLR 2024, https://arxiv.org/abs/2311.02891
    """
    a = as_real_array(held_out_loss, "adaflood(held_out_loss)")
    if not isinstance(a, Tracer):
        missing = np.isnan(a).sum()
        got = f"{missing} of {a.size} entries: {NEVER_EVALUATED}"
        check_that(not missing, "adaflood(held_out_loss)", "not be NaN", got)
    check_number("adaflood(gamma=...)", gamma, "in [0, 1]")
    check_number("adaflood(alpha=...)", alpha, "finite")
    check_number("adaflood(beta=...)", beta, "finite")
    a = wide(a)
    g = jnp.asarray(gamma, a.dtype)
    z = jnp.asarray(alpha, a.dtype) * a + jnp.asarray(beta, a.dtype)
    # The logarithm of 1 + change, exact near level 0; far from it the sum of two terms.
    change = (1 - g) * jnp.expm1(-jnp.maximum(z, -1))
    near = (change > -0.5) & (z > -1)
    far_level = -jnp.logaddexp(jnp.log1p(-g) - z, jnp.log(g))
    return jnp.where(near, -jnp.log1p(jnp.where(near, change, 0)), far_level)


def held_out(
    fit: Callable[[jax.Array, jax.Array], Any],
    evaluate: Callable[[Any, jax.Array], Any],
    num_examples: int,
    *,
    num_folds: int,
    key: jax.Array,
    vmap: bool = False,
    groups: Any = None,
    stratify: Any = None,
) -> Any:
    r"""Returns what models say of examples that they were fitted without.

    A random permutation of the n examples is cut into K = ``num_folds`` blocks, of
    sizes that differ by one at most; each block is evaluated under a model fitted on
    the others. The result is keyed by dataset index: **entry i is that of example i**.
    Any model will do, of JAX or not.

    Args:
      fit: (train_indices [n_train] int32, key) -> model, any object; with ``vmap`` a
        pytree of arrays.
      evaluate: (model, indices [n_held_out] int32) -> a tree of arrays
        [n_held_out, ...] in the order of the indices, such as probabilities; without
        augmentation and dropout.
      num_examples: n, an int >= 2.
      num_folds: K, an int from 2 to n.
      key: a JAX PRNG key; the permutation and each fold get a key of their own.
      vmap: whether to train all folds in one program by `jax.vmap`, which needs
        traceable functions and folds of one size; otherwise fold by fold, one model at
        a time. The folds, their keys and, to rounding, the numbers are the same.
      groups: which examples belong together, [n] of any hashable values or integers:
        copies of a record, sentences of a document, frames of a video. A group is held
        out as a whole: of a copy that stays in the training set the model knows the
        label. Large groups come first, each into the smallest fold; without
        ``stratify`` groups are then moved and swapped while that evens the sizes out.
      stratify: labels [n] of any hashable values or integers. Every fold then holds its
        share of every class, to one example, with ``groups`` to about one group; and no
        model is fitted without a class.

    Returns:
      The tree that ``evaluate`` returns, its arrays of shape (num_examples, ...).

    Raises:
      ValueError: for sizes that do not fit, folds that return different shapes, or a
        class of which all examples fall into one fold in spite of ``stratify``.
      TypeError: for what is no key, and with ``groups`` or ``stratify`` a traced one.

    Examples:
      >>> y = jnp.array([1.0, 2.0, 4.0, 9.0])
      >>> found = held_out(
      ...     fit=lambda indices, key: y[indices].sum(),
      ...     evaluate=lambda total, indices: {"rest": total + 0 * y[indices]},
      ...     num_examples=4,
      ...     num_folds=4,
      ...     key=jax.random.key(0),
      ... )
      >>> print(found["rest"])  # 16 without 1, without 2, ...
      [15. 14. 12.  7.]
    """
    asked = _Folds("held_out", num_examples, num_folds, key, groups, stratify)
    return _by_folds(fit, evaluate, asked, vmap=vmap)


def held_out_losses(
    fit: Callable[[jax.Array, jax.Array], Any],
    evaluate: Callable[[Any, jax.Array], ArrayLike],
    num_examples: int,
    *,
    num_folds: int,
    key: jax.Array,
    vmap: bool = False,
    groups: Any = None,
    stratify: Any = None,
) -> jax.Array:
    r"""Returns each example's loss under a model that was fitted without it.

    As `held_out`, for a loss of each example: what `adaflood` makes levels of. In
    AdaFlood's cheap variant one network is trained on everything, and ``fit`` only
    re-initialises and fits its last layer.

    Args:
      evaluate: (model, indices [n_held_out] int32) -> losses [n_held_out], real floats
        in the order of the indices; without augmentation and dropout.
      fit, num_examples, num_folds, key, vmap, groups, stratify: as in `held_out`.

    Returns:
      Losses of shape (num_examples,), of the dtype that ``evaluate`` returns.

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

    def losses(model: Any, indices: jax.Array) -> jax.Array:
        found = evaluate(model, indices)
        found = as_real_array(found, "held_out_losses(evaluate)'s losses")
        call, rule = "held_out_losses(evaluate)", "return one loss per index, shape"
        same = found.shape == indices.shape
        check_that(same, call, f"{rule} {indices.shape}", found.shape)
        return found

    asked = _Folds("held_out_losses", num_examples, num_folds, key, groups, stratify)
    return _by_folds(fit, losses, asked, vmap=vmap)


class _Folds(NamedTuple):
    """The folds that are asked for, and by which call."""

    call: str
    num_examples: int
    num_folds: int
    key: Any
    groups: Any
    stratify: Any

    def blocks(self) -> tuple[list[jax.Array], jax.Array]:
        """The indices of each fold, in a random order, and the keys of all."""
        chosen = self.groups is not None or self.stratify is not None
        if chosen:
            check_known(self.call, self.key, self.groups, self.stratify)
        with jax.ensure_compile_time_eval() if chosen else contextlib.nullcontext():
            # Slices, not single keys stacked again: JAX's check of key reuse follows.
            keys = jax.random.split(self.key, self.num_folds + 1)
            order = jax.random.permutation(keys[0], self.num_examples)
            order = order.astype(jnp.int32)
            if not chosen:
                return jnp.array_split(order, self.num_folds), keys[1:]
            given = self.call, self.groups, self.stratify
            return assigned(*given, np.asarray(order), self.num_folds), keys[1:]


def _by_folds(
    fit: Callable[[jax.Array, jax.Array], Any],
    evaluate: Callable[[Any, jax.Array], Any],
    asked: _Folds,
    *,
    vmap: bool,
) -> Any:
    call, n, k, *_ = asked
    n = as_integer(f"{call}(num_examples=...)", n, least=2)
    k = as_integer(f"{call}(num_folds=...)", k, least=2)
    check_key(f"{call}(key=...)", asked.key)
    rule = f"{'divide' if vmap else 'be at most'} num_examples, {n}"
    fits = k <= n and not (vmap and n % k)
    check_that(fits, f"{call}(num_folds=..., vmap={vmap})", rule, k)

    def fold(train: jax.Array, left_out: jax.Array, fold_key: jax.Array) -> Any:
        found = jax.tree.map(jnp.asarray, evaluate(fit(train, fold_key), left_out))
        shapes = [leaf.shape for leaf in jax.tree.leaves(found)]
        fits = all(shape[:1] == left_out.shape for shape in shapes)
        first = f"{left_out.shape[0]} in the first axis"
        rule = f"return arrays with an entry per index, {first}"
        check_that(fits, f"{call}(evaluate)", rule, f"the shapes {shapes}")
        return found

    blocks, fold_keys = asked._replace(num_examples=n, num_folds=k).blocks()
    rests = [jnp.concatenate(blocks[:i] + blocks[i + 1 :]) for i in range(k)]
    if vmap:
        sizes = sorted({len(block) for block in blocks})
        got = f"{sizes[0]} to {sizes[-1]} examples, as the groups fall"
        remedy = " Use vmap=False."
        one = len(sizes) == 1
        check_that(one, f"{call}(vmap=True)", "have folds of one size", got, remedy)
        found = jax.vmap(fold)(jnp.stack(rests), jnp.stack(blocks), fold_keys)
        parts = [jax.tree.map(lambda x, i=i: x[i], found) for i in range(k)]
    else:
        parts = [*map(fold, rests, blocks, [fold_keys[i] for i in range(k)])]
        _check_alike(call, parts)
    order = jnp.concatenate(blocks)

    def by_example(*rows: jax.Array) -> jax.Array:
        joined = jnp.concatenate([replicated(part) for part in rows])
        return jnp.zeros_like(joined).at[order].set(joined)

    return jax.tree.map(by_example, *parts)


def _check_alike(call: str, parts: list[Any]) -> None:
    """Demands of every fold what the first has returned, but for the first axis."""

    def of(part: Any) -> tuple[list[str], Any]:
        leaves, tree = jax.tree.flatten(part)
        return [f"{x.dtype}{['n', *x.shape[1:]]}" for x in leaves], tree

    first, rule = of(parts[0]), "return the same in every fold"
    remedy = (
        " If the model of one has not seen every class: with `stratify=labels` each "
        "model sees all."
    )
    for k, part in enumerate(parts):
        got = f"{first} in fold 0 and {of(part)} in fold {k}"
        check_that(of(part) == first, f"{call}(evaluate)", rule, got, remedy)
