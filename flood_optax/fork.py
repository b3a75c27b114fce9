"""Many levels on one sequence of batches: a shared trunk, and a branch per level."""

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

from flood_optax.bend import compare_dtype
from flood_optax.checks import scalar_loss
from flood_optax.extras import progress_bar
from flood_optax.results import Result
from flood_optax.traced import Traced, checked_levels, checked_metrics, trace

Array = npt.NDArray[Any]
Level = np.floating[Any]
Rows = dict[str, jax.Array]
SEGMENTS = 64  # at most, in which the steps at which to branch are looked for


def forked(
    step: Callable[[Any, Any, jax.Array], tuple[Any, Mapping[str, Any]]],
    state: Any,
    batches: Any,
    levels: Any,
    *,
    progress: bool = False,
) -> Result:
    """Trains at every level on the same batches, sharing the steps that are the same.

    Until the raw loss is first below a level b, training at b is plain training. So the
    lowest level is trained whole, as a trunk, and every other from the first step at
    which the loss of the trunk is below it; at a tie, loss == b, it still descends with
    the trunk, and so it does at a NaN loss, which is below no level. The metrics are
    those of separate runs, bit for bit: of a `jax.lax.scan` of ``step`` over the
    batches, jitted with the level as an argument.

    ``step`` may use the level to flood a loss that is the ``"loss"`` it returns, as
    `flooded` (at its defaults) and `scale_by_flood` do, and to remember it. The steps
    before a branch are run again, a 64th of the training at most, and compared with the
    trunk: a level at which they differ (a soft shape, flooding per example, a metric
    that holds the level) is run whole instead. ``Result.steps_run`` tells what was
    saved of ``Result.steps_separate``.

    Args:
      step: (state, batch, level) -> (state, metrics). The metrics are a dict of real
        arrays with the raw loss, a scalar, under "loss". State keeps its structure,
        shapes and dtypes. Must be traceable; it is traced once.
      state: a tree of arrays: parameters, optimizer state, ...
      batches: a tree of arrays with a leading axis [steps], one batch per step.
      levels: distinct numbers, shape [levels]; -inf is no flooding.
      progress: whether to show a tqdm bar that counts steps.

    Returns:
      A `Result` whose metrics are NumPy arrays of shape [levels, steps, ...].

    Raises:
      TypeError: if ``step`` returns something else than a state like the given one and
        a dict of real arrays with a scalar "loss".
      ValueError: if ``levels`` is empty, of a wrong shape or not distinct, or holds NaN
        or +inf; if ``batches`` is empty or its leading axes differ.
      ImportError: if ``progress`` is asked for and tqdm is not installed.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flood_optax import flooded, sweep
      >>> def loss_fn(w, x):
      ...     return jnp.exp(w * x) - w * x - 1.0
      >>> def step(w, x, level):
      ...     objective = flooded(loss_fn, level, return_info=True)
      ...     (_, info), grad = jax.value_and_grad(objective, has_aux=True)(w, x)
      ...     return w - 0.3 * grad, {"loss": info.loss}
      >>> batches = jnp.linspace(0.5, 1.5, 200)
      >>> levels = [-jnp.inf, 0.05, 0.1]
      >>> result = sweep.forked(step, jnp.array(1.5), batches, levels)
      >>> print(result.metrics["loss"].shape)
      (3, 200)
      >>> print(result.steps_run, "steps instead of", result.steps_separate)
      588 steps instead of 600
    """
    given, used = checked_levels(levels, "sweep.forked(levels)")
    state = jax.tree.map(_strong, state)
    batches = jax.tree.map(_array, batches)
    number = _num_steps(batches)
    first = (state, _batch(batches, 0), jax.ShapeDtypeStruct((), used.dtype))
    traced = trace(_checked_step(step, state), "sweep.forked(step)", *first)
    program = _Program(traced, batches, number)
    with progress_bar(
        "sweep.forked(progress=True)",
        shown=progress,
        total=number * len(given),
        unit="step",
    ) as advance:
        found = _grow(program, state, used, advance)
    return Result(
        given,
        {name: np.stack([rows[name] for rows in found]) for name in found[0]},
        ("level", "step"),
        steps_run=program.steps_run,
        steps_separate=number * len(given),
    )


class _Program:
    """Steps from one number to another, compiled once for trunk and branches."""

    def __init__(self, traced: Traced, batches: Any, number: int) -> None:
        self.number = number
        self.steps_run = 0
        self.batches = batches
        self.empty: Rows = {
            name: jnp.zeros((number, *like.shape), like.dtype)
            for name, like in traced.shape[1].items()
        }

        def advance(
            carry: tuple[Any, Rows], batches: Any, level: jax.Array, steps: jax.Array
        ) -> tuple[Any, Rows]:
            def body(i: jax.Array, carry: tuple[Any, Rows]) -> tuple[Any, Rows]:
                state, rows = carry
                state, metrics = traced.call(state, _batch(batches, i), level)
                rows = {name: _put(row, metrics[name], i) for name, row in rows.items()}
                return state, rows

            return cast(Any, lax.fori_loop)(steps[0], steps[1], body, carry)

        self.advance = jax.jit(advance)

    def __call__(
        self, state: Any, rows: Rows, level: Level, begin: int, end: int
    ) -> tuple[Any, Rows]:
        """The state after the steps, and the rows with theirs filled in."""
        self.steps_run += end - begin
        steps = np.array([begin, end], np.int32)
        advance = cast(Callable[..., tuple[Any, Rows]], self.advance)
        return advance((state, rows), self.batches, np.asarray(level), steps)

    def whole(self, state: Any, level: Level, begin: int = 0) -> dict[str, Array]:
        """The rows from a step to the end."""
        _, rows = self(state, self.empty, level, begin, self.number)
        return {name: np.asarray(x) for name, x in rows.items()}


def _grow(
    program: _Program, state: Any, levels: Array, advance: Callable[[int], Any]
) -> list[dict[str, Array]]:
    """Runs the trunk, which is the lowest level, and a branch for every other."""
    number = program.number
    lowest = int(np.argmin(levels))
    pending = [i for i in range(len(levels)) if i != lowest]
    found: dict[int, dict[str, Array]] = {}
    now, rows, before = state, program.empty, (0, state)
    trunk: dict[str, Array] = {}

    def branch(index: int, fork: int, origin: tuple[int, Any]) -> None:
        rows = _branch(program, trunk, fork, origin, levels[index])
        found[index] = program.whole(state, levels[index]) if rows is None else rows
        pending.remove(index)
        advance(number)

    length = math.ceil(number / SEGMENTS)
    for begin in range(0, number, length):
        end = min(begin + length, number)
        after, rows = program(now, rows, levels[lowest], begin, end)
        trunk = {name: np.asarray(x) for name, x in rows.items()}
        for index in list(pending):
            below = _below(trunk["loss"][begin:end], levels[index])
            if below.any():
                fork = begin + int(np.argmax(below))
                # One step of the trunk at least is run again, to compare.
                branch(index, fork, (begin, now) if fork > begin else before)
        before, now = (begin, now), after
        advance(end - begin)
    for index in list(pending):
        branch(index, number, before)
    found[lowest] = trunk
    return [found[i] for i in range(len(levels))]


def _branch(
    program: _Program,
    trunk: dict[str, Array],
    fork: int,
    origin: tuple[int, Any],
    level: Level,
) -> dict[str, Array] | None:
    """The metrics at a level that leaves the trunk at `fork`; None if it never was."""
    begin, state = origin
    own = program.whole(state, level, begin)
    shared = all(_same(own[n][begin:fork], trunk[n][begin:fork]) for n in own)
    if shared and _same(own["loss"][begin : fork + 1], trunk["loss"][begin : fork + 1]):
        return {n: np.append(trunk[n][:begin], own[n][begin:], axis=0) for n in own}
    return None


def _batch(batches: Any, i: int | jax.Array) -> Any:
    def take(x: jax.Array) -> jax.Array:
        return cast(jax.Array, lax.dynamic_index_in_dim(x, i, keepdims=False))

    return jax.tree.map(take, batches)


def _put(row: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
    return cast(jax.Array, lax.dynamic_update_index_in_dim(row, x, i, 0))


def _array(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf)


def _below(losses: Array, level: Level) -> Array:
    """Where losses are below the level, in the dtype in which flooding compares."""
    dtype = compare_dtype(losses.dtype)
    return losses.astype(dtype) < level.astype(dtype)


def _same(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bits; NaN is NaN."""
    return np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)


def _strong(leaf: Any) -> jax.Array:
    """The leaf as an array of its own dtype, not a weak one."""
    array = jnp.asarray(leaf)
    weak = getattr(array, "weak_type", False)  # typed keys have no such attribute
    return array.astype(array.dtype) if weak else array


def _num_steps(batches: Any) -> int:
    """The length of the leading axis, the same in every leaf."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(batches)}
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise ValueError(
            "`sweep.forked(batches)` must have one leading axis [steps] in all leaves, "
            f"one step at least, got the shapes {sorted(shapes)}."
        )
    return lengths.pop()[0]


def _checked_step(step: Callable[..., Any], state: Any) -> Callable[..., Any]:
    """The step, with what it returns checked while it is traced."""

    def checked(*args: Any) -> tuple[Any, dict[str, jax.Array]]:
        result = step(*args)
        if not (isinstance(result, tuple) and len(cast(tuple[Any], result)) == 2):
            raise TypeError(
                "`sweep.forked(step)` must return (state, metrics), got "
                f"{type(cast(Any, result)).__name__}."
            )
        after, metrics = cast(tuple[Any, Any], result)
        metrics = checked_metrics(metrics, "sweep.forked(step)")
        if "loss" not in metrics:
            raise TypeError(
                "`sweep.forked(step)` must return the raw loss as the metric 'loss', "
                f"got {', '.join(map(repr, metrics))}."
            )
        scalar_loss(
            metrics["loss"],
            "sweep.forked(step)'s loss",
            "Return the loss that is compared with the level.",
        )
        return _state_like(after, state), metrics

    return checked


def _state_like(after: Any, before: Any) -> Any:
    """The new state, if it has structure, shapes and dtypes of the given one."""
    if jax.tree.structure(after) != jax.tree.structure(before):
        raise TypeError(
            "`sweep.forked(step)` must keep the structure of the state, got "
            f"{jax.tree.structure(after)} from {jax.tree.structure(before)}."
        )

    def alike(path: Any, new: Any, old: jax.Array) -> jax.Array:
        new = jnp.asarray(new)
        if (new.shape, new.dtype) != (old.shape, old.dtype):
            raise TypeError(
                "`sweep.forked(step)` must keep shapes and dtypes of the state, got "
                f"{new.dtype}{[*new.shape]} from {old.dtype}{[*old.shape]} at "
                f"state{jax.tree_util.keystr(path)}."
            )
        return _strong(new)

    return jax.tree.map_with_path(alike, after, before)
