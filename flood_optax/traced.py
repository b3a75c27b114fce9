"""What a sweep is given: levels, keys, and a function that is traced once."""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from flood_optax.checks import check_level

Array = npt.NDArray[Any]


class Traced(NamedTuple):
    """A function as its jaxpr, to be called under any transformation.

    Attributes:
      jaxpr: what the function computes, with the arrays it closes over.
      shape: the tree of its result, with shapes and dtypes.
    """

    jaxpr: ClosedJaxpr
    shape: Any

    def call(self, *args: Any) -> Any:
        """Calls the function without tracing it again."""
        flat = cast(list[Any], jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(args)))
        return jax.tree.unflatten(cast(Any, jax.tree.structure(self.shape)), flat)

    def fingerprint(self) -> str:
        """A digest of the computation and of the arrays it closes over."""
        digest = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", str(self.jaxpr)).encode())
        for const in self.jaxpr.consts:
            typed_key = jnp.issubdtype(const.dtype, jax.dtypes.prng_key)
            numbers = jax.random.key_data(const) if typed_key else const
            digest.update(np.ascontiguousarray(numbers).tobytes())
        return digest.hexdigest()


def trace(function: Callable[..., Any], call: str, *args: Any) -> Traced:
    """Traces a function; a branch in Python on a traced number gets a note."""
    try:
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        error.add_note(
            f"`{call}` is traced once for all levels, so it must not need their "
            "numbers in Python: use `jnp.where` or `jax.lax.cond` instead of `if`."
        )
        raise
    return Traced(jaxpr, shape)


def checked_metrics(metrics: Any, call: str) -> dict[str, jax.Array]:
    """The metrics as arrays; they must be a flat dict of real numbers."""
    kind = type(metrics).__name__
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"`{call}` must return its metrics as a dict of arrays, got {kind}."
        )
    metrics = cast(Mapping[Any, Any], metrics)
    if not metrics:
        raise TypeError(f"`{call}` must return one metric at least, got an empty dict.")
    checked: dict[str, jax.Array] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise TypeError(f"`{call}` must name its metrics by strings, got {name!r}.")
        array = isinstance(value, jax.Array | np.ndarray | np.generic)
        if not array and not isinstance(value, int | float):
            raise TypeError(
                f"`{call}` must return metrics that are arrays, got {name!r} of type "
                f"{type(value).__name__}."
            )
        dtype = jnp.result_type(value)
        if not (
            dtype == jnp.bool_
            or jnp.issubdtype(dtype, jnp.integer)
            or jnp.issubdtype(dtype, jnp.floating)
        ):
            raise TypeError(
                f"`{call}` must return metrics of real numbers, got {name!r} of dtype "
                f"{dtype}."
            )
        checked[name] = jnp.asarray(value)
    return checked


def checked_levels(levels: Any, call: str) -> tuple[Array, Array]:
    """The levels as given, and in the dtype in which training sees them."""
    try:
        given = np.asarray(levels)
    except ValueError as error:
        raise ValueError(
            f"`{call}` must have the shape [levels], got a ragged list."
        ) from error
    real = jnp.issubdtype(given.dtype, jnp.floating) or given.dtype.kind in "iu"
    if not real and given.size:
        raise TypeError(f"`{call}` must be real numbers, got dtype {given.dtype}.")
    if given.ndim != 1 or not given.size:
        raise ValueError(
            f"`{call}` must have the shape [levels] with one level at least, got shape "
            f"{given.shape}."
        )
    check_level(given, call)
    if given.dtype.kind in "iu":
        given = given.astype(np.float64)
    wide = given.dtype == np.float64 and jnp.result_type(float) == np.float64
    used = given.astype(np.float64 if wide else np.float32)
    values, counts = np.unique(used, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"`{call}` must be distinct in {used.dtype}, got {values[counts > 1][0]} "
            "more than once."
        )
    return given, used


class Keys(NamedTuple):
    """Random keys as plain numbers.

    Attributes:
      data: uint32 numbers, shape [keys, words].
      impl: the name of the generator; None for raw keys.
      like: shape and dtype of one key, as it was given.
      unwrap: the key, as it was given, from its numbers.
    """

    data: Array
    impl: str | None
    like: jax.ShapeDtypeStruct
    unwrap: Callable[[Any], jax.Array]


def checked_keys(keys: Any, call: str) -> Keys:
    """The keys; two that are the same would repeat a run and understate the spread."""
    if isinstance(keys, list | tuple) and keys:
        stacked: Any = jnp.stack([jnp.asarray(key) for key in cast(list[Any], keys)])
        return checked_keys(stacked, call)
    dtype = getattr(cast(Any, keys), "dtype", None)
    unwrap: Callable[[Any], jax.Array]
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        typed = cast(jax.Array, keys)
        impl: Any = jax.random.key_impl(typed)
        data, name = np.asarray(jax.random.key_data(typed)), str(impl)
        unwrap = functools.partial(_wrapped, impl)
        fits = typed.ndim == 1
    elif dtype == np.uint32:
        data, name = np.asarray(cast(Any, keys)), None
        unwrap = _raw
        fits = data.ndim == 2
    else:
        raise TypeError(
            f"`{call}` must be keys such as `jax.random.split(jax.random.key(0), 10)`, "
            f"got {type(cast(Any, keys)).__name__} of dtype {dtype}. Seeds become keys "
            "by `jax.vmap(jax.random.key)(seeds)`."
        )
    if not fits or not len(data):
        raise ValueError(
            f"`{call}` must have the shape [keys] (raw keys: [keys, words]) with one "
            f"key at least, got shape {np.shape(cast(Any, keys))}: "
            "`jax.random.split(key, 10)`."
        )
    different = len(np.unique(data, axis=0))
    if different < len(data):
        raise ValueError(
            f"`{call}` must be distinct, got {len(data)} keys of which {different} "
            "differ: the same run would count twice."
        )
    shape = data.shape[1:] if name is None else ()
    return Keys(data, name, jax.ShapeDtypeStruct(shape, dtype), unwrap)


def _wrapped(impl: Any, words: Any) -> jax.Array:
    return cast(jax.Array, jax.random.wrap_key_data(words, impl=impl))


def _raw(words: Any) -> jax.Array:
    return jnp.asarray(words)
