"""Accumulation: a window of micro-batches, whose means are those of one large batch."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export
from jax.typing import ArrayLike, DTypeLike

from flood_optax.checks import as_integer, check_that, is_float, must
from flood_optax.dispatch import one_dispatch
from flood_optax.transform import BatchLoss

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


class Alone(NamedTuple):
    """A batch that is a window of its own, which a state does not hold."""

    emits: jax.Array | bool
    grads: Any
    loss: jax.Array

    def means(self) -> tuple[Any, jax.Array]:
        """The means of it alone."""
        return self.grads, self.loss

    def closed(self) -> tuple[()]:
        """No window."""
        return ()

    kept = closed


class Added(NamedTuple):
    """A micro-batch that was added to its window, all of it but its gradients.

    They are added in the branch that needs them: in place, or on their way into the
    inner optimizer.

    Attributes:
      emits: whether the window is complete, and holds anything to step by.
      before: the window without it.
      after: the window with it, if no step is taken, and without gradients.
      counts: whether it does; what is skipped or of weight 0 does not. None is yes.
      share: its part in the means.
      grads: its gradients.
      loss: its loss.
    """

    emits: jax.Array
    before: FloodWindow
    after: FloodWindow
    counts: Any
    share: jax.Array
    grads: Any
    loss: jax.Array

    def means(self) -> tuple[Any, jax.Array]:
        """The means of the window, of the dtypes of the gradients and of the loss."""
        old = self.before.flood_grad_mean
        means = _mean_gradients(self.grads, old, self.share, self.counts, emits=True)
        return means, self.after.flood_value_mean.astype(self.loss.dtype)

    def closed(self) -> FloodWindow:
        """The window after a step."""
        zeros = _zeros_like(self.before._replace(flood_skip_state=()))
        return zeros._replace(flood_skip_state=self.after.flood_skip_state)

    def kept(self) -> FloodWindow:
        """The window after no step."""
        old = self.before.flood_grad_mean
        means = _mean_gradients(self.grads, old, self.share, self.counts, emits=False)
        return self.after._replace(flood_grad_mean=means)


class Windows(NamedTuple):
    """Windows of so many micro-batches.

    Attributes:
      every_k: how many, or a schedule of it.
      should_skip: the rule of what is skipped, if there is one.
      dtype: of the mean gradients; None is float32 at least.
      of_one: whether each update is a step.
    """

    every_k: EveryK
    should_skip: ShouldSkip | None
    dtype: DTypeLike | None
    of_one: bool

    def opened(self, params: Any) -> FloodWindow | tuple[()]:
        """The first window, for params."""
        if self.of_one:
            return ()
        skip_state = ()
        if self.should_skip is not None:
            zeros = optax.tree.zeros_like(params), jnp.zeros([], jnp.int32)
            _, skip_state = _verdict(self.should_skip, *zeros, params, jnp.zeros([]))
        return FloodWindow(
            flood_mini_step=jnp.zeros([], jnp.int32),
            flood_grad_mean=jax.tree.map(self._accumulator, params),
            flood_value_mean=jnp.zeros([]),  # each an array of its own, to be donated
            flood_skip_state=skip_state,
            flood_weight=jnp.zeros([]),
            flood_weight_rest=jnp.zeros([]),
            flood_value_rest=jnp.zeros([]),
        )

    def add(
        self,
        window: Any,
        grads: Any,
        batch: BatchLoss,
        *,
        flush: ArrayLike,
        number: jax.Array,
        params: Any,
    ) -> Added | Alone:
        """Adds a micro-batch to the window of this number."""
        if flush is not False:
            _check_flush(flush)
        if self.of_one:
            _check_no_window(window)
            return Alone(batch.counts is None or batch.counts, grads, batch.loss)
        window = _as_window(window)
        # None where it is known before tracing that all weigh 1 and nothing is skipped,
        # so that no select is made for it: one costs memory.
        counts, skip, skip_state = batch.counts, None, ()
        if self.should_skip is not None:
            given = grads, number, params, batch.loss
            skip, skip_state = _verdict(self.should_skip, *given)
            if counts is not None:
                # A micro-batch of weight 0 is not skipped: it takes its place in the
                # window, as the rows of padding that it stands for in a large batch.
                skip &= counts
                skip_state = _pick(counts, skip_state, window.flood_skip_state)
            counts = ~skip if counts is None else counts & ~skip
        k = self.every_k
        after, emits, share = _add_scalars(
            window._replace(flood_grad_mean=(), flood_skip_state=()),
            batch,
            counts,
            skip=skip,
            size=_as_size(k, number) if callable(k) else k,
            flush=flush,
        )
        after = after._replace(flood_skip_state=skip_state)
        return Added(emits, window, after, counts, share, grads, batch.loss)

    def _accumulator(self, param: Any) -> Any:
        """Zeros, in float32 at least unless told; none of a leaf without gradient."""
        dtype = jax.typeof(param).dtype  # of keys, too
        if not jnp.issubdtype(dtype, jnp.inexact):
            return optax.MaskedNode()
        if self.dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
            return jnp.zeros_like(param, np.promote_types(dtype, np.float32))
        return jnp.zeros_like(param, self.dtype)


def accumulation(
    every_k: EveryK,
    should_skip: ShouldSkip | None,
    accumulator_dtype: DTypeLike | None,
) -> Windows:
    """Windows of ``every_k`` micro-batches."""
    if accumulator_dtype is not None:
        _check_dtype(accumulator_dtype)
    if not callable(every_k):
        remedy = (
            " Under `optax.inject_hyperparams` pass "
            '`static_args="every_k"`; a schedule is legal too.'
        )
        every_k = as_integer("flood(every_k=...)", every_k, least=1, remedy=remedy)
    of_one = every_k == 1 and should_skip is None
    return Windows(every_k, should_skip, accumulator_dtype, of_one)


def _verdict(
    rule: ShouldSkip, grads: Any, number: jax.Array, params: Any, loss: jax.Array
) -> tuple[jax.Array, Any]:
    """Whether to skip this micro-batch, and what the rule wants to keep."""
    skip, skip_state = rule(grads, number, params)
    dtype, shape = jnp.result_type(skip), jnp.shape(skip)
    call, got = "flood(should_skip_update_fn=...)", f"shape {shape} of dtype {dtype}"
    is_bool = (dtype, shape) == (jnp.bool_, ())
    check_that(is_bool, call, "return a boolean scalar first", got)
    if rule is optax.skip_not_finite:
        skip = skip | ~jnp.isfinite(loss)
    return jnp.asarray(skip), skip_state


def _as_size(
    schedule: Callable[[jax.Array], ArrayLike], number: jax.Array
) -> jax.Array:
    """How many micro-batches the window of this number takes."""
    k = jnp.asarray(schedule(number))
    fits = k.shape == () and jnp.issubdtype(k.dtype, jnp.integer)
    call, got = "flood(every_k=schedule)", f"shape {k.shape} of dtype {k.dtype}"
    check_that(fits, call, "return an integer scalar", got, error=TypeError)
    return k.astype(jnp.int32)


def _check_flush(flush: Any) -> None:
    dtype, shape = getattr(flush, "dtype", np.dtype(type(flush))), np.shape(flush)
    if (dtype, shape) != (jnp.bool_, ()):
        call = "flood(inner).update(flush=...)"
        raise TypeError(must(call, "be a boolean scalar", repr(flush)))


def _check_no_window(window: Any) -> None:
    if window != ():
        raise ValueError(
            "`flood(inner, level).update(state)` does not accumulate, got a state with "
            "a window, as of `every_k`. Close the window there (`flush=True`), then "
            "`state._replace(flood_window=())`."
        )


def _check_dtype(given: DTypeLike) -> None:
    fits = False
    with contextlib.suppress(TypeError):  # of what is no dtype at all
        fits = is_float(jnp.dtype(given))
    if not fits:
        rule = "be a real float dtype of 16 bits at least, or None for float32 at least"
        raise TypeError(must("flood(accumulator_dtype=...)", rule, repr(given)))


def _as_window(window: Any) -> FloodWindow:
    """The window of a state, which may have been written before there were weights."""
    if not isinstance(window, FloodWindow):
        found, cure = type(window).__name__, "FloodWindow(*state.flood_window)"
        if window == ():
            found = "no window, as of `every_k=1`"
            cure = "optimizer.init(params).flood_window"
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


@one_dispatch
def _add_scalars(
    window: FloodWindow,
    batch: BatchLoss,
    counts: Any,
    *,
    skip: Any,
    size: jax.Array | int,
    flush: ArrayLike,
) -> tuple[FloodWindow, jax.Array, jax.Array]:
    """Its scalars with one more micro-batch; whether to step; the share of that."""
    mean, rest = window.flood_value_mean, window.flood_value_rest
    weight = jnp.asarray(batch.weight, mean.dtype)
    total, weight_rest = _two_sum(window.flood_weight, window.flood_weight_rest, weight)
    # What weighs 0 is not taken: it only must not divide 0 by 0 here.
    parts = jnp.where(weight == 0, 1, total / jnp.where(weight == 0, 1, weight))
    # An infinite loss stays in the mean, where inf - inf would make a NaN of it.
    finite = jnp.where(jnp.isfinite(mean), mean, jnp.zeros_like(mean))
    step = (batch.loss.astype(mean.dtype) - finite - rest) / parts
    mean, rest = _two_sum(mean, rest, step)
    more = window._replace(
        flood_value_mean=mean,
        flood_weight=total,
        flood_weight_rest=weight_rest,
        flood_value_rest=rest,
    )
    after = more if counts is None else _pick(counts, more, window)
    number = window.flood_mini_step
    full, taken = number >= size - 1, number + 1
    if skip is not None:
        full, taken = full & ~skip, jnp.where(skip, number, taken)
    full = full if flush is False else full | flush
    # A full window that does not emit holds nothing: all is zero but its number.
    after = after._replace(
        flood_mini_step=jnp.where(full, jnp.zeros_like(taken), taken)
    )
    # XLA divides by a scalar so, too, but would read the mean gradients twice
    return after, full & (after.flood_weight != 0), 1 / parts


@functools.partial(one_dispatch, static="emits")
def _mean_gradients(
    grads: Any, means: Any, share: jax.Array, counts: Any, *, emits: bool
) -> Any:
    """The mean gradients with those of one more micro-batch, if it counts.

    They are of the dtypes of the gradients if the window emits them.
    """

    def mean(grad: Any, old: Any) -> Any:
        if isinstance(old, optax.MaskedNode):
            return grad if emits else old
        # a narrow mean is taken in float32 and rounded once
        wide = old.astype(np.promote_types(old.dtype, np.float32))
        step = (jnp.asarray(grad, wide.dtype) - wide) * share.astype(wide.dtype)
        new = (wide + step).astype(old.dtype)
        if counts is not None:
            new = jnp.where(counts, new, old)
        return new.astype(jax.typeof(grad).dtype) if emits else new

    return jax.tree.map(mean, grads, means)


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


_zeros_like = one_dispatch(optax.tree.zeros_like)


def _pick(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)
