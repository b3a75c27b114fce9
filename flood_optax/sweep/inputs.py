"""What a sweep is given, and what training returns to it: the rules for both."""

import contextlib
import inspect
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from flood_optax.checks import check_level, function

Array = npt.NDArray[Any]


class Levels(NamedTuple):
    """The levels of a sweep.

    Attributes:
      given: as they were given, floats.
      used: in the dtype in which training sees them.
    """

    given: Array
    used: Array


def checked_levels(levels: Any, call: str) -> Levels:
    """The levels; two that training sees as one would be trained twice."""
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
    return Levels(given, used)


class Keys(NamedTuple):
    """Random keys as plain numbers.

    Attributes:
      data: uint32 numbers, shape [keys, words].
      impl: the name of the generator; None for raw keys.
    """

    data: Array
    impl: str | None

    def unwrap(self, words: jax.Array) -> jax.Array:
        """One key, as it was given, from its numbers."""
        if self.impl is None:
            return words
        return jax.random.wrap_key_data(words, impl=self.impl)


def checked_keys(given: Any, call: str) -> Keys:
    """The keys; two that are the same would repeat a run and understate the spread."""
    keys = given
    listed = isinstance(given, list | tuple) and given
    if listed and all(hasattr(key, "dtype") for key in given):  # else they are seeds
        keys = jnp.stack([jnp.asarray(key) for key in given])
    dtype = getattr(keys, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and dtype != np.uint32:
        raise TypeError(
            f"`{call}` must be keys such as `jax.random.split(jax.random.key(0), 10)`, "
            f"got {type(given).__name__} of dtype {dtype}. Seeds become keys by "
            "`jax.vmap(jax.random.key)(jnp.array(seeds))`."
        )
    data = np.asarray(jax.random.key_data(keys) if typed else keys)
    if data.ndim != 2 or not len(data):
        raise ValueError(
            f"`{call}` must have the shape [keys] (raw keys: [keys, words]) with one "
            f"key at least, got shape {np.shape(keys)}: `jax.random.split(key, 10)`."
        )
    different = len(np.unique(data, axis=0))
    if different < len(data):
        raise ValueError(
            f"`{call}` must be distinct, got {len(data)} keys of which {different} "
            "differ: the same run would count twice."
        )
    return Keys(data, str(jax.random.key_impl(keys)) if typed else None)


@contextlib.contextmanager
def called(call: str, given: Any, *words: str) -> Generator[None]:
    """Demands a function of these arguments, and says so of any error in it."""
    function(call, given)
    due = f"({', '.join(words)})"
    with contextlib.suppress(ValueError):  # a function of C may tell no arguments
        signature = inspect.signature(given)
        names = zip(signature.parameters, words, strict=False)
        wrong = any(name in words and name != word for name, word in names)
        try:
            signature.bind(*words)
        except TypeError:
            wrong = True
        if wrong:
            raise TypeError(f"`{call}` is called with {due}, got one of {signature}.")
    try:
        yield
    except Exception as error:
        error.add_note(f"`{call}` is called with {due}.")
        raise


def checked_metrics(metrics: Any, call: str) -> dict[str, jax.Array]:
    """The metrics as arrays; they must be a flat dict of real numbers."""
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"`{call}` must return its metrics as a dict of arrays, got "
            f"{type(metrics).__name__}."
        )
    if not metrics:
        raise TypeError(f"`{call}` must return one metric at least, got an empty dict.")
    return {name: _metric(name, value, call) for name, value in metrics.items()}


def _metric(name: Any, value: Any, call: str) -> jax.Array:
    if not isinstance(name, str):
        raise TypeError(f"`{call}` must name its metrics by strings, got {name!r}.")
    if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float):
        raise TypeError(
            f"`{call}` must return metrics that are arrays, got {name!r} of type "
            f"{type(value).__name__}."
        )
    dtype = jnp.result_type(value)
    kinds = (jnp.bool_, jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise TypeError(
            f"`{call}` must return metrics of real numbers, got {name!r} of dtype "
            f"{dtype}."
        )
    return jnp.asarray(value)
