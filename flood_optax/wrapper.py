"""The optimizer wrapper: the inner optimizer sees the flooded objective whole."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.bend import compare_dtype
from flood_optax.objective import flooded
from flood_optax.shapes import Shape, reflect
from flood_optax.transform import (
    AxisName,
    FloodState,
    Level,
    batch_loss,
    flood_step,
    initial_state,
    scaled,
    schedule,
)

ShouldSkip = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


class FloodWindow(NamedTuple):
    """The accumulation window that is open.

    Attributes:
      flood_mini_step: int32 scalar, micro-batches in it so far.
      flood_grad_mean: tree like params, the running mean of their gradients, float32
        at least; leaves without gradient are masked.
      flood_value_mean: float scalar, the running mean of their raw losses.
      flood_skip_state: what should_skip_update_fn last returned beside its verdict.
    """

    flood_mini_step: jax.Array
    flood_grad_mean: Any
    flood_value_mean: jax.Array
    flood_skip_state: Any


class FloodWrapperState(NamedTuple):
    """The state of `flood`.

    Attributes:
      flood_state: a FloodState, which counts windows under ``every_k``.
      flood_inner_state: the state of the wrapped optimizer.
      flood_window: a FloodWindow where gradients are accumulated or skipped, else ().
    """

    flood_state: FloodState
    flood_inner_state: Any
    flood_window: Any


for _state in (FloodWindow, FloodWrapperState):  # as for FloodState
    export.register_namedtuple_serialization(
        _state, serialized_name=f"flood_optax.{_state.__name__}"
    )


def flood(
    inner: optax.GradientTransformation,
    level: Level,
    *,
    every_k: int | Callable[[jax.Array], ArrayLike] = 1,
    shape: Shape = reflect(),
    axis_name: AxisName | None = None,
    should_skip_update_fn: ShouldSkip | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that it minimises the flooded objective.

    ``inner`` sees :math:`\phi(L - b) + b` with L = ``value``, b = ``level`` and
    :math:`\phi` = ``shape`` as if the loss function had been flooded: its updates
    (and ``grad``, where given) are multiplied by m = :math:`\phi'(L - b)`, ``value`` is
    the flooded value and ``value_fn``, where given, is flooded at the same level. All
    are handed in raw. So line searches, `optax.polyak_sgd` and `optax.contrib.momo`
    work. At a tie the step descends; a NaN loss gives NaN updates to ``inner``:
    `optax.apply_if_finite` belongs inside.

    With ``every_k`` it accumulates as `optax.MultiSteps` does, and gradients AND values
    are averaged over the window, which is then flooded once: the large batch. ``value``
    is then the mean loss of the micro-batch; micro-batches must be of equal size.
    Between the ends of windows updates are zero. A NaN or inf spoils its own window
    only. ``inner``, the level schedule, ``flood_step``, ``flood_below`` count windows.

    Args:
      inner: the optimizer; not a MultiSteps, which would flood each micro-batch.
      level: a scalar, b, or a schedule from the step to one. -inf means off.
      every_k: micro-batches per window, a positive int or a schedule from the window's
        number to one. Under `optax.inject_hyperparams` name it in ``static_args``.
      shape: how to bend, see `flood_optax.shapes`.
      axis_name: mapped axis or axes over which ``value`` is averaged, see
        `flood_optax.scale_by_flood`.
      should_skip_update_fn: (gradients, window, params) -> (skip, state) as in
        `optax.MultiSteps`; a skipped micro-batch leaves no trace. With
        `optax.skip_not_finite` a value that is not finite skips too.

    Returns:
      A transformation whose update takes ``value=``, the raw loss, a real scalar. Its
      state holds a FloodState, which `optax.tree.get` finds by its fields.

    Raises:
      TypeError: if ``inner`` is no transformation, ``level`` no number, ``every_k`` no
        int; in update as `flood_optax.scale_by_flood`.
      ValueError: if ``level`` is NaN, +inf or no scalar, or ``every_k`` not positive;
        in update if ``value`` is missing or no scalar, or if ``value_fn`` or ``grad``
        come with accumulation, where they would belong to one micro-batch only.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import flood_optax
      >>> def loss_fn(w, x):
      ...     return jnp.mean((w * x - 1.0) ** 2)
      >>> optimizer = flood_optax.flood(optax.sgd(0.1), level=0.5, every_k=2)
      >>> w = jnp.array(0.9)
      >>> state = optimizer.init(w)
      >>> for x in (jnp.array([1.0, 1.5]), jnp.array([3.0, 2.0])):
      ...     value, grad = jax.value_and_grad(loss_fn)(w, x)
      ...     updates, state = optimizer.update(grad, state, w, value=value)
      ...     w = optax.apply_updates(w, updates)
      ...     print(f"loss {value:.4f} update {updates:.4f}")
      loss 0.0662 update 0.0000
      loss 1.7650 update -0.3562
      >>> print(f"{optax.tree.get(state, 'flood_value'):.4f}")
      0.9156

    References:
      Ishida et al., ICML 2020, section 3, https://arxiv.org/abs/2002.08709
    """
    if isinstance(inner, optax.MultiSteps):
        raise TypeError(
            "`flood(inner)` must be the optimizer itself, got MultiSteps, which would "
            "flood each micro-batch: use `flood(optimizer, level, every_k=k)`."
        )
    if not (callable(getattr(inner, "init", None)) and hasattr(inner, "update")):
        raise TypeError(
            "`flood(inner)` must be an optax.GradientTransformation, got "
            f"{type(inner).__name__}."
        )
    _check_every_k(every_k)
    level_at = schedule(level, "flood(level=...)")
    inner = optax.with_extra_args_support(inner)
    accumulates = callable(every_k) or every_k != 1 or should_skip_update_fn is not None

    def init_fn(params: optax.Params) -> FloodWrapperState:
        window = _open(params, should_skip_update_fn) if accumulates else ()
        return FloodWrapperState(initial_state(), inner.init(params), window)

    def step_inner(
        updates: Any, loss: jax.Array, state: Any, params: Any, extra_args: Any
    ) -> tuple[Any, FloodState, Any]:
        """Floods once and hands the whole flooded objective to the inner optimizer."""
        step = flood_step(state.flood_state, loss, level_at, shape)
        rewritten = dict(extra_args)
        if rewritten.get("grad") is not None:
            rewritten["grad"] = scaled(rewritten["grad"], step.multiplier)
        if rewritten.get("value_fn") is not None:
            rewritten["value_fn"] = flooded(
                rewritten["value_fn"], step.level, axis_name=axis_name, shape=shape
            )
        updates, inner_state = inner.update(
            scaled(updates, step.multiplier),
            state.flood_inner_state,
            params,
            value=step.flooded,
            **rewritten,
        )
        return updates, step.state, inner_state

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        loss = batch_loss(value, "flood(inner).update(value=...)", axis_name)
        if not accumulates:
            updates, flood_state, inner_state = step_inner(
                updates, loss, state, params, extra_args
            )
            return updates, FloodWrapperState(flood_state, inner_state, ())
        return accumulate(updates, loss, state, params, extra_args)

    def accumulate(
        updates: Any, loss: jax.Array, state: Any, params: Any, extra_args: Any
    ) -> tuple[Any, FloodWrapperState]:
        for name in ("value_fn", "grad"):
            if extra_args.get(name) is not None:
                raise ValueError(
                    "`flood(every_k=..., should_skip_update_fn=...)` cannot use "
                    f"`{name}`, which belongs to one micro-batch, got one. "
                    "Line searches need the whole batch: `flood(inner, level)`."
                )
        window: FloodWindow = state.flood_window
        number = state.flood_state.flood_step
        skip, skip_state = _verdict(
            should_skip_update_fn, updates, number, params, loss
        )
        grown = _grow(window, updates, loss, skip_state)
        k = _every_k(every_k, number)
        emit = jnp.logical_not(skip) & (window.flood_mini_step >= k - 1)

        def close(_: None) -> tuple[Any, FloodState, Any, FloodWindow]:
            means = jax.tree.map(_merged, updates, grown.flood_grad_mean)
            mean_loss = grown.flood_value_mean.astype(loss.dtype)
            stepped, flood_state, inner_state = step_inner(
                means, mean_loss, state, params, extra_args
            )
            inner_state = optax.tree.cast_like(inner_state, state.flood_inner_state)
            return stepped, flood_state, inner_state, _emptied(grown)

        stepped_like = jax.eval_shape(close, None)[0]

        def wait(_: None) -> tuple[Any, FloodState, Any, FloodWindow]:
            kept = jax.tree.map(functools.partial(jnp.where, skip), window, grown)
            kept = kept._replace(flood_skip_state=skip_state)
            zeros = jax.tree.map(_zeros, updates, stepped_like)
            return zeros, state.flood_state, state.flood_inner_state, kept

        if isinstance(emit, Tracer):
            cond = cast(Callable[..., tuple[Any, ...]], lax.cond)
            outcome = cond(emit, close, wait, None)
        else:  # eagerly a cond would be compiled anew at every step
            outcome = close(None) if emit else wait(None)
        stepped, flood_state, inner_state, window = outcome
        return stepped, FloodWrapperState(flood_state, inner_state, window)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_every_k(every_k: object) -> None:
    if callable(every_k):
        return
    if isinstance(every_k, bool) or not isinstance(every_k, int | np.integer):
        raise TypeError(
            "`flood(every_k=...)` must be an int or a schedule, got "
            f"{every_k!r}. Under `optax.inject_hyperparams` pass "
            '`static_args="every_k"`.'
        )
    if every_k < 1:
        raise ValueError(f"`flood(every_k=...)` must be positive, got {every_k}.")


def _every_k(every_k: Any, number: jax.Array) -> jax.Array:
    k = jnp.asarray(every_k(number) if callable(every_k) else every_k)
    if k.shape != () or not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(
            "`flood(every_k=schedule)` must return an integer scalar, got shape "
            f"{k.shape} of dtype {k.dtype}."
        )
    return k.astype(jnp.int32)


def _open(params: Any, should_skip: ShouldSkip | None) -> FloodWindow:
    """An empty window."""
    _, skip_state = _verdict(
        should_skip,
        optax.tree.zeros_like(params),
        jnp.zeros([], jnp.int32),
        params,
        jnp.zeros([]),
    )
    return FloodWindow(
        flood_mini_step=jnp.zeros([], jnp.int32),
        flood_grad_mean=jax.tree.map(_accumulator, params),
        flood_value_mean=jnp.zeros([]),
        flood_skip_state=skip_state,
    )


def _accumulator(param: Any) -> Any:
    """Zeros in float32 at least; a leaf that has no gradient has no accumulator."""
    dtype = jnp.result_type(param)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return optax.MaskedNode()
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = compare_dtype(np.dtype(dtype))
    return jnp.zeros_like(param, dtype)


def _verdict(
    should_skip: ShouldSkip | None,
    updates: Any,
    number: jax.Array,
    params: Any,
    loss: jax.Array,
) -> tuple[jax.Array, Any]:
    """Whether to skip this micro-batch, and what the rule wants to keep."""
    if should_skip is None:
        return jnp.zeros([], jnp.bool_), ()
    skip, skip_state = should_skip(updates, number, params)
    if (jnp.result_type(skip), jnp.shape(skip)) != (jnp.bool_, ()):
        raise ValueError(
            "`flood(should_skip_update_fn=...)` must return a boolean scalar first, "
            f"got shape {jnp.shape(skip)} of dtype {jnp.result_type(skip)}."
        )
    if should_skip is optax.skip_not_finite:
        skip = skip | jnp.logical_not(jnp.isfinite(loss))
    return skip, skip_state


def _grow(
    window: FloodWindow, updates: Any, loss: jax.Array, skip_state: Any
) -> FloodWindow:
    """The window with one more micro-batch, by running means."""
    size = window.flood_mini_step + 1

    def mean(new: Any, old: Any) -> Any:
        if isinstance(old, optax.MaskedNode):
            return old
        return old + (jnp.asarray(new, old.dtype) - old) / size.astype(old.dtype)

    return FloodWindow(
        flood_mini_step=size,
        flood_grad_mean=jax.tree.map(mean, updates, window.flood_grad_mean),
        flood_value_mean=_value_mean(loss, window.flood_value_mean, size),
        flood_skip_state=skip_state,
    )


def _value_mean(new: jax.Array, old: jax.Array, size: jax.Array) -> jax.Array:
    """The running mean, which stays infinite after an infinite loss."""
    finite = jnp.where(jnp.isfinite(old), old, jnp.zeros_like(old))
    return old + (new.astype(old.dtype) - finite) / size.astype(old.dtype)


def _emptied(window: FloodWindow) -> FloodWindow:
    """The window to start with next: zeros, whatever was in this one."""
    return FloodWindow(
        flood_mini_step=jnp.zeros_like(window.flood_mini_step),
        flood_grad_mean=optax.tree.zeros_like(window.flood_grad_mean),
        flood_value_mean=jnp.zeros_like(window.flood_value_mean),
        flood_skip_state=window.flood_skip_state,
    )


def _merged(update: Any, mean: Any) -> Any:
    if isinstance(mean, optax.MaskedNode):
        return update
    return mean.astype(jnp.result_type(update))


def _zeros(update: Any, like: Any) -> Any:
    """No update, of the dtype that the inner optimizer would give."""
    if like.dtype == jax.dtypes.float0:
        return update
    return jnp.zeros_like(update, like.dtype)
