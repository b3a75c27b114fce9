"""Many levels on one sequence of batches: a shared trunk, and a branch per level."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flood_optax.sweep.cores import over_cores
from flood_optax.sweep.extras import progress_bar
from flood_optax.sweep.inputs import (
    Array,
    Levels,
    as_levels,
    as_stacked,
    as_strong,
    called,
    check_no_batch_alone,
    num_steps,
    with_checks,
)
from flood_optax.sweep.result import Result
from flood_optax.sweep.traced import Traced, fingerprint, settings, trace

Number = np.floating[Any]
Rows = dict[str, Array]
Step = Callable[[Any, Any, jax.Array], tuple[Any, Mapping[str, Any]]]
Program = Callable[..., tuple[Any, dict[str, jax.Array]]]
PROGRAMS: dict[Any, Program] = {}  # the last that were made or taken, at the end
SEGMENTS = 64  # at most, at whose begins the state of the trunk can be taken up


def forked(
    step: Step,
    state: Any,
    batches: Any,
    levels: Any,
    *,
    progress: bool = False,
) -> Result:
    """Trains at every level on the same batches, sharing the steps that are the same.

    Until the raw loss is first below a level b, training at b is plain training. So the
    lowest level is trained whole, as a trunk, and every other from the first step at
    which the loss of the trunk is below it. At a tie, loss == b, it still descends with
    the trunk, and so it does at a NaN loss, which is below no level, unless the trunk
    is plain training, level -inf, which alone takes the updates of a NaN loss as they
    are. The metrics are those of separate runs, bit for bit: of this function with
    that level alone, and of a `jax.lax.scan` of ``step``, jitted with the level as an
    argument, wherever XLA rounds alike in both programs.

    This holds if ``step`` uses the level for one thing: to flood the loss that it
    returns as ``"loss"``, by a shape that is the loss itself above the level
    (`flood_optax.flooded` and `flood_optax.scale_by_flood` with reflect, pause or
    asymmetric). The state may remember the level; metrics must not show it. The steps
    before a branch are run again, a 64th of the training at most, and a level that
    makes them differ from the trunk is refused (a soft shape, flooding per example, a
    metric that holds the level: use `flood_optax.sweep.run`); steps before those are
    not looked at.

    On a CPU a branch runs on each core. ``Result.steps_run`` tells what was saved of
    ``Result.steps_separate``. Calls that differ in state, batches and levels alone,
    such as for other seeds, trace ``step`` again and compile it once.

    Args:
      step: (state, batch, level) -> (state, metrics). The metrics are a dict of real
        arrays with the raw loss, a scalar, under "loss". State keeps its structure,
        shapes and dtypes. Must be traceable.
      state: a tree of arrays: parameters, optimizer state, ...
      batches: a tree of arrays with a leading axis [steps], one batch per step. Batches
        that are a list are stacked: `jax.tree.map(lambda *b: jnp.stack(b), *batches)`.
      levels: distinct numbers, shape [levels]; -inf is no flooding. Or a function of
        the metrics of the run without flooding, NumPy arrays [steps, ...], that returns
        a level or levels: that run, level -inf, is then the trunk, and comes first in
        the result if the function does not name it. Copies of the state at 64 steps
        are kept until the branches are run. What it raises, and what is raised because
        it returns no levels, has those metrics as the attribute ``metrics``.
      progress: whether to show a tqdm bar that counts steps.

    Returns:
      A `Result` whose metrics are NumPy arrays of shape [levels, steps, ...].

    Raises:
      ValueError: if a level changes the steps before its branch; for wrong arguments.

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

      Stop and flood: the level is the training loss where the plain run was best.

      >>> def at_last(metrics):
      ...     return metrics["loss"][-100:].mean()
      >>> result = sweep.forked(step, jnp.array(1.5), batches, at_last)
      >>> print(result.metrics["loss"].shape, result.levels[0])
      (2, 200) -inf
    """
    state = jax.tree.map(as_strong, state)
    batches = as_stacked(batches)
    number = num_steps(batches)
    known = None if callable(levels) else as_levels(levels, "sweep.forked(levels)")
    off = np.dtype(jnp.result_type(float)).type(-np.inf)
    lowest: Number = off if known is None else known.used.min()
    batch = jax.eval_shape(lambda batches: _batch(batches, 0), batches)
    level_type = jax.ShapeDtypeStruct((), lowest.dtype)
    with called("sweep.forked(step)", step, "state", "batch", "level"):
        checked = with_checks(step, state)
        check_no_batch_alone(checked, state, batch, level_type, batches=batches)
        traced = trace(checked, "sweep.forked(step)", state, batch, level_type)
    program = _program(traced)
    with progress_bar(
        "sweep.forked(progress=True)",
        shown=progress,
        total=None if known is None else number * len(known.used),
        unit="step",
    ) as advance:
        others = None if known is None else known.used
        trunk, origins = _trunk(
            program, state, batches, lowest=lowest, others=others, advance=advance
        )
        known = known or _levels_of(levels, trunk, off.dtype)
        branches = [level for level in known.used if level != lowest]
        forks = [_fork(trunk["loss"], level, lowest) for level in branches]
        begins = [_origin(fork, number) for fork in forks]
        runs = [
            (origins[begin], batches, np.asarray(level), *_steps(begin, number))
            for level, begin in zip(branches, begins, strict=True)
        ]
        own = over_cores(program, runs, lambda result: result[1])
        found = {lowest: trunk}
        for level, fork, begin, rows in zip(branches, forks, begins, own, strict=True):
            found[level] = _branch(trunk, rows, begin, fork, level)
            advance(number)
        separate = [found[level] for level in known.used]
    return Result(
        known.given,
        {name: np.stack([rows[name] for rows in separate]) for name in trunk},
        ("level", "step"),
        steps_run=number + sum(number - begin for begin in begins),
        steps_separate=number * len(separate),
    )


def _steps(begin: int, end: int) -> tuple[Any, Any]:
    """As arguments of a program, which is compiled once for all of them."""
    return np.int32(begin), np.int32(end)


def _segment(number: int) -> int:
    """The steps of a segment, of so many in all."""
    return math.ceil(number / SEGMENTS)


def _origin(fork: int, number: int) -> int:
    """The step to run a branch from, the begin of a segment.

    The loss after an update of the trunk is compared before the branch leaves: the
    update of the step before the fork, or of the last but one where there is no fork.
    """
    compared = max(min(fork, number - 1) - 1, 0)
    return compared // _segment(number) * _segment(number)


def _trunk(
    program: Program,
    state: Any,
    batches: Any,
    *,
    lowest: Number,
    others: Array | None,
    advance: Callable[[int], Any],
) -> tuple[Rows, dict[int, Any]]:
    """The metrics of the lowest level, and its state where a branch will begin."""
    number = num_steps(batches)
    length = _segment(number)
    origins: dict[int, Any] = {}
    pieces: list[Rows] = []
    wanted: dict[float, int] = {}
    for begin in range(0, number, length):
        end = min(begin + length, number)
        origins[begin] = state
        given = np.asarray(lowest), *_steps(begin, end)
        state, rows = program(state, batches, *given)
        pieces.append({name: np.asarray(x)[begin:end] for name, x in rows.items()})
        # Of levels that are not known yet, any segment may be the one to branch from.
        if others is not None:
            for level in others:
                fork = begin + _fork(pieces[-1]["loss"], level, lowest)
                if fork < end:
                    wanted.setdefault(float(level), _origin(fork, number))
            kept = {*wanted.values(), begin, begin - length}
            origins = {at: origins[at] for at in origins if at in kept}
        advance(end - begin)
    rows = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
    return rows, origins


def _branch(trunk: Rows, own: Rows, begin: int, fork: int, level: Number) -> Rows:
    """The metrics at a level that leaves the trunk at ``fork``, run from ``begin``."""
    for name, rows in trunk.items():
        # At the fork itself the loss is the trunk's; what it led to is the branch's.
        shared = slice(begin, fork + 1 if name == "loss" else fork)
        # the same bits: of zeros the sign, of NaN the payload
        if own[name][shared].tobytes() != rows[shared].tobytes():
            raise ValueError(
                "`sweep.forked(step)` must use the level only to flood the loss that "
                f"it returns, by a shape that is the loss itself above the level, but "
                f"the metric {name!r} differs between the levels before the loss is "
                f"below {level:g} for the first time, at step {fork}. Train every "
                "level by itself: `flood_optax.sweep.run`."
            )
    return {
        name: np.append(rows[:begin], own[name][begin:], axis=0)
        for name, rows in trunk.items()
    }


def _program(traced: Traced) -> Program:
    """The program of a step, made once for all steps that compute the same."""
    digest, hidden = fingerprint(traced.jaxpr)
    if hidden:  # a function of Python, which may be another each time
        return _compiled(traced)
    # A traced step has in it the settings under which it was traced.
    name = digest, jax.tree.structure(traced.shape), *settings().values()
    program = PROGRAMS.pop(name, None) or _compiled(traced)
    PROGRAMS[name] = program
    for oldest in [*PROGRAMS][:-4]:  # a program keeps the arrays that its step uses
        PROGRAMS.pop(oldest, None)
    return program


def _compiled(traced: Traced) -> Program:
    """Steps from one number to another, one program for trunk, branches and seeds."""

    @jax.jit
    def advance(
        state: Any, batches: Any, level: jax.Array, begin: jax.Array, end: jax.Array
    ) -> tuple[Any, dict[str, jax.Array]]:
        rows = {
            name: jnp.zeros((num_steps(batches), *metric.shape), metric.dtype)
            for name, metric in traced.shape[1].items()
        }

        def body(i: jax.Array, carry: Any) -> Any:
            state, rows = carry
            state, metrics = traced.call(state, _batch(batches, i), level)
            put = lax.dynamic_update_index_in_dim
            return state, {n: put(x, metrics[n], i, 0) for n, x in rows.items()}

        return lax.fori_loop(begin, end, body, (state, rows))

    return advance


def _levels_of(
    function: Callable[[Rows], Any], rows: Rows, dtype: np.dtype[Any]
) -> Levels:
    """The levels read off the run without flooding, which is one of them."""
    try:
        chosen = np.atleast_1d(function(rows))
        if chosen.ndim == 1 and not (chosen == -np.inf).any():
            chosen = np.append(-np.inf, chosen)
        given, used = as_levels(chosen, "sweep.forked(levels)'s result")
    except Exception as error:
        error.metrics = rows  # type: ignore[attr-defined]
        error.add_note(
            "The run without flooding is done: its metrics are the attribute `metrics` "
            "of this error."
        )
        raise
    return Levels(given, used.astype(dtype))  # of the trunk: another is another program


def _fork(losses: Array, level: Number, lowest: Number) -> int:
    """The first step at which a level leaves the trunk; their number if none."""
    dtype = np.promote_types(losses.dtype, np.float32)  # in which flooding compares
    losses = losses.astype(dtype)
    leaves = losses < level.astype(dtype)
    if lowest == -np.inf:  # which alone is not flooded at a NaN loss
        leaves |= np.isnan(losses)
    return int(np.argmax(leaves)) if leaves.any() else len(losses)


def _batch(batches: Any, i: int | jax.Array) -> Any:
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), batches
    )
