"""Accumulation: a window of micro-batches, whose means are those of one large batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.core import Tracer
from jax.typing import ArrayLike

from flood_optax.bend import compare_dtype
from flood_optax.checks import integer

EveryK = int | Callable[[jax.Array], ArrayLike]
ShouldSkip = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


class FloodWindow(NamedTuple):
    """The accumulation window that is open.

    Checkpoints from before there were weights hold the first four fields only: restore
    them into a named tuple of those; ``FloodWindow(*restored)`` goes on as it was.

    Attributes:
      flood_mini_step: int32 scalar, micro-batches in it so far.
      flood_grad_mean: tree like params, the running mean of their gradients, float32
        at least; leaves without gradient are masked.
      flood_value_mean: float scalar, the running mean of their raw losses.
      flood_skip_state: what should_skip_update_fn last returned beside its verdict.
      flood_weight: float scalar, the sum of their weights.
      flood_weight_rest: float scalar, what rounding took from flood_weight.
      flood_value_rest: float scalar, what rounding took from flood_value_mean.
    """

    flood_mini_step: jax.Array
    flood_grad_mean: Any
    flood_value_mean: jax.Array
    flood_skip_state: Any
    flood_weight: Any = None
    flood_weight_rest: Any = None
    flood_value_rest: Any = None


export.register_namedtuple_serialization(  # as for FloodState
    FloodWindow, serialized_name="flood_optax.FloodWindow"
)


class Batch(NamedTuple):
    """What one micro-batch does to its window.

    Attributes:
      emits: whether the window is complete, and holds anything to step by.
      means: gives the mean gradients and the mean loss of the window.
      closed: gives the window after a step.
      kept: gives the window after no step.
    """

    emits: jax.Array | bool
    means: Callable[[], tuple[Any, jax.Array]]
    closed: Callable[[], Any]
    kept: Callable[[], Any]


class Accumulation(NamedTuple):
    """Opens a window for params, and adds a micro-batch to it."""

    init: Callable[[Any], Any]
    add: Callable[..., Batch]


def accumulation(every_k: EveryK, should_skip: ShouldSkip | None) -> Accumulation:
    """Windows of ``every_k`` micro-batches; no window where each is a step."""
    if not callable(every_k):
        _check_every_k(every_k)
        if every_k == 1 and should_skip is None:
            return Accumulation(lambda params: (), _add_to_none)

    def init(params: Any) -> FloodWindow:
        zeros = optax.tree.zeros_like(params), jnp.zeros([], jnp.int32)
        _, skip_state = _verdict(should_skip, *zeros, params, jnp.zeros([]))
        return FloodWindow(
            flood_mini_step=jnp.zeros([], jnp.int32),
            flood_grad_mean=jax.tree.map(_accumulator, params),
            flood_value_mean=jnp.zeros([]),  # each an array of its own, to be donated
            flood_skip_state=skip_state,
            flood_weight=jnp.zeros([]),
            flood_weight_rest=jnp.zeros([]),
            flood_value_rest=jnp.zeros([]),
        )

    def add(
        window: Any,
        updates: Any,
        loss: jax.Array,
        weight: jax.Array | int,
        *,
        flush: ArrayLike,
        number: jax.Array,
        params: Any,
    ) -> Batch:
        window = _complete(window)
        flushing, weighted = _flushes(flush), not isinstance(weight, int)
        skip, skip_state = _verdict(should_skip, updates, number, params, loss)
        if weighted:
            # A micro-batch that counts nothing is not skipped: it takes its place in
            # the window, as the rows of padding that it stands for in a large batch.
            skip &= weight != 0
            skip_state = _pick(weight != 0, skip_state, window.flood_skip_state)
        # Select only where something may not count: a select costs memory.
        adds = should_skip is None and not weighted
        adds = adds or jnp.logical_not(skip) & (weight != 0)
        # The scalars here, the gradients in the branch that needs them: there they are
        # added in place, or on their way into the inner optimizer.
        before = window._replace(flood_grad_mean=(), flood_skip_state=())
        grown, parts = _grown(before, loss, weight)
        grown = _pick(adds, grown, before)

        def grads() -> Any:
            old = window.flood_grad_mean
            return _pick(adds, _grown_grads(old, updates, parts), old)

        full = window.flood_mini_step >= _number(every_k, number) - 1
        full &= jnp.logical_not(skip)
        if flushing:
            full |= flush
        # A window can be empty at its end only in these cases; without them nothing is
        # computed that unweighted accumulation would not.
        empties = flushing or weighted

        def closed() -> FloodWindow:
            zeros = optax.tree.zeros_like(window._replace(flood_skip_state=()))
            return zeros._replace(flood_skip_state=skip_state)

        def kept() -> FloodWindow:
            held = grown._replace(
                flood_mini_step=jnp.where(
                    skip, window.flood_mini_step, window.flood_mini_step + 1
                ),
                flood_grad_mean=grads(),
                flood_skip_state=skip_state,
            )
            return _pick(full, closed(), held) if empties else held

        return Batch(
            emits=full & (grown.flood_weight != 0) if empties else full,
            means=lambda: _means(grads(), updates, grown.flood_value_mean, loss),
            closed=closed,
            kept=kept,
        )

    return Accumulation(init, add)


def _check_every_k(every_k: Any) -> None:
    try:
        integer("flood(every_k=...)", every_k, least=1)
    except TypeError as error:
        raise TypeError(
            f"{error} Under `optax.inject_hyperparams` pass "
            '`static_args="every_k"`; a schedule is legal too.'
        ) from None


def _number(every_k: EveryK, window: jax.Array) -> jax.Array:
    """How many micro-batches this window takes."""
    k = jnp.asarray(every_k(window) if callable(every_k) else every_k)
    if k.shape != () or not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(
            "`flood(every_k=schedule)` must return an integer scalar, got shape "
            f"{k.shape} of dtype {k.dtype}."
        )
    return k.astype(jnp.int32)


def _add_to_none(
    window: Any,
    updates: Any,
    loss: jax.Array,
    weight: jax.Array | int,
    *,
    flush: ArrayLike,
    **others: Any,
) -> Batch:
    """Without accumulation each update is a window of its own."""
    del others
    _flushes(flush)
    if window != ():
        raise ValueError(
            "`flood(inner, level).update(state)` does not accumulate, got a state with "
            "a window, as of `every_k`. Close the window there (`flush=True`), then "
            "`state._replace(flood_window=())`."
        )
    emits = True if isinstance(weight, int) else weight != 0
    return Batch(emits, lambda: (updates, loss), tuple, tuple)


def _flushes(flush: ArrayLike) -> bool:
    """Whether the window may have to be closed early."""
    if (jnp.result_type(flush), jnp.shape(flush)) != (jnp.bool_, ()):
        raise TypeError(
            f"`flood(inner).update(flush=...)` must be a boolean scalar, got {flush}."
        )
    return isinstance(flush, Tracer) or bool(flush)


def _complete(window: Any) -> FloodWindow:
    """The window of a state, which may have been written before there were weights."""
    if not isinstance(window, FloodWindow):
        if window == ():
            found, cure = "no window, as of `every_k=1`", "optimizer.init(params)"
            cure = f"{cure}.flood_window"
        else:
            found, cure = type(window).__name__, "FloodWindow(*state.flood_window)"
        raise ValueError(
            "`flood(every_k=...).update(state)` needs a FloodWindow in the state, got "
            f"{found}: `state._replace(flood_window={cure})`."
        )
    if window.flood_weight is None:
        mean = window.flood_value_mean
        return window._replace(
            flood_weight=window.flood_mini_step.astype(mean.dtype),
            flood_weight_rest=jnp.zeros_like(mean),
            flood_value_rest=jnp.zeros_like(mean),
        )
    return window


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


def _grown(
    window: FloodWindow, loss: jax.Array, weight: jax.Array | int
) -> tuple[FloodWindow, jax.Array]:
    """Its scalars with one more micro-batch, and of how many parts this one is one."""
    value, lost = window.flood_value_mean, window.flood_value_rest
    more = jnp.asarray(weight, value.dtype)
    total, lost_weight = _added(window.flood_weight, window.flood_weight_rest, more)
    parts = total / more
    # An infinite loss stays in the mean, where inf - inf would make a NaN of it.
    finite = jnp.where(jnp.isfinite(value), value, jnp.zeros_like(value))
    step = (loss.astype(value.dtype) - finite - lost) / parts
    value, lost = _added(value, lost, step)
    grown = window._replace(
        flood_value_mean=value,
        flood_weight=total,
        flood_weight_rest=lost_weight,
        flood_value_rest=lost,
    )
    return grown, parts


def _grown_grads(means: Any, updates: Any, parts: jax.Array) -> Any:
    """The mean gradients with those of one more micro-batch."""

    def mean(new: Any, old: Any) -> Any:
        if isinstance(old, optax.MaskedNode):
            return old
        return old + (jnp.asarray(new, old.dtype) - old) / parts.astype(old.dtype)

    return jax.tree.map(mean, updates, means)


def _added(
    total: jax.Array, lost: jax.Array, more: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rounded sum, and what rounding took: a thousand small parts are not lost."""
    more = more + lost
    rounded = total + more
    # Where the sum is infinite, inf - inf would leave a NaN for what rounding took.
    finite = jnp.isfinite(rounded)
    r, t, m = (jnp.where(finite, x, jnp.zeros_like(x)) for x in (rounded, total, more))
    back = r - t
    return rounded, (t - (r - back)) + (m - back)


def _means(
    grads: Any, updates: Any, value: jax.Array, loss: jax.Array
) -> tuple[Any, jax.Array]:
    """The means, of the dtypes of the updates and of the loss."""

    def merged(update: Any, mean: Any) -> Any:
        if isinstance(mean, optax.MaskedNode):
            return update
        return mean.astype(jnp.result_type(update))

    return jax.tree.map(merged, updates, grads), value.astype(loss.dtype)


def _pick(condition: jax.Array | bool, yes: Any, no: Any) -> Any:
    if condition is True:
        return yes
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)
