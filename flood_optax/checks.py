"""What a loss and a level may be: the rules every entry point enforces.

What is named `check_...` returns nothing, `as_...` what it has checked. Numbers that a
tracer will have are not known yet: those pass.
"""

import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

DROPS_VALUE = (
    "`optax.chain(optax.MultiSteps(...))`, `optax.lookahead` and flax's own "
    "`TrainState.apply_gradients` drop extra arguments; where the loss cannot be "
    "passed, flood the loss instead: `flood_optax.flooded(loss_fn, level)`."
)
FLOODED = "__flooded__"  # what `flooded` returns has this attribute, True
NUMBERS = numbers.Real | np.generic | np.ndarray | jax.Array
NEVER_EVALUATED = "the model of their fold has diverged, or was never evaluated"
OFF = " To switch flooding off, use -inf: the loss is never below it."


class FloodWarning(UserWarning):
    """Warns of what is legal, and hardly ever what is meant.

    All warnings of the library are of this category: a band whose lower end the loss
    cannot reach, floors that are all 0, a best window that is the first.

    Examples:
      >>> import warnings
      >>> from flood_optax import FloodWarning
      >>> warnings.simplefilter("error", FloodWarning)  # an error instead
    """


# What `check_number` may demand, in the words of its errors.
RULES: dict[str, Callable[[float], bool]] = {
    "finite": math.isfinite,
    "positive and finite": lambda x: 0 < x < math.inf,
    "non-negative and finite": lambda x: 0 <= x < math.inf,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}


def must(call: str, rule: str, got: object, remedy: str = "") -> str:
    """What every error says: where, the rule, what was given, and what to do."""
    return f"`{call}` must {rule}, got {got}.{remedy}"


def check_that(
    holds: object,
    call: str,
    rule: str,
    got: object,
    remedy: str = "",
    *,
    error: type[Exception] = ValueError,
) -> None:
    """Demands that a rule holds."""
    if not holds:
        raise error(must(call, rule, got, remedy))


def converted(
    convert: Callable[[Any], Any], call: str, rule: str, given: Any, remedy: str = ""
) -> Any:
    """What JAX makes of it, which has no dtype for strings, objects and dates."""
    try:
        return convert(given)
    except TypeError as error:
        got = getattr(given, "dtype", type(given).__name__)
        raise TypeError(must(call, rule, got, remedy)) from error


def is_real(dtype: Any) -> bool:
    """Whether it is one of floats or integers."""
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def is_float(dtype: Any) -> bool:
    """Whether it is one of real floats of 16 bits at least."""
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def largest() -> float:
    """The largest finite number of the widest floats that are enabled."""
    return float(np.finfo(jnp.result_type(float)).max)


def check_real(call: str, given: Any, kind: str, real: str) -> None:
    """Demands real numbers, which have a type and a dtype."""
    if isinstance(given, bool) or not isinstance(given, NUMBERS):
        got = f"{given!r} of type {type(given).__name__}"
        raise TypeError(must(call, kind, got))
    dtype = converted(jnp.result_type, call, real, given)
    check_that(is_real(dtype), call, real, f"dtype {dtype}", error=TypeError)


def check_number(call: str, given: Any, rule: str) -> None:
    """Demands one real number of which a rule holds."""
    check_real(call, given, "be a real number", "be a real number")
    check_scalar(call, given)
    if isinstance(given, Tracer):
        return
    known = float(given)
    if abs(known) > largest():
        known *= math.inf  # as JAX will round it
    check_that(RULES[rule](known), call, f"be {rule}", given)


def as_integer(call: str, given: Any, *, least: int, remedy: str = "") -> int:
    """Demands a static int that is not below ``least``."""
    try:
        if isinstance(given, bool):  # operator.index takes True for 1
            raise TypeError
        found = operator.index(given)
    except TypeError:
        raise TypeError(must(call, "be a static int", repr(given), remedy)) from None
    check_that(found >= least, call, f"be at least {least}", found)
    return found


def as_integers(call: str, given: Any, *, below: int | None = None) -> jax.Array:
    """Demands an array of integers, in [0, below)."""
    remedy = " `numpy.unique(names, return_inverse=True)[1]` numbers names."
    array = converted(jnp.asarray, call, "be integers", given, remedy)
    are = jnp.issubdtype(array.dtype, jnp.integer)
    check_that(are, call, "be integers", array.dtype, error=TypeError)
    known = None if below is None else known_numbers(given)
    if known is not None and known.size:
        least, most = known.min(), known.max()
        fits = 0 <= least <= most < below
        check_that(fits, call, f"lie in [0, {below})", f"{least:.0f} to {most:.0f}")
    return array


def check_one_per_loss(call: str, given: jax.Array, shape: tuple[int, ...]) -> None:
    """Demands the shape of the losses."""
    rule = f"have the shape {shape} of the losses"
    check_that(given.shape == shape, call, rule, given.shape)


def check_scalar(call: str, given: Any, remedy: str = "") -> None:
    """Demands the shape ()."""
    shape = np.shape(given)
    check_that(shape == (), call, f"be a scalar{remedy}", f"shape {shape}")


def check_function(call: str, given: Any, remedy: str = "") -> None:
    """Demands something to call."""
    got = type(given).__name__ + remedy
    check_that(callable(given), call, "be callable", got, error=TypeError)


def check_raw(call: str, loss_fn: Any) -> None:
    """Demands a function, and none that `flooded` made: two floods cancel."""
    check_function(call, loss_fn, ": flood a number with `flood_loss` or `flood_mean`")
    seen: Any = loss_fn
    while seen is not None:
        if getattr(seen, FLOODED, False) is True:
            name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
            raise ValueError(
                f"`{call}` is flooded already, got {name}: two floods "
                "cancel each other. Give the original function, `.__wrapped__` of what "
                "`flooded` returned; to change the level, wrap the original function."
            )
        is_partial = isinstance(seen, functools.partial)
        seen = seen.func if is_partial else getattr(seen, "__wrapped__", None)


def check_key(call: str, key: Any) -> None:
    """Demands one random key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if np.shape(key) != () if typed else (dtype != np.uint32 or np.ndim(key) != 1):
        got = f"{key!r}" if dtype is None else f"{dtype} of shape {np.shape(key)}"
        raise TypeError(must(call, "be a key, `jax.random.key(0)`", got))


def check_one_of(call: str, given: Any, words: tuple[str, ...]) -> None:
    """Demands one of these words."""
    *others, last = (f'"{word}"' for word in words)
    known = isinstance(given, str) and given in words
    check_that(known, call, f"be {', '.join(others)} or {last}", repr(given))


def as_loss_and_aux(call: str, result: Any, *, has_aux: bool) -> tuple[Any, Any]:
    """Splits what loss_fn returned into the loss and aux, None without ``has_aux``."""
    length = len(result) if isinstance(result, tuple) else None
    if length is None and not has_aux:
        return result, None
    if length == 2 and has_aux:
        return result
    got = type(result).__name__ if length is None else f"a tuple of {length}"
    if has_aux:
        raise TypeError(
            f"`{call}(loss_fn, has_aux=True)` needs loss_fn to return (loss, aux), "
            f"got {got}."
        )
    raise TypeError(
        f"`{call}(loss_fn)` returned {got}: pass `has_aux=True` if it is (loss, aux)."
    )


def check_level(level: Any, call: str) -> None:
    """Demands real numbers: -inf means off, negative ones are levels of densities."""
    rule = "be a number or an array of numbers"
    if level is None:
        raise TypeError(must(call, rule, None, OFF))
    if callable(level):
        got = "a schedule: call it with the step and pass the result"
        raise TypeError(must(call, "be a number or an array", got))
    check_real(call, level, rule, "be real")
    known = known_numbers(level)
    if known is not None:
        check_that(not np.isnan(known).any(), call, "not be NaN", level)
        check_that(not (known > largest()).any(), call, "not be +inf", level, OFF)


def known_numbers(given: Any) -> np.ndarray | None:
    """The numbers in float64; None of a tracer, or where other processes hold some."""
    if isinstance(given, Tracer):
        return None
    if isinstance(given, jax.Array) and not given.is_fully_addressable:
        return None
    return np.asarray(given, np.float64)


def check_axis(call: str, axis_name: Any) -> None:
    """Demands an axis, or axes, over which this is mapped."""
    if axis_name is None:
        return
    try:
        lax.axis_size(axis_name)
    except (NameError, ValueError):  # a number is no name, but a position to JAX
        raise ValueError(
            f"`{call}` with axis_name={axis_name!r} must be called inside "
            "`jax.shard_map` or `jax.pmap` over that axis, got none that is mapped "
            "here. Under `jax.jit` with sharded data leave axis_name out."
        ) from None


def check_scalar_level(level: Any, call: str) -> None:
    """As `check_level`, and refuses anything that is not one number."""
    check_level(level, call)
    check_scalar(call, level, " where one loss is flooded")


def as_real_array(loss: Any, call: str) -> jax.Array:
    """The loss as an array; only real floats of 16 bits or more can be flooded."""
    if isinstance(loss, tuple):
        remedy = "pass the loss without aux, or use has_aux=True where there is one"
        got = f"a tuple of {len(loss)}: {remedy}"
        raise TypeError(must(call, "be the loss alone", got))
    if loss is None or isinstance(loss, str | list | dict) or callable(loss):
        rule = "be an array of real floats"
        raise TypeError(must(call, rule, type(loss).__name__, _how_to_get_one(loss)))
    array, rule = loss, "be of a real float dtype"
    if not isinstance(loss, jax.Array):
        array = converted(jnp.asarray, call, rule, loss)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(must(call, rule, array.dtype))
    if array.dtype.itemsize < 2:  # the largest of 8 bits also stands for inf
        remedy = "compute it in a wider dtype, or cast it, `.astype(jnp.float32)`"
        got = f"{array.dtype}: {remedy}"
        raise TypeError(must(call, "have 16 bits at least", got))
    return array


def _how_to_get_one(loss: Any) -> str:
    """What to do with a function where its result is wanted, and with many losses."""
    if callable(loss):
        name = getattr(loss, "__name__", "the function")
        return f" Call it, and pass the result of `{name}(...)`."
    one = " One optimizer floods one loss: docs/traps.md, Two losses."
    return one if isinstance(loss, dict) else ""


def as_scalar_loss(loss: Any, call: str, remedy: str) -> jax.Array:
    """The loss as an array of shape (): a vector of losses is never broadcast."""
    array = as_real_array(loss, call)
    if array.shape != ():
        got = f"shape {array.shape}"
        raise ValueError(must(call, "be a scalar", got, f" {remedy}"))
    return array


def broadcast_level(
    level: ArrayLike, shape: tuple[int, ...], call: str, *, of: str = "losses"
) -> jax.Array:
    """The level broadcast to the losses, never the losses to the level."""
    array = converted(jnp.asarray, call, "be real", level)
    # dimensions may be symbolic, which np.broadcast_shapes does not know
    sizes = zip(array.shape[::-1], shape[::-1], strict=False)
    fits = array.ndim <= len(shape) and all(n in (1, m) for n, m in sizes)
    if not fits:
        hint = ""
        if array.shape == shape[: array.ndim]:
            axes = ", ".join([":"] * array.ndim + ["None"] * (len(shape) - array.ndim))
            hint = f" A level per entry of the leading axes is `level[{axes}]`."
        rule = f"broadcast to the shape {shape} of the {of}"
        raise ValueError(must(call, rule, f"shape {array.shape}", hint))
    return jnp.broadcast_to(array, shape)


def as_mask(
    call: str, where: ArrayLike | None, shape: tuple[int, ...], *, split: bool
) -> jax.Array | None:
    """The mask of the losses; a batch split over devices may be empty on one."""
    got = f"shape {shape}: the mean of no losses is not defined"
    check_that(0 not in shape, f"{call}(losses)", "not be empty", got)
    if where is None:
        return None
    call = f"{call}(where=...)"
    mask = converted(jnp.asarray, call, "be boolean", where)
    is_mask = mask.dtype == jnp.bool_
    check_that(is_mask, call, "be boolean", mask.dtype, error=TypeError)
    check_one_per_loss(call, mask, shape)
    some = split or not isinstance(where, np.ndarray) or where.any()
    got = "a mask that is False everywhere"
    check_that(some, call, "leave at least one loss", got)
    return mask


def as_weights(
    weights: ArrayLike | None, shape: tuple[int, ...], *, split: bool
) -> jax.Array | None:
    """The weights of `flood_mean`; a part of a split batch may weigh nothing."""
    if weights is None:
        return None
    call = "flood_mean(weights=...)"
    array = converted(jnp.asarray, call, "be real numbers", weights)
    got = f"{array.dtype}{': a mask is `where`' * (array.dtype == jnp.bool_)}"
    check_that(is_real(array.dtype), call, "be real numbers", got, error=TypeError)
    check_one_per_loss(call, array, shape)
    known = known_numbers(weights)
    if known is not None:
        fits = (np.isfinite(known) & (known >= 0)).all()
        ends = f"{known.min()} to {known.max()}"
        check_that(fits, call, "be non-negative and finite", ends)
    some = split or not isinstance(weights, np.ndarray) or weights.any()
    check_that(some, call, "leave at least one loss", "zeros alone")
    return array


def as_segments(
    segment_ids: ArrayLike | None, num_segments: object, shape: tuple[int, ...]
) -> tuple[jax.Array, int]:
    """The segment ids and number of `flood_mean`."""
    what = "`segment_ids`" if segment_ids is None else "`num_segments`, a static int"
    if segment_ids is None or num_segments is None:
        raise ValueError(f'`flood_mean(over="segment")` needs {what}, got None.')
    count = as_integer("flood_mean(num_segments=...)", num_segments, least=1)
    ids = as_integers("flood_mean(segment_ids=...)", segment_ids, below=count)
    check_one_per_loss("flood_mean(segment_ids=...)", ids, shape)
    return ids, count
