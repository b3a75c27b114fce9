"""Accumulation: a window of micro-batches, whose means are those of one large batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.typing import ArrayLike, DTypeLike

from flood_optax.checks import as_integer
from flood_optax.dispatch import one_dispatch
from flood_optax.precision import compare_dtype, dtype_of

EveryK = int | Callable[[jax.Array], ArrayLike]
ShouldSkip = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


class FloodWindow(NamedTuple):
    """The accumulation window that is open.

    Checkpoints from before there were weights hold the first four fields only: restore
    them into a named tuple of those; ``FloodWindow(*restored)`` goes on as it was.

    Attributes:
      flood_mini_step: int32 scalar, micro-batches in it so far.
      flood_grad_mean: tree like params, the running mean of their gradients, float32
        at least or of ``accumulator_dtype``; leaves without gradient are masked.
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
      emits: whether the window is complete, and holds anything to step by; True where
        each update is a step.
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


def accumulation(
    every_k: EveryK,
    should_skip: ShouldSkip | None,
    accumulator_dtype: DTypeLike | None,
) -> Accumulation:
    """Windows of ``every_k`` micro-batches; no window where each is a step."""
    dtype = _accumulator_dtype(accumulator_dtype)
    if not callable(every_k):
        remedy = (
            " Under `optax.inject_hyperparams` pass "
            '`static_args="every_k"`; a schedule is legal too.'
        )
        as_integer("flood(every_k=...)", every_k, least=1, remedy=remedy)
        if every_k == 1 and should_skip is None:
            return Accumulation(lambda params: (), _add_to_none)

    def init(params: Any) -> FloodWindow:
        zeros = optax.tree.zeros_like(params), jnp.zeros([], jnp.int32)
        _, skip_state = _verdict(should_skip, *zeros, params, jnp.zeros([]))
        return FloodWindow(
            flood_mini_step=jnp.zeros([], jnp.int32),
            flood_grad_mean=jax.tree.map(lambda p: _accumulator(p, dtype), params),
            flood_value_mean=jnp.zeros([]),  # each an array of its own, to be donated
            flood_skip_state=skip_state,
            flood_weight=jnp.zeros([]),
            flood_weight_rest=jnp.zeros([]),
            flood_value_rest=jnp.zeros([]),
        )

    # What is known before tracing (that nothing is skipped, that all weigh 1) stays a
    # NumPy bool here, so that no select is made for it: one costs memory.
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
        _check_flush(flush)
        window = _complete(window)
        skip, skip_state = _verdict(should_skip, updates, number, params, loss)
        # A micro-batch of weight 0 is not skipped: it takes its place in the window, as
        # the rows of padding that it stands for in a large batch.
        weighs = np.True_ if isinstance(weight, int) else weight != 0
        skip &= weighs
        skip_state = _pick(weighs, skip_state, window.flood_skip_state)
        counts = ~skip & weighs
        before = window._replace(flood_grad_mean=(), flood_skip_state=())
        scalars, share = _add_loss(before, loss, weight)
        scalars = _pick(counts, scalars, before)
        full = (window.flood_mini_step >= _size(every_k, number) - 1) & ~skip
        full = full if flush is False else full | flush

        # These are called in the branch that needs them, so that the gradients are
        # added in place, or on their way into the inner optimizer.
        def gradients() -> Any:
            old = window.flood_grad_mean
            return _pick(counts, _add_gradients(old, updates, share), old)

        def closed() -> FloodWindow:
            zeros = _zeros(window._replace(flood_skip_state=()))
            return zeros._replace(flood_skip_state=skip_state)

        def kept() -> FloodWindow:
            # A full window that does not emit holds nothing: all is zero but its step.
            step = window.flood_mini_step
            step = jnp.where(skip, step, step + 1)
            return scalars._replace(
                flood_mini_step=jnp.where(full, jnp.zeros_like(step), step),
                flood_grad_mean=gradients(),
                flood_skip_state=skip_state,
            )

        return Batch(
            emits=full & (scalars.flood_weight != 0),
            means=lambda: _means(gradients(), updates, scalars.flood_value_mean, loss),
            closed=closed,
            kept=kept,
        )

    return Accumulation(init, add)


def _size(every_k: EveryK, number: jax.Array) -> jax.Array | int:
    """How many micro-batches the window of this number takes."""
    if not callable(every_k):
        return every_k
    k = jnp.asarray(every_k(number))
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
    _check_flush(flush)
    if window != ():
        raise ValueError(
            "`flood(inner, level).update(state)` does not accumulate, got a state with "
            "a window, as of `every_k`. Close the window there (`flush=True`), then "
            "`state._replace(flood_window=())`."
        )
    emits = True if isinstance(weight, int) else weight != 0
    return Batch(emits, lambda: (updates, loss), tuple, tuple)


def _check_flush(flush: Any) -> None:
    dtype, shape = getattr(flush, "dtype", np.dtype(type(flush))), np.shape(flush)
    if (dtype, shape) != (jnp.bool_, ()):
        raise TypeError(
            f"`flood(inner).update(flush=...)` must be a boolean scalar, got {flush!r}."
        )


def _accumulator_dtype(given: DTypeLike | None) -> np.dtype | None:
    """The dtype of the mean gradients; None where it is float32 at least."""
    if given is None:
        return None
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(
            "`flood(accumulator_dtype=...)` must be a real float dtype of 16 bits at "
            f"least, or None for float32 at least, got {given!r}."
        )
    return dtype


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


def _accumulator(param: Any, chosen: np.dtype | None) -> Any:
    """Zeros in float32 at least; a leaf that has no gradient has no accumulator."""
    dtype = dtype_of(param)  # of keys, too
    if not jnp.issubdtype(dtype, jnp.inexact):
        return optax.MaskedNode()
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = compare_dtype(np.dtype(dtype)) if chosen is None else chosen
    return jnp.zeros_like(param, dtype)


def _verdict(
    should_skip: ShouldSkip | None,
    updates: Any,
    number: jax.Array,
    params: Any,
    loss: jax.Array,
) -> tuple[Any, Any]:
    """Whether to skip this micro-batch, and what the rule wants to keep."""
    if should_skip is None:
        return np.False_, ()
    skip, skip_state = should_skip(updates, number, params)
    if (jnp.result_type(skip), jnp.shape(skip)) != (jnp.bool_, ()):
        raise ValueError(
            "`flood(should_skip_update_fn=...)` must return a boolean scalar first, "
            f"got shape {jnp.shape(skip)} of dtype {jnp.result_type(skip)}."
        )
    if should_skip is optax.skip_not_finite:
        skip = skip | ~jnp.isfinite(loss)
    return jnp.asarray(skip), skip_state


@one_dispatch
def _add_loss(
    window: FloodWindow, loss: jax.Array, weight: jax.Array | int
) -> tuple[FloodWindow, jax.Array]:
    """Its scalars with one more micro-batch, and the share of that in the window."""
    mean, rest = window.flood_value_mean, window.flood_value_rest
    weight = jnp.asarray(weight, mean.dtype)
    total, weight_rest = _two_sum(window.flood_weight, window.flood_weight_rest, weight)
    # What weighs 0 is not taken: it only must not divide 0 by 0 here.
    parts = jnp.where(weight == 0, 1, total / jnp.where(weight == 0, 1, weight))
    # An infinite loss stays in the mean, where inf - inf would make a NaN of it.
    finite = jnp.where(jnp.isfinite(mean), mean, jnp.zeros_like(mean))
    step = (loss.astype(mean.dtype) - finite - rest) / parts
    mean, rest = _two_sum(mean, rest, step)
    more = window._replace(
        flood_value_mean=mean,
        flood_weight=total,
        flood_weight_rest=weight_rest,
        flood_value_rest=rest,
    )
    # XLA divides by a scalar so, too, but would read the mean gradients twice
    return more, 1 / parts


@one_dispatch
def _add_gradients(means: Any, updates: Any, share: jax.Array) -> Any:
    """The mean gradients with those of one more micro-batch."""

    def mean(new: Any, old: Any) -> Any:
        if isinstance(old, optax.MaskedNode):
            return old
        dtype = old.dtype  # a narrow mean is taken in float32 and rounded once
        if not jnp.issubdtype(dtype, jnp.complexfloating):
            dtype = compare_dtype(dtype)
        wide = old.astype(dtype)
        step = (jnp.asarray(new, dtype) - wide) * share.astype(dtype)
        return (wide + step).astype(old.dtype)

    return jax.tree.map(mean, updates, means)


def _two_sum(
    total: jax.Array, rest: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The rounded sum, and what rounding took: a thousand small parts are not lost."""
    x = x + rest
    rounded = total + x
    # Where the sum is infinite, inf - inf would leave a NaN for what rounding took.
    finite = jnp.isfinite(rounded)
    r, t, x = (jnp.where(finite, y, jnp.zeros_like(y)) for y in (rounded, total, x))
    back = r - t
    return rounded, (t - (r - back)) + (x - back)


def _means(
    grads: Any, updates: Any, value: jax.Array, loss: jax.Array
) -> tuple[Any, jax.Array]:
    """The means, of the dtypes of the updates and of the loss."""

    def merged(update: Any, mean: Any) -> Any:
        if isinstance(mean, optax.MaskedNode):
            return update
        return mean.astype(dtype_of(update))

    return jax.tree.map(merged, updates, grads), value.astype(loss.dtype)


_zeros = one_dispatch(optax.tree.zeros_like)


@one_dispatch
def _select(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def _pick(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, np.bool_):
        return yes if condition else no
    return _select(condition, yes, no)
