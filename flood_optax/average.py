"""Averaged weights: the mean of the parameters that a run visits, in its state."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.typing import ArrayLike

from flood_optax.checks import check_number, check_that
from flood_optax.precision import rounded


class AverageState(NamedTuple):
    """The average of the parameters; `optax.tree.get` finds each field.

    The schema is stable: checkpoints rely on it.

    Attributes:
      flood_average_step: int32 scalar, updates averaged so far (windows inside
        ``flood(..., every_k=k)``).
      flood_average: tree like params, the mean, float32 at least; the parameters
        themselves before the first update. Leaves that are no floats are masked.
    """

    flood_average_step: jax.Array
    flood_average: Any


# so that `jax.export` can write a train step that takes and gives the state
export.register_namedtuple_serialization(
    AverageState, serialized_name="flood_optax.AverageState"
)


def average_params(
    decay: ArrayLike = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the average of the parameters; updates pass through unchanged.

    With :math:`\theta_t`, the parameters after update t = 1, 2, ..., and
    :math:`\delta` = ``decay`` the average is

    .. math:: a_t = a_{t-1} + (\theta_t - a_{t-1}) / \min(t, 1 / (1 - \delta)).

    Until t = 1 / (1 - decay), 100 for .99, it is the plain mean of
    :math:`\theta_1, ..., \theta_t`; from there on an exponential moving average, in
    which what is k updates old has the share :math:`(1 - \delta)\,\delta^k`. The first
    parameters, :math:`\theta_0`, count nowhere. Evaluate `flood_optax.averaged`, and
    train on with the parameters themselves.

    Put it last in a chain, where the updates are what `optax.apply_updates` adds, and
    inside of whatever may leave a step out:

    * ``chain(scale_by_flood(b), adam(1e-3), average_params(0.99))`` averages at each
      update, also at one of ``weight`` 0, where momentum may move the parameters;
    * ``flood(chain(adam(1e-3), average_params(0.99)), b, every_k=4)`` averages once a
      window; what is skipped or has weight 0 leaves no trace. So does
      `optax.MultiSteps` around the chain;
    * ``chain(scale_by_flood(b), apply_if_finite(chain(adam(1e-3),
      average_params(0.99)), 5))``: a skipped step is no step. Behind
      `optax.apply_if_finite` it would count the same parameters twice.

    Updates of NaN make the parameters NaN, and so the average, for ever. It costs a
    read and a write of the average, a read of the parameters, and no communication.

    It does not know of batch statistics, which averaged weights need of their own
    (docs/averaging.md). A learning-rate schedule that ends at 0 leaves nothing to
    average: the weights come to rest, and the average lags behind them.

    Args:
      decay: a real scalar in [0, 1). 0 keeps the last parameters. In
        `optax.inject_hyperparams` with 16-bit parameters pass
        ``hyperparam_dtype=jnp.float32``: rounded to 16 bits .999 is 1.

    Returns:
      A transformation with the state `AverageState`, whose arrays are its own, sharded
      as the parameters. Parameters of 16 bits are averaged in float32, after they are
      rounded as `optax.apply_updates` rounds them. Leaves that are None, masked or no
      floats have no average. Its update needs ``params``.

    Raises:
      ValueError: if decay is not in [0, 1); in update, if params are missing.
      TypeError: if decay is no real number, or an array of less than 32 bits.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flood_optax import average_params, averaged, scale_by_flood
      >>> optimizer = optax.chain(
      ...     scale_by_flood(0.5), optax.sgd(0.1), average_params(0.9)
      ... )
      >>> def loss_fn(w):
      ...     return jnp.exp(w) - w - 1.0  # .5 at w = .858
      >>> w = jnp.array(2.0)
      >>> state = optimizer.init(w)
      >>> for _ in range(60):
      ...     value, grad = jax.value_and_grad(loss_fn)(w)
      ...     updates, state = optimizer.update(grad, state, w, value=value)
      ...     w = optax.apply_updates(w, updates)
      >>> print(f"last {w:.3f}, averaged {averaged(state, w):.3f}")
      last 0.918, averaged 0.846

    References:
      Polyak and Juditsky, SIAM J. Control Optim. 30 (1992), 838-855;
      Izmailov et al., UAI 2018, https://arxiv.org/abs/1803.05407
    """
    _check_decay(decay)

    def init_fn(params: optax.Params) -> AverageState:
        return AverageState(
            flood_average_step=jnp.zeros([], jnp.int32),
            flood_average=jax.tree.map(_start, params),
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError(
                "`average_params().update(params)` needs the parameters, got None: "
                "pass `optimizer.update(grads, state, params)`."
            )
        before = cast(AverageState, state)
        step = jnp.asarray(optax.safe_increment(before.flood_average_step))
        kept = jnp.asarray(decay, jnp.result_type(float))
        count = jnp.minimum(step.astype(kept.dtype), 1 / (1 - kept))
        average = jax.tree.map(
            functools.partial(_averaged_leaf, count),
            params,
            updates,
            before.flood_average,
        )
        return updates, AverageState(step, average)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def averaged(state: Any, params: Any) -> Any:
    """The averages that `average_params` keeps, found anywhere in a state.

    Several averages of different parts of ``params`` make one, as where
    `optax.partition` gives each group an optimizer with an average of its own. Where
    there is none (masked, of another group, integers) it is the parameter itself.

    Args:
      state: an optimizer state, or a tree that holds one, such as a TrainState.
      params: the parameters that were averaged, of any dtypes. It may be called under
        `jax.jit`.

    Returns:
      A tree like params, in the dtypes of params: arrays of its own, which outlive a
      donated state.

    Raises:
      ValueError: if there is no average, more than one of the same parameter, or if
        params are not those that were averaged.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flood_optax import average_params, averaged
      >>> optimizer = optax.chain(optax.sgd(1.0), average_params(0.99))
      >>> w = jnp.array([1.0, 5.0])
      >>> state = optimizer.init(w)
      >>> for grad in (jnp.array([1.0, 0.0]), jnp.array([-4.0, 1.0])):
      ...     updates, state = optimizer.update(grad, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(w, averaged(state, w))
      [4. 4.] [2.  4.5]
    """
    found = optax.tree.get_all_with_path(state, "flood_average")
    call = "averaged(state, params)"
    remedy = (
        " Put `average_params(decay)` last in the chain, or last inside "
        "`flood(optax.chain(optimizer, average_params(decay)), level)`."
    )
    check_that(found, call, "find an average in the state", "none", remedy)
    parts = [_by_path(average) for _, average in found]
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    own = {path for part in parts for path, x in part.items() if not _is_masked(x)}
    for path in own - {path for path, _ in leaves}:
        _check_tree(path, "in the average alone")
    merged = []
    for path, param in leaves:
        here = [mean for part in parts if (mean := _at(part, path)) is not None]
        _check_tree(path, "" if here else "in params alone")
        means = [mean for mean in here if not _is_masked(mean)]
        rule = f"find one average of params{jax.tree_util.keystr(path)}"
        places = ", ".join(jax.tree_util.keystr(path) for path, _ in found)
        remedy = " Pass the part of the state that holds the one you mean."
        check_that(len(means) < 2, call, rule, f"{len(means)}: {places}", remedy)
        mean = means[0] if means else param
        shapes = f"of shape {jnp.shape(mean)}, in params {jnp.shape(param)}"
        _check_tree(path, "" if jnp.shape(mean) == jnp.shape(param) else shapes)
        merged.append(_own(param, mean))
    return jax.tree.unflatten(structure, merged)


def _check_decay(decay: Any) -> None:
    call = "average_params(decay=...)"
    dtype: Any = getattr(decay, "dtype", np.dtype(float))
    short = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    remedy = (
        " Pass a float, or `optax.inject_hyperparams(average_params, "
        "hyperparam_dtype=jnp.float32)`."
    )
    got, rule = f"{dtype}, to which .999 is 1", "have 32 bits at least"
    check_that(not short, call, rule, got, remedy, error=TypeError)
    check_number(call, decay, "in [0, 1)")


def _start(param: Any) -> Any:
    """A copy, float32 at least, so that both can be donated."""
    dtype = jax.typeof(param).dtype
    if not jnp.issubdtype(dtype, jnp.inexact):
        return optax.MaskedNode()
    return jnp.array(param, np.promote_types(dtype, np.float32), copy=True)


def _averaged_leaf(count: jax.Array, param: Any, update: Any, average: Any) -> Any:
    if _is_masked(average):
        return average
    if update is not None and not _is_masked(update):
        param = optax.apply_updates(param, update)
    new = rounded(jnp.asarray(param)).astype(average.dtype)
    step = (new - average) / count.astype(jnp.finfo(average.dtype).dtype)
    # what is infinite for ever, such as a mask, has no way to go: inf - inf is NaN
    return jnp.where(new == average, new, average + step)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _by_path(tree: Any) -> dict[Any, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_masked)
    return dict(leaves)


def _at(part: dict[Any, Any], path: Any) -> Any:
    """The leaf there, or the mask over the branch that it is on; None without one."""
    ends = (path[:end] for end in range(len(path), -1, -1))
    return next((part[end] for end in ends if end in part), None)


def _own(param: Any, value: Any) -> Any:
    """The value as an array of its own, in the dtype of the parameter."""
    if value is param:
        return value.copy() if isinstance(value, jax.Array) else value
    return jnp.array(value, jax.typeof(param).dtype, copy=True)


def _check_tree(path: Any, fault: str) -> None:
    """Demands at a path the tree that `optimizer.init` was given."""
    got = f"params{jax.tree_util.keystr(path)} {fault}"
    rule = "be given the tree that `optimizer.init` was given"
    check_that(not fault, "averaged(state, params)", rule, got)
