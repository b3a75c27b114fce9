"""The loss form: flooding as a change of the objective, before `jax.grad`."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flood_optax.checks import (
    broadcast_level,
    check_level,
    check_scalar_level,
    loss_mask,
    real_array,
    scalar_loss,
    segments,
)
from flood_optax.shapes import Shape, bend, compare_dtype, reflect

AxisName = str | tuple[str, ...]


class FloodInfo(NamedTuple):
    """What happened at the level: what to log beside the flooded loss.

    Attributes:
      loss: the raw loss, a scalar of the loss's dtype; with axis_name the global mean.
      level: the level it was compared with, a scalar, float32 at least.
      multiplier: the factor on the gradient: for `reflect` 1 at or above the level, -1
        below it, NaN for a NaN loss; a scalar, float32 at least.
      aux: what loss_fn returned beside the loss, None without has_aux.
    """

    loss: jax.Array
    level: jax.Array
    multiplier: jax.Array
    aux: Any


def flood_loss(
    loss: ArrayLike, level: ArrayLike, *, shape: Shape = reflect()
) -> jax.Array:
    r"""Floods each entry of an array of losses.

    :math:`\tilde\ell = \phi(\ell - b) + b` with :math:`\ell` = ``loss``, b = ``level``
    and :math:`\phi` = ``shape``; for the default, :math:`|\ell - b| + b`. Above the
    level the result is the loss, bit for bit. At a tie the gradient descends. A NaN
    loss gives NaN and a NaN gradient. Where the level is -inf the loss is returned
    untouched. No gradient flows into the level.

    For the mean over a batch, `flood_mean` says over what to average before bending.

    Args:
      loss: real floats of any shape; 16-bit losses are compared in float32.
      level: a number or an array that broadcasts to the shape of ``loss``.
      shape: how to bend, see `flood_optax.shapes`.

    Returns:
      The flooded losses, of the shape and dtype of ``loss``.

    Raises:
      TypeError: if ``loss`` is not of a real float dtype or ``level`` not a number.
      ValueError: if ``level`` does not broadcast to ``loss``, is NaN or +inf.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> print(flood_loss(jnp.array([0.75, 0.25, 0.125]), 0.25))
      [0.75  0.25  0.375]
      >>> print(jax.grad(lambda x: flood_loss(x**3, 0.25))(0.5))
      -0.75

    References:
      Ishida et al., ICML 2020, section 3, https://arxiv.org/abs/2002.08709
    """
    losses = real_array(loss, "flood_loss(loss)")
    check_level(level, "flood_loss(level=...)")
    levels = broadcast_level(level, losses.shape, "flood_loss(level=...)")
    return _flood(losses, losses, levels, shape)


def flood_mean(
    losses: ArrayLike,
    level: ArrayLike,
    *,
    over: Literal["batch", "example", "segment"] = "batch",
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    where: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    shape: Shape = reflect(),
) -> jax.Array:
    r"""Floods the mean of losses over a partition of the batch.

    With :math:`\phi` = ``shape`` and b = ``level``, for n counted losses:

    * ``over="batch"``: :math:`\phi(\bar\ell - b) + b`, flooding;
    * ``over="example"``: :math:`\frac1n\sum_i \phi(\ell_i - b_i) + b_i`, iFlood and
      AdaFlood, SoftAD with the soft shape;
    * ``over="segment"``: :math:`\sum_k \frac{n_k}{n}[\phi(\bar\ell_k - b_k) + b_k]`,
      per class or per task; empty segments count nothing.

    These are different objectives: flooding examples or devices one by one bounds
    flooding the batch from above (Jensen). At a tie a group descends. A NaN loss that
    counts gives NaN. Means are taken in float32 at least.

    Args:
      losses: real floats of any shape, one entry per example (and step, ...).
      level: a scalar for "batch"; broadcasts to ``losses`` for "example", to
        (num_segments,) for "segment". -inf means off.
      over: what is averaged before it is bent.
      segment_ids: for "segment", integers in [0, num_segments), shaped as ``losses``.
        An id out of range raises if the ids are a NumPy array, and gives NaN otherwise.
      num_segments: for "segment", their number, a static int.
      where: boolean mask shaped as ``losses``; entries that are False count nowhere,
        even if NaN. If all are masked the result is NaN; for a NumPy mask, which is
        known at trace time, that is an error unless ``axis_name`` is given.
      axis_name: mapped axis or axes (shard_map, pmap) over which the batch is split.
        The value is then that of the global batch and the gradient is this device's
        share, whose mean over devices is the gradient of the whole, masks and
        segments of uneven size included.
      shape: how to bend, see `flood_optax.shapes`.

    Returns:
      A scalar of the dtype of ``losses``.

    Raises:
      TypeError: if ``losses`` are no real floats, ``level`` no number, ``where`` not
        boolean or ``segment_ids`` not integers.
      ValueError: if ``over`` is unknown, segment_ids or num_segments are missing or
        out of place, a shape does not fit, or the batch is empty.

    Examples:
      >>> import jax.numpy as jnp
      >>> losses = jnp.array([0.01, 0.02, 0.2, 0.3])
      >>> print(f"{flood_mean(losses, 0.1):.4f}")
      0.1325
      >>> print(f"{flood_mean(losses, 0.1, over='example'):.4f}")
      0.2175
      >>> classes = jnp.array([0, 0, 1, 1])
      >>> per_class = flood_mean(
      ...     losses, 0.1, over="segment", segment_ids=classes, num_segments=2
      ... )
      >>> print(f"{per_class:.4f}")
      0.2175

    References:
      Ishida et al., ICML 2020, section 3, https://arxiv.org/abs/2002.08709;
      Xie et al., iFlood, ICLR 2022; Bae et al., AdaFlood, TMLR 2024.
    """
    losses = real_array(losses, "flood_mean(losses)")
    check_level(level, "flood_mean(level=...)")
    if over not in ("batch", "example", "segment"):
        raise ValueError(
            '`flood_mean(over=...)` must be "batch", "example" or "segment", '
            f"got {over!r}."
        )
    if over != "segment" and (segment_ids is not None or num_segments is not None):
        raise ValueError(
            '`flood_mean(segment_ids=..., num_segments=...)` need over="segment", '
            f"got over={over!r}."
        )
    mask = loss_mask(where, losses.shape, split=axis_name is not None)
    counted = jnp.ones(losses.shape, bool) if mask is None else mask
    precise = losses.astype(compare_dtype(losses.dtype))
    if mask is not None:
        precise = jnp.where(mask, precise, jnp.zeros_like(precise))
    counts = counted.astype(precise.dtype)
    mean_of = functools.partial(_share, axis_name=axis_name)

    if over == "batch":
        check_scalar_level(level, "flood_mean(level=...)")
        mean = mean_of(precise.sum(), counts.sum())
        value = _flood(mean, _whole(mean, axis_name), jnp.asarray(level), shape)
    elif over == "example":
        levels = broadcast_level(level, losses.shape, "flood_mean(level=...)")
        bent = _flood(precise, precise, levels, shape)
        mean = mean_of(jnp.where(counted, bent, 0 * counts).sum(), counts.sum())
        value = _with_slope(
            mean, _like(_whole(mean, axis_name), mean), jnp.ones_like(mean)
        )
    else:
        ids, number = segments(segment_ids, num_segments, losses.shape)
        levels = broadcast_level(level, (number,), "flood_mean(level=...)")
        sums = jax.ops.segment_sum(precise.ravel(), ids.ravel(), number)
        sizes = jax.ops.segment_sum(counts.ravel(), ids.ravel(), number)
        total = _whole(counts.sum(), axis_name)
        sizes = _whole(sizes, axis_name)
        means = sums / jnp.where(sizes > 0, sizes, jnp.ones_like(sizes))
        bent = _flood(means, _whole(means, axis_name), levels, shape)
        value = jnp.where(sizes > 0, sizes / total * bent, jnp.zeros_like(bent)).sum()
        lost = jnp.any(counted & ((ids < 0) | (ids >= number)))
        valid = jnp.where(lost | (total == 0), jnp.zeros_like(value), 1)
        value = value * (valid / valid)  # NaN, without a NaN in a branch not taken
    return value.astype(losses.dtype)


def flooded(
    loss_fn: Callable[..., Any],
    level: ArrayLike,
    *,
    has_aux: bool = False,
    axis_name: AxisName | None = None,
    shape: Shape = reflect(),
    return_info: bool = False,
) -> Callable[..., Any]:
    r"""Wraps a loss function so that its gradient floods.

    :math:`\tilde L(\theta) = \phi(L(\theta) - b) + b` with L = ``loss_fn``, b =
    ``level`` and :math:`\phi` = ``shape``; for the default :math:`|L - b| + b`. The
    gradient is that of L times m = :math:`\phi'(L - b)`: plain at or above the level,
    negated below it, NaN for a NaN loss. ``scale_by_flood`` in front of the optimizer
    does the same, bit for bit.

    ``loss_fn`` must return the mean over the whole batch. Where it sees a part only, on
    a mapped axis name the axis; over accumulated micro-batches use
    ``flood_optax.flood(inner, level, every_k=k)`` instead.

    Args:
      loss_fn: returns a scalar loss of a real float dtype, or (loss, aux) with
        ``has_aux``. Any arguments; called once per call.
      level: a scalar, b; an array or tracer may change without recompilation. -inf
        means off. No gradient flows into it.
      has_aux: whether ``loss_fn`` returns (loss, aux).
      axis_name: mapped axis or axes (shard_map, pmap) over which the batch is split.
        The value is then the global flooded loss, the gradient this device's share:
        average it over the devices as usual. Under ``shard_map`` with
        ``check_vma=True`` make replicated parameters varying first (``lax.pcast``), or
        JAX has summed their gradients already.
      shape: how to bend, see `flood_optax.shapes`.
      return_info: whether to return (flooded loss, FloodInfo) instead.

    Returns:
      A function of the same arguments as ``loss_fn`` that returns the flooded loss,
      with ``has_aux`` (flooded loss, aux), and with ``return_info`` (flooded loss,
      FloodInfo(loss, level, multiplier, aux)), to differentiate with has_aux=True.

    Raises:
      TypeError: if ``loss_fn`` is not callable, ``level`` not a number, the loss not a
        real float, or a tuple without ``has_aux``.
      ValueError: if ``level`` is NaN, +inf or not a scalar, or the loss not a scalar.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> def loss_fn(w, x):
      ...     return jnp.mean((w * x - 1.0) ** 2)
      >>> w, x = 0.9, jnp.array([1.0, 1.5])
      >>> print(f"{loss_fn(w, x):.4f} {jax.grad(loss_fn)(w, x):.4f}")
      0.0662 0.4250
      >>> flooded_fn = flooded(loss_fn, level=0.1, return_info=True)
      >>> (value, info), grad = jax.value_and_grad(flooded_fn, has_aux=True)(w, x)
      >>> print(f"{value:.4f} {grad:.4f} {info.loss:.4f} {info.multiplier:.0f}")
      0.1338 -0.4250 0.0662 -1

    References:
      Ishida et al., ICML 2020, section 3 and algorithm 1,
      https://arxiv.org/abs/2002.08709
    """
    if not callable(loss_fn):
        raise TypeError(
            f"`flooded(loss_fn)` must be callable, got {type(loss_fn).__name__}: "
            "flood a number with `flood_loss` or `flood_mean`."
        )
    if callable(level):
        raise TypeError(
            "`flooded(level=...)` must be a number or an array, got a schedule: "
            "call it with the step and pass the result."
        )
    check_scalar_level(level, "flooded(level=...)")

    @functools.wraps(loss_fn)
    def flooded_fn(*args: Any, **kwargs: Any) -> Any:
        result = loss_fn(*args, **kwargs)
        loss, aux = _split(result, has_aux)
        loss = scalar_loss(
            loss,
            "flooded(loss_fn)'s loss",
            "`flood_mean(losses, level)` says over what to average.",
        )
        bound = jnp.asarray(level)
        raw = loss
        if axis_name is not None:
            precise = loss.astype(compare_dtype(loss.dtype))
            raw = _whole(precise, axis_name).astype(loss.dtype)
        value = _flood(loss, raw, bound, shape)
        if return_info:
            _, multiplier = bend(raw, bound, shape)
            bound = bound.astype(multiplier.dtype)
            info = FloodInfo(*lax.stop_gradient((raw, bound, multiplier)), aux)
            return value, info
        return (value, aux) if has_aux else value

    return flooded_fn


def relax_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    level: ArrayLike,
    *,
    epoch: ArrayLike,
    upper: float = 1.0,
) -> jax.Array:
    r"""Floods in even epochs and flattens predictions in odd ones (RelaxLoss).

    With L the mean cross-entropy and b = ``level``:

    * even ``epoch``: :math:`|L - b| + b`, flooding;
    * odd ``epoch``, L > b: L;
    * odd ``epoch`` otherwise: :math:`\frac1n\sum_i (1 - c_i) H(t_i, p_i) - \ell_i`,
      ascent on the losses, and where a prediction is wrong (:math:`c_i = 0`) descent on
      the cross-entropy H with the flattened target :math:`t_i`: on the label
      min(:math:`p_i`, ``upper``), the rest spread evenly over the other classes.

    Loss distributions of training and unseen examples so come to overlap, against
    membership inference. No gradient flows into level and targets; NaN gives NaN.

    Args:
      logits: real floats [..., num_classes], two classes at least.
      labels: integers [...]; one that is no class gives NaN.
      level: a scalar; -inf means off, in all epochs.
      epoch: an integer scalar, from 0; a traced one is fine.
      upper: in (0, 1], the largest probability that a target keeps on its label.

    Returns:
      A scalar of the dtype of ``logits``.

    Raises:
      TypeError: if ``logits`` are no real floats, ``labels`` or ``epoch`` no integers.
      ValueError: if a shape does not fit, or ``level`` or ``upper`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]])  # L = 0.767
      >>> labels = jnp.array([0, 2])
      >>> print([f"{relax_loss(logits, labels, 1.0, epoch=e):.3f}" for e in (0, 1)])
      ['1.233', '-0.211']

    References:
      Chen, Yu and Fritz, RelaxLoss, ICLR 2022, https://arxiv.org/abs/2207.05801
    """
    logits = real_array(logits, "relax_loss(logits)")
    labels, epoch = jnp.asarray(labels), jnp.asarray(epoch)
    for name, given in (("labels", labels), ("epoch", epoch)):
        if not jnp.issubdtype(given.dtype, jnp.integer):
            raise TypeError(
                f"`relax_loss({name})` must be integers, got {given.dtype}."
            )
    if epoch.shape != () or logits.shape[:-1] != labels.shape or labels.size == 0:
        raise ValueError(
            "`relax_loss(logits, labels, epoch=...)` must be of shapes [..., "
            f"num_classes], [...] and (), got {logits.shape}, {labels.shape} and "
            f"{epoch.shape}."
        )
    check_scalar_level(level, "relax_loss(level=...)")
    classes = logits.shape[-1]
    if classes < 2 or not 0 < upper <= 1:
        raise ValueError(
            "`relax_loss(logits, upper=...)` needs two classes and 0 < upper <= 1, got "
            f"{classes} and {upper}."
        )
    log_probs = jax.nn.log_softmax(logits.astype(compare_dtype(logits.dtype)))
    is_label = jax.nn.one_hot(labels, classes, dtype=bool)
    known = is_label.any(-1).astype(log_probs.dtype)
    losses = -jnp.where(is_label, log_probs, 0).sum(-1) * (known / known)
    kept = lax.stop_gradient(jnp.minimum(jnp.exp(-losses), upper))[..., None]
    targets = jnp.where(is_label, kept, (1 - kept) / (classes - 1))
    wrong = log_probs.argmax(-1) != labels
    flat = jnp.where(wrong, -(targets * log_probs).sum(-1), 0) - losses
    loss = losses.mean()
    odd = jnp.where(loss > jnp.asarray(level, loss.dtype), loss, flat.mean())
    value = jnp.where(epoch % 2 == 0, flood_loss(loss, level), odd)
    return value.astype(logits.dtype)


@jax.custom_jvp
def _with_slope(loss: jax.Array, value: jax.Array, slope: jax.Array) -> jax.Array:
    """`value`, whose derivative with respect to `loss` is `slope`."""
    del loss, slope
    return value


def _slope_times(tangent: jax.Array, out: jax.Array, *primals: jax.Array) -> jax.Array:
    del out
    return primals[2] * tangent


_with_slope.defjvps(_slope_times, None, None)


def _flood(
    share: jax.Array, whole: jax.Array, level: jax.Array, shape: Shape
) -> jax.Array:
    """Floods `whole` and differentiates `share`; on one device they are the same."""
    level = lax.stop_gradient(level)
    value, slope = (x.astype(share.dtype) for x in bend(whole, level, shape))
    if share is not whole:
        value, slope = _like(value, share), _like(slope, share)
    return _with_slope(share, lax.stop_gradient(value), slope)


def _share(total: jax.Array, count: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """This device's share of the mean: the mean of the shares is the global mean."""
    return total / _whole(count, axis_name)


def _whole(share: jax.Array, axis_name: AxisName | None) -> jax.Array:
    return share if axis_name is None else lax.pmean(share, axis_name)


def _like(x: jax.Array, share: jax.Array) -> jax.Array:
    """Returns x, typed as varying over the mapped axes over which `share` varies."""
    return jnp.where(lax.stop_gradient(share) > 0, x, x)


def _split(result: Any, has_aux: bool) -> tuple[Any, Any]:
    kind = type(result).__name__
    if not has_aux:
        if isinstance(result, tuple):
            raise TypeError(
                "`flooded(loss_fn)` returned a tuple: pass `has_aux=True` if it is "
                "(loss, aux)."
            )
        return result, None
    if not (isinstance(result, tuple) and len(result) == 2):  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(
            "`flooded(loss_fn, has_aux=True)` needs loss_fn to return (loss, aux), "
            f"got {kind}."
        )
    return result  # pyright: ignore[reportUnknownVariableType]
