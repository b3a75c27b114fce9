"""The optimizer wrapper: the inner optimizer sees the flooded objective whole."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from flood_optax.bend import Bent
from flood_optax.checks import check_raw, must
from flood_optax.devices import AxisName
from flood_optax.dispatch import on_chosen, one_dispatch
from flood_optax.objective import flooded
from flood_optax.shapes import Shape, reflect
from flood_optax.transform import (
    FloodState,
    Level,
    batch_loss,
    flooding,
    initial_state,
    refuse_state,
)
from flood_optax.window import EveryK, FloodWindow, ShouldSkip, accumulation

__all__ = ["FloodWindow", "FloodWrapperState", "flood"]


SEARCH = ("value_fn", "grad")  # what a line search is given beside the value


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


export.register_namedtuple_serialization(  # as for FloodState
    FloodWrapperState, serialized_name="flood_optax.FloodWrapperState"
)


def flood(
    inner: optax.GradientTransformation,
    level: Level,
    *,
    band: ArrayLike | None = None,
    every_k: EveryK = 1,
    shape: Shape = reflect(),
    axis_name: AxisName | None = None,
    should_skip_update_fn: ShouldSkip | None = None,
    accumulator_dtype: DTypeLike | None = None,
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
    is then the mean loss of the micro-batch; micro-batches of unequal size need
    ``weight``. Between the ends of windows updates are zero. A NaN or inf spoils its
    own window only. ``inner``, the level schedule, ``flood_step``, ``flood_below``
    count windows; a schedule under `optax.inject_hyperparams` counts calls of update,
    micro-batches, unless ``level`` is named in ``static_args`` too.

    Args:
      inner: the optimizer; one that floods or accumulates itself is refused at init.
      level: a scalar, b, or a schedule from the step to one. -inf means off. No
        gradient flows into it.
      band: half the width of a band around the level, see
        `flood_optax.scale_by_flood`.
      every_k: micro-batches per window, a positive int or a schedule from the window's
        number to one. Under `optax.inject_hyperparams` name it in ``static_args``.
      shape: how to bend, see `flood_optax.shapes`.
      axis_name: mapped axis or axes over which ``value`` is averaged, see
        `flood_optax.scale_by_flood`.
      should_skip_update_fn: (gradients, window, params) -> (skip, state) as in
        `optax.MultiSteps`; a skipped micro-batch leaves no trace. With
        `optax.skip_not_finite` a value that is not finite skips too.
      accumulator_dtype: a real float dtype for the mean gradients; None is float32 at
        least. bfloat16 halves their memory, and rounds every mean once. Complex
        gradients keep theirs.

    Returns:
      A transformation whose state holds a FloodState, which `optax.tree.get` finds by
      its fields. Its update takes

      * ``value``, the raw loss, a real scalar; ``loss`` where ``value`` is not given.
        ``loss`` reaches ``inner`` as it is, if it was given: a line search, which takes
        no argument that ``value_fn`` does not know, refuses it.
      * ``weight``, what this loss counts (its number of examples or tokens), a
        non-negative real scalar, 1 by default: over ``axis_name`` as in
        `flood_optax.scale_by_flood`, and over the window gradients and losses are means
        weighted by the sum of it over the devices. What has weight 0 leaves no trace,
        NaN included, but takes its place in the window. A window of weight 0 emits
        nothing: no step of ``inner``, no count.
      * ``flush``, a boolean scalar, False by default: closes the window after this
        micro-batch, however many it holds, as at the end of an epoch.

      ``inner`` is not handed ``weight`` and ``flush``.

    Raises:
      ValueError: in update if the loss is missing or no scalar, if ``value_fn`` or
        ``grad`` come with accumulation, where they would belong to one micro-batch
        only, or if the state is one of another ``every_k`` than 1.

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
    _check_optimizer(inner)
    inner = optax.with_extra_args_support(inner)
    flood_updates = flooding("flood", level, band, shape)
    windows = accumulation(every_k, should_skip_update_fn, accumulator_dtype)
    # Types of what an update is given, and the dtypes of the inner optimizer's update:
    # to trace it costs more than a step.
    remembered: tuple[Any, list[Any]] = None, []

    def init_fn(params: optax.Params) -> FloodWrapperState:
        inner_state = inner.init(params)
        _refuse_floods_and_windows(inner_state)
        return FloodWrapperState(initial_state(), inner_state, windows.opened(params))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        flush: ArrayLike = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if not isinstance(state, FloodWrapperState):
            refuse_state(FloodWrapperState, state, "flood(inner)")
        before = state
        search = {n: extra_args[n] for n in SEARCH if extra_args.get(n) is not None}
        if search:
            weight = extra_args.get("weight")
            _check_search(search, before.flood_window, axis_name, weight)
        given = batch_loss("flood(inner)", extra_args, axis_name, updates, params)
        ours = {"value", "weight"}
        if extra_args.get("loss") is None:  # most optimizers do not know it
            ours.add("loss")
        handed_on = {n: x for n, x in extra_args.items() if n not in ours}
        batch = windows.add(
            before.flood_window,
            updates,
            given,
            flush=flush,
            number=before.flood_state.flood_step,
            params=params,
        )

        def step() -> tuple[Any, FloodWrapperState]:
            means, loss = batch.means()
            raw = means, search.get("grad")
            both, bent, flood_state = flood_updates(before.flood_state, loss, raw)
            bent_means, grad = both
            extra = handed_on | {"value": bent.value.astype(loss.dtype)}
            if grad is not None:
                extra["grad"] = grad
            if "value_fn" in search:
                check_raw("flood(...).update(value_fn=...)", search["value_fn"])
                extra["value_fn"] = flooded(
                    search["value_fn"], bent.level, axis_name=axis_name, shape=shape
                )
            stepped, inner_state = inner.update(
                bent_means, before.flood_inner_state, params, **extra
            )
            if "value_fn" in search:
                inner_state = _forget_flooded(inner_state, bent)
            return stepped, FloodWrapperState(flood_state, inner_state, batch.closed())

        if batch.emits is True:
            return step()

        leaves, tree = jax.tree.flatten(
            (updates, before.flood_inner_state, params, given.loss)
        )
        types = tree, [*map(jax.typeof, leaves)]

        def emit() -> tuple[Any, FloodWrapperState]:
            nonlocal remembered
            stepped, after = step()
            remembered = types, [x.dtype for x in jax.tree.leaves(stepped)]
            # An inner state may come back in another dtype, as a bf16 moment in
            # float32, which no branch of a cond, and no loop around it, would take.
            # astype knows no key, which needs none.
            inner_state = jax.tree.map(
                lambda new, old: (
                    new
                    if jax.typeof(new).dtype == jax.typeof(old).dtype
                    else jnp.asarray(new).astype(jax.typeof(old).dtype)
                ),
                after.flood_inner_state,
                before.flood_inner_state,
            )
            return stepped, after._replace(flood_inner_state=inner_state)

        def wait() -> tuple[Any, FloodWrapperState]:
            if remembered[0] != types:  # no step was traced or taken before
                jax.eval_shape(emit)
            nothing = _no_update(updates, remembered[1])
            return nothing, before._replace(flood_window=batch.kept())

        if isinstance(batch.emits, Tracer):
            return lax.cond(batch.emits, emit, wait)
        return emit() if batch.emits else wait()  # a cond would compile at every step

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# ---- line searches, which evaluate the loss themselves ----


def _check_search(
    search: dict[str, Any], window: Any, axis_name: AxisName | None, weight: Any
) -> None:
    """A line search compares losses of one batch: those it evaluates, and this one."""
    if window != ():
        raise ValueError(
            "`flood(every_k=..., should_skip_update_fn=...)` cannot use "
            f"`{next(iter(search))}`, which belongs to one micro-batch, got one. "
            "Line searches need the whole batch: `flood(inner, level)`."
        )
    if axis_name is not None and weight is not None and "value_fn" in search:
        raise ValueError(
            "`flood(axis_name=...)` cannot weigh `value_fn` by `weight`, got both. "
            "Give a `value` and a `value_fn` that are the weighted mean over the "
            "devices already, without axis_name and weight."
        )


def _forget_flooded(inner_state: Any, bent: Bent) -> Any:
    """Marks value and gradient that a line search keeps, flooded ones, as unknown.

    `optax.value_and_grad_from_state` takes them for raw ones, unless the value is
    infinite: then it evaluates the loss function, as it does at the first step.
    """

    def kept(node: Any) -> bool:
        return {"value", "grad"} <= set(getattr(node, "_fields", ()))

    def forget(node: Any) -> Any:
        if not kept(node):
            return node
        off = bent.level == -jnp.inf  # nothing was flooded
        return node._replace(value=jnp.where(off, node.value, jnp.inf))

    return jax.tree.map(forget, inner_state, is_leaf=kept)


# ---- windows ----


def _no_update(updates: Any, dtypes: list[Any]) -> Any:
    """Zeros of the dtypes that the inner optimizer gives; keys and float0 have none."""
    numeric = [jnp.issubdtype(dtype, np.number) for dtype in dtypes]
    of_numbers = tuple(itertools.compress(dtypes, numeric))
    zeros = functools.partial(_zeros, dtypes=of_numbers)
    return on_chosen(zeros, updates, numeric)[0]


@functools.partial(one_dispatch, static="dtypes")
def _zeros(leaves: list[Any], *, dtypes: tuple[Any, ...]) -> tuple[list[jax.Array]]:
    return ([*map(jnp.zeros_like, leaves, dtypes)],)


# ---- what may be wrapped ----


def _check_optimizer(inner: Any) -> None:
    if isinstance(inner, optax.MultiSteps):
        raise TypeError(f"`flood(inner)` {_WINDOWS.format('MultiSteps')}")
    if not (callable(getattr(inner, "init", None)) and hasattr(inner, "update")):
        rule = "be an optax.GradientTransformation"
        raise TypeError(must("flood(inner)", rule, type(inner).__name__))


_WINDOWS = (
    "must be the optimizer itself, got {}, which would flood each micro-batch: use "
    "`flood(optimizer, level, every_k=k)`."
)


def _refuse_floods_and_windows(inner_state: Any) -> None:
    """Looks for them in the state, where no wrapper around them hides them."""
    windows = optax.MultiStepsState, optax.ApplyEvery
    kinds = (FloodState, *windows)
    for node in jax.tree.leaves(inner_state, is_leaf=lambda x: isinstance(x, kinds)):
        found = f"a {type(node).__name__} in the state of inner"
        if isinstance(node, windows):
            raise TypeError(f"`flood(inner)` {_WINDOWS.format(found)}")
        if isinstance(node, FloodState):
            raise TypeError(
                f"`flood(inner)` must not flood itself, got {found}: two floods undo "
                "each other. Use `flood(optimizer, level)` around the bare optimizer, "
                "or `scale_by_flood(level)` first in its chain."
            )
