"""The gradient penalty L + strength/2 |grad L|^2, and how flooding amounts to it.

A pair of flooded SGD steps, one down and one up, is one step along a finite difference
of the penalty's gradient H g. At the level, many pairs follow that direction along the
level set. docs/theory.md says where this ends: momentum, Adam, soft shapes. All of it
takes the raw loss; flood the penalised one, or its gradient, afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from flood_optax.checks import check_number, check_one_of, check_raw, check_that
from flood_optax.curvature import (
    LossOfParams,
    dot,
    gradient_of,
    loss_of_params,
    magnitude,
    norm,
)
from flood_optax.precision import wide

__all__ = ["level_set_drift", "objective", "pair_displacement", "value_and_grad"]

NON_NEGATIVE = "non-negative and finite"
Method = Literal["exact", "forward", "backward"]


def objective(
    loss_fn: Callable[..., Any], strength: ArrayLike, *, has_aux: bool = False
) -> Callable[..., Any]:
    r"""Adds the squared gradient norm to a loss.

    :math:`L(\theta) + \frac{\lambda}{2} |\nabla L(\theta)|^2` with L = ``loss_fn``,
    :math:`\lambda` = ``strength``, the gradient taken in the first argument over all
    leaves. Its own gradient, by double backward, is :math:`g + \lambda H g`, with g and
    H the gradient and Hessian of L; `value_and_grad` computes the same at less cost.
    Where g = 0 value and gradient are those of L. A NaN loss or gradient gives NaN.

    Args:
      loss_fn: returns a scalar loss of a real float dtype, or (loss, aux) with
        ``has_aux``; its first argument is any tree of arrays of real
        floats, of 16 bits at least.
      strength: a scalar, at least 0; an array or tracer may change without
        recompilation. 0 is the loss itself.
      has_aux: whether ``loss_fn`` returns (loss, aux).

    Returns:
      A function of the same arguments as ``loss_fn`` that returns the penalised loss in
      the dtype of the loss, with ``has_aux`` (penalised loss, aux). Squares are summed
      in float32 at least.

    Examples:
      >>> import jax
      >>> penalised = objective(lambda x: x**3, strength=0.5)
      >>> print(penalised(2.0))  # 8 + 0.25 * 12**2
      44.0
      >>> print(jax.grad(penalised)(2.0))  # 12 + 0.5 * 12 * 12
      84.0

    References:
      Barrett and Dherin, Implicit Gradient Regularization, ICLR 2021, section 3,
      https://arxiv.org/abs/2009.11162
    """
    call = "penalty.objective"
    check_raw(f"{call}(loss_fn)", loss_fn)
    check_number(f"{call}(strength=...)", strength, NON_NEGATIVE)

    @functools.wraps(loss_fn)
    def penalised_fn(params: optax.Params, *args: Any, **kwargs: Any) -> Any:
        loss_of = loss_of_params(call, loss_fn, params, has_aux, *args, **kwargs)
        (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        unit = magnitude(gradient)
        parts = jax.tree.map(lambda g: wide(g) / unit, gradient)
        penalty = 0.5 * wide(strength) * unit * dot(parts, parts) * unit
        value = (loss.astype(penalty.dtype) + penalty).astype(loss.dtype)
        return (value, aux) if has_aux else value

    return penalised_fn


def value_and_grad(
    loss_fn: Callable[..., Any],
    strength: ArrayLike,
    *,
    method: Method = "exact",
    radius: ArrayLike | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""Computes the raw loss and the gradient of the penalised one.

    With L = ``loss_fn``, g its gradient and H its Hessian in the first argument,
    :math:`\lambda` = ``strength``, a = ``radius``:

    * ``"exact"``: :math:`g + \lambda H g`, H g by forward over reverse mode;
    * ``"forward"``: :math:`g + \frac{\lambda}{a} [\nabla L(\theta + a g) - g]`;
    * ``"backward"``: :math:`g + \frac{\lambda}{a} [g - \nabla L(\theta - a g)]`.

    The step a g is not normalised. Without ``radius`` it is :math:`\lambda g`, and the
    forward difference is then :math:`\nabla L(\theta + \lambda g)`, unnormalised SAM.
    The differences are :math:`O(\lambda a)` from the exact gradient; a pair of flooded
    SGD steps follows them, see `pair_displacement`. In 16-bit floats a small step
    drowns in rounding: use ``"exact"``. Where g = 0 every method gives 0, and
    ``strength`` 0 gives g. A NaN loss or gradient gives NaN.

    Args:
      loss_fn, strength, has_aux: as in `objective`.
      method: "exact", "forward" or "backward".
      radius: a scalar above 0, for the differences only; None means ``strength``.

    Returns:
      A function of the same arguments as ``loss_fn`` that returns (loss, gradient),
      with ``has_aux`` ((loss, aux), gradient), as ``jax.value_and_grad`` does. The loss
      is the raw one, what `flood_optax.scale_by_flood` wants as value; the gradient has
      the structure, shapes and dtypes of the first argument.

    Examples:
      >>> loss_fn = lambda x: x**3
      >>> loss, grad = value_and_grad(loss_fn, 0.5)(2.0)
      >>> print(loss, grad)  # 12 + 0.5 * 12 * 12
      8.0 84.0
      >>> loss, grad = value_and_grad(loss_fn, 0.5, method="forward")(2.0)
      >>> print(loss, grad)  # 3 * (2 + 0.5 * 12)**2
      8.0 192.0

    References:
      Karakida et al., Understanding Gradient Regularization in Deep Learning, ICML
      2023, section 3, https://arxiv.org/abs/2210.02720
    """
    call = "penalty.value_and_grad"
    check_raw(f"{call}(loss_fn)", loss_fn)
    check_number(f"{call}(strength=...)", strength, NON_NEGATIVE)
    check_one_of(f"{call}(method=...)", method, ("exact", "forward", "backward"))
    if radius is not None:
        check_number(f"{call}(radius=...)", radius, "positive and finite")
        rule, got = 'be None for method="exact"', f"{radius}: it takes no step"
        check_that(method != "exact", f"{call}(radius=...)", rule, got)

    @functools.wraps(loss_fn)
    def value_and_grad_fn(params: optax.Params, *args: Any, **kwargs: Any) -> Any:
        loss_of = loss_of_params(call, loss_fn, params, has_aux, *args, **kwargs)
        if method == "exact":
            (loss, aux), gradient, product = _hessian_times_gradient(loss_of, params)
            penalised = _add(gradient, strength, product)
        else:
            (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
            sign = 1 if method == "forward" else -1
            step = wide(strength if radius is None else radius)  # unsigned has no minus
            moved = gradient_of(loss_of, _add(params, sign * step, gradient))
            if radius is None and method == "forward":
                penalised = moved  # g + (moved - g) would be that to rounding only
            else:
                # 0 / 0 is no weight where strength is 0
                weight = 1 if radius is None else wide(strength) / step
                difference = jax.tree.map(jnp.subtract, moved, gradient)
                penalised = _add(gradient, sign * weight, difference)
        return ((loss, aux) if has_aux else loss), penalised

    return value_and_grad_fn


def pair_displacement(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    learning_rate: ArrayLike,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> optax.Updates:
    r"""Computes where one SGD step down and one step up lead.

    With :math:`\theta` = ``params``, :math:`\eta` = ``learning_rate``, g the gradient:
    :math:`\theta' = \theta - \eta g(\theta)`, :math:`\theta'' = \theta' + \eta
    g(\theta')`, and

    .. math:: \theta'' - \theta = -\eta^2 \, \frac{g(\theta) - g(\theta - \eta
        g(\theta))}{\eta} = -\eta^2 H g + O(\eta^3),

    exactly minus :math:`\eta^2` times the backward difference of radius :math:`\eta` in
    `value_and_grad`. Such a pair is what flooded SGD does when the loss crosses the
    level; a pair up then down gives the forward difference. Where g = 0 it is 0. NaN
    gives NaN.

    Args:
      loss_fn, params, args, has_aux, kwargs: the raw loss and what it is called
        with, as in `flood_optax.sharpness.gradient_norm`.
      learning_rate: a scalar, at least 0.

    Returns:
      The displacement, a tree like ``params`` in structure, shapes and dtypes.

    Examples:
      >>> print(pair_displacement(lambda x: x**3, 2.0, 0.125))  # 2 -> 0.5 -> 0.59375
      -1.40625

    References:
      Holland and Nakatani, NeurIPS 2024, appendix B.1,
      https://arxiv.org/abs/2310.10006; Karakida et al., ICML 2023,
      https://arxiv.org/abs/2210.02720
    """
    call = "penalty.pair_displacement"
    check_number(f"{call}(learning_rate=...)", learning_rate, NON_NEGATIVE)
    loss_of = loss_of_params(call, loss_fn, params, has_aux, *args, **kwargs)
    eta = wide(learning_rate)
    before = gradient_of(loss_of, params)
    after = gradient_of(loss_of, _add(params, -eta, before))

    def moved(new: jax.Array, old: jax.Array) -> jax.Array:
        change = wide(new - old)
        return (eta.astype(change.dtype) * change).astype(old.dtype)

    return jax.tree.map(moved, after, before)


def level_set_drift(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> optax.Updates:
    r"""Computes the mean motion of flooded SGD along the level set.

    :math:`-\frac12 P_T H g` with :math:`P_T = I - g g^\top / |g|^2`, g and H the
    gradient and Hessian of ``loss_fn`` at ``params``. Flooded SGD at the level moves by
    this times :math:`\eta^2` per step in the mean, :math:`\eta` the learning rate: half
    a pair, whose part along g the level takes back. So with :math:`\tau` = steps
    :math:`\eta^2 / 2` it follows :math:`d\theta/d\tau = -P_T H g`, which lowers
    :math:`|g|^2` at constant loss, towards the flattest points of the level set.

    For SGD on a fixed batch only; docs/theory.md has the numbers for other rules.
    Where g = 0 the drift is 0. NaN gives NaN.

    Args:
      loss_fn, params, args, has_aux, kwargs: the raw loss and what it is called
        with, as in `flood_optax.sharpness.gradient_norm`.

    Returns:
      The drift, a tree like ``params`` in structure, shapes and dtypes.

    Examples:
      >>> import jax.numpy as jnp
      >>> def loss_fn(w):  # H = diag(1, 4); g = (1, 2), H g = (1, 8) at (1, 0.5)
      ...     return 0.5 * w[0] ** 2 + 2.0 * w[1] ** 2
      >>> print(level_set_drift(loss_fn, jnp.array([1.0, 0.5])).round(3))
      [ 1.2 -0.6]

    References:
      The flow of Karakida et al., ICML 2023, https://arxiv.org/abs/2210.02720, held on
      a level set; derived and measured in docs/theory.md.
    """
    call = "penalty.level_set_drift"
    loss_of = loss_of_params(call, loss_fn, params, has_aux, *args, **kwargs)
    _, gradient, product = _hessian_times_gradient(loss_of, params)
    length = norm(gradient)
    length = jnp.where(length > 0, length, jnp.ones_like(length))
    normal = jax.tree.map(lambda g: wide(g) / length, gradient)
    along = dot(normal, product)

    def drift(product: jax.Array, normal: jax.Array) -> jax.Array:
        return (-0.5 * (wide(product) - along * normal)).astype(product.dtype)

    return jax.tree.map(drift, product, normal)


def _hessian_times_gradient(
    loss_of: LossOfParams, params: optax.Params
) -> tuple[tuple[jax.Array, Any], optax.Updates, optax.Updates]:
    """Evaluates (loss, aux), g and H g."""
    result, gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    of_params = functools.partial(gradient_of, loss_of)
    return result, gradient, jax.jvp(of_params, (params,), (gradient,))[1]


def _add(a: optax.Params, factor: ArrayLike, b: optax.Updates) -> optax.Params:
    """The tree a + factor * b, each leaf in the dtype of b."""

    def add(x: jax.Array, y: jax.Array) -> jax.Array:
        y_wide = wide(y)
        step = jnp.asarray(factor, y_wide.dtype) * y_wide
        return (wide(x) + step).astype(y.dtype)

    return jax.tree.map(add, a, b)
