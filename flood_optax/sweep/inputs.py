"""What a sweep is given, and what training returns to it: the rules for both."""

import contextlib
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from flood_optax.checks import (
    as_scalar_loss,
    check_function,
    check_level,
    check_that,
    is_real,
)

Array = npt.NDArray[Any]
STEP, BATCHES = "sweep.forked(step)", "sweep.forked(batches)"
A_TREE = "be a tree of arrays [steps, ...]"
STACK = (
    " Stack a list of batches, `jax.tree.map(lambda *b: jnp.stack(b), *batches)`; "
    "arrays that make up one batch go in a tuple or a dict."
)


class Levels(NamedTuple):
    """The levels of a sweep.

    Attributes:
      given: as they were given, floats.
      used: in the dtype in which training sees them.
    """

    given: Array
    used: Array


def as_levels(levels: Any, call: str) -> Levels:
    """The levels; two that training sees as one would be trained twice."""
    given = np.asarray(levels)
    real = jnp.issubdtype(given.dtype, jnp.floating) or given.dtype.kind in "iu"
    got = f"dtype {given.dtype}"
    check_that(real or not given.size, call, "be real numbers", got, error=TypeError)
    rule = "have the shape [levels] with one level at least"
    fits = given.ndim == 1 and given.size
    check_that(fits, call, rule, f"shape {given.shape}")
    check_level(given, call)
    if given.dtype.kind in "iu":
        given = given.astype(np.float64)
    wide = given.dtype == np.float64 and jnp.result_type(float) == np.float64
    used = given.astype(np.float64 if wide else np.float32)
    values, counts = np.unique(used, return_counts=True)
    got = f"{values[counts.argmax()]} more than once"
    check_that(counts.max() == 1, call, f"be distinct in {used.dtype}", got)
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


def as_keys(given: Any, call: str) -> Keys:
    """The keys; two that are the same would repeat a run and understate the spread."""
    keys = given
    listed = isinstance(given, list | tuple) and given
    if listed and all(hasattr(key, "dtype") for key in given):  # else they are seeds
        keys = jnp.stack([jnp.asarray(key) for key in given])
    dtype = getattr(keys, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    rule = "be keys such as `jax.random.split(jax.random.key(0), 10)`"
    got = f"{type(given).__name__} of dtype {dtype}"
    remedy = " Seeds become keys by `jax.vmap(jax.random.key)(jnp.array(seeds))`."
    fits = typed or dtype == np.uint32
    check_that(fits, call, rule, got, remedy, error=TypeError)
    data = np.asarray(jax.random.key_data(keys) if typed else keys)
    rule = "have the shape [keys] (raw keys: [keys, words]) with one key at least"
    got = f"shape {np.shape(keys)}: `jax.random.split(key, 10)`"
    check_that(data.ndim == 2 and len(data), call, rule, got)
    different = len(np.unique(data, axis=0))
    got = (
        f"{len(data)} keys of which {different} differ: the same run would count twice"
    )
    check_that(different == len(data), call, "be distinct", got)
    return Keys(data, str(jax.random.key_impl(keys)) if typed else None)


@contextlib.contextmanager
def called(call: str, given: Any, *words: str) -> Generator[None]:
    """Demands a function of these arguments, and says so of any error in it."""
    check_function(call, given)
    due = f"({', '.join(words)})"
    with contextlib.suppress(ValueError):  # a function of C may tell no arguments
        signature = inspect.signature(given)
        # Another number of arguments is an error by itself, another order is none.
        names = zip(signature.parameters, words, strict=False)
        if any(name in words and name != word for name, word in names):
            raise TypeError(f"`{call}` is called with {due}, got one of {signature}.")
    try:
        yield
    except Exception as error:
        error.add_note(f"`{call}` is called with {due}.")
        raise


def as_metrics(metrics: Any, call: str) -> dict[str, jax.Array]:
    """The metrics as arrays; they must be a flat dict of real numbers."""

    def demand(holds: object, rule: str, got: str) -> None:
        check_that(holds, call, rule, got, error=TypeError)

    kind = type(metrics).__name__
    is_dict = isinstance(metrics, Mapping)
    demand(is_dict, "return its metrics as a dict of arrays", kind)
    demand(metrics, "return one metric at least", "an empty dict")
    numbers = jax.Array | np.ndarray | np.generic | int | float
    for name, value in metrics.items():
        demand(isinstance(name, str), "name its metrics by strings", repr(name))
        got = f"{name!r} of type {type(value).__name__}"
        demand(isinstance(value, numbers), "return metrics that are arrays", got)
        dtype = jnp.result_type(value)
        real = is_real(dtype) or dtype == jnp.bool_
        demand(real, "return metrics of real numbers", f"{name!r} of dtype {dtype}")
    return {name: jnp.asarray(value) for name, value in metrics.items()}


def as_strong(leaf: Any) -> jax.Array:
    """The leaf as an array of its own dtype, not a weak one."""
    array = jnp.asarray(leaf)
    weak = getattr(array, "weak_type", False)  # typed keys have no such attribute
    return array.astype(array.dtype) if weak else array


def as_stacked(batches: Any) -> Any:
    """The batches as arrays; a list is of batches, of which the axes are others."""

    def is_many(part: Any) -> bool:
        return isinstance(part, list | Iterator)  # as a zip, or a loader of data

    for leaf in jax.tree.leaves(batches, is_leaf=is_many):
        size = f"list of {len(leaf)}" if isinstance(leaf, list) else type(leaf).__name__
        fits = not is_many(leaf)
        check_that(fits, BATCHES, A_TREE, f"a {size}", STACK, error=TypeError)
    return jax.tree.map(jnp.asarray, batches)


def check_no_batch_alone(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    level: jax.ShapeDtypeStruct,
    *,
    batches: Any,
) -> None:
    """Refuses a tuple of batches: its parts are alike, and the step takes one alone."""

    def takes(batch: Any) -> bool:
        try:
            jax.eval_shape(step, state, batch, level)
        except Exception:  # whatever a step raises that is given something else
            return False
        return True

    if not (type(batches) is tuple and batches):
        return
    first, *others = (jax.eval_shape(lambda x: x, part) for part in batches)
    if any(other != first for other in others) or not takes(first):
        return
    # Inputs, targets and weights may be alike, and be taken by their numbers.
    fits = len(batches) <= 3 and takes(batch)
    got = f"a tuple of {len(batches)}, each of which the step takes as a batch"
    check_that(fits, BATCHES, A_TREE, got, STACK, error=TypeError)


def num_steps(batches: Any) -> int:
    """The length of the leading axis, the same in every leaf."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(batches)}
    lengths = {shape[:1] for shape in shapes}
    fits = len(lengths) == 1 and not lengths & {(), (0,)}
    rule = "have one leading axis [steps] in all leaves, one step at least"
    check_that(fits, BATCHES, rule, f"the shapes {sorted(shapes)}", STACK)
    return lengths.pop()[0]


def with_checks(step: Callable[..., Any], state: Any) -> Callable[..., Any]:
    """The step, with what it returns checked while it is traced."""

    def checked(*args: Any) -> tuple[Any, dict[str, jax.Array]]:
        result = step(*args)
        is_pair = isinstance(result, tuple) and len(result) == 2
        got = type(result).__name__
        check_that(is_pair, STEP, "return (state, metrics)", got, error=TypeError)
        after, metrics = result
        metrics = as_metrics(metrics, STEP)
        rule = "return the raw loss as the metric 'loss'"
        got = ", ".join(map(repr, metrics))
        check_that("loss" in metrics, STEP, rule, got, error=TypeError)
        remedy = "Return the loss that is compared with the level."
        as_scalar_loss(metrics["loss"], f"{STEP}'s loss", remedy)
        return _state_like(after, state), metrics

    return checked


def _state_like(after: Any, before: Any) -> Any:
    """The new state, if it has structure, shapes and dtypes of the given one."""
    now, then = jax.tree.structure(after), jax.tree.structure(before)
    rule, got = "keep the structure of the state", f"{now} from {then}"
    check_that(now == then, STEP, rule, got, error=TypeError)

    def alike(path: Any, new: Any, old: jax.Array) -> jax.Array:
        new = as_strong(new)
        types = f"{new.dtype}{[*new.shape]} from {old.dtype}{[*old.shape]}"
        got = f"{types} at state{jax.tree_util.keystr(path)}"
        same = (new.shape, new.dtype) == (old.shape, old.dtype)
        check_that(
            same, STEP, "keep shapes and dtypes of the state", got, error=TypeError
        )
        return new

    return jax.tree.map_with_path(alike, after, before)
