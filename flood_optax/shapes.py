"""How the loss is bent at the level: a function phi of r = loss - level, and phi'.

Every method of the family replaces a loss by ``phi(loss - level) + level``. The
gradient is then the plain one times the multiplier ``m = phi'(loss - level)``.
"""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class Shape(NamedTuple):
    r"""A function :math:`\phi(r)` of the residual r = loss - level, and its derivative.

    Both functions are elementwise, keep shape and dtype of r, and must be traceable.
    Wherever ``value(r) == r`` the flooded loss is the loss itself, bit for bit. The
    gradient of a flooded loss is taken from ``multiplier``, its second derivative from
    the derivative of ``multiplier``.

    Attributes:
      value: :math:`\phi`, with :math:`\phi(r) \to \infty` as r grows.
      multiplier: :math:`m = \phi'`; NaN at NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flood_optax import Shape, flood_loss
      >>> gentle = Shape(
      ...     value=lambda r: jnp.where(r >= 0, r, -0.5 * r),
      ...     multiplier=lambda r: jnp.where(r >= 0, 1.0, -0.5),
      ... )
      >>> print(flood_loss(jnp.array([1.0, 0.125]), 0.25, shape=gentle))
      [1.     0.3125]
    """

    value: Callable[[jax.Array], jax.Array]
    multiplier: Callable[[jax.Array], jax.Array]


def reflect() -> Shape:
    r"""Reflects the loss at the level, which is flooding.

    :math:`\phi(r) = |r|`, m = 1 for r >= 0 and -1 below. At a tie, r == 0, the step
    descends (m = 1), as ``jax.grad`` of ``jnp.abs`` does. NaN gives NaN in both.

    Returns:
      The shape of Ishida et al.

    Examples:
      >>> import jax.numpy as jnp
      >>> shape = reflect()
      >>> print(shape.value(jnp.array([-0.2, 0.0, 1.5])))
      [0.2 0.  1.5]
      >>> print(shape.multiplier(jnp.array([-0.2, 0.0, 1.5])))
      [-1.  1.  1.]

    References:
      Ishida et al., Do We Need Zero Training Loss After Achieving Zero Training
      Error?, ICML 2020, section 3, https://arxiv.org/abs/2002.08709
    """
    return Shape(_reflect_value, _reflect_multiplier)


def soft(scale: float | jax.Array = 1.0) -> Shape:
    r"""Bends the loss smoothly around the level (SoftAD).

    :math:`\phi(r) = s^2(\sqrt{1 + (r/s)^2} - 1)` and
    :math:`m = r / \sqrt{1 + (r/s)^2}`, with s = ``scale``. The multiplier is 0 at the
    level, so a tie stands still; it tends to s above and to -s below, and is r close
    to the level. It is not the identity above the level: the step size is scaled by m.
    NaN gives NaN in both, m(inf) = s.

    Args:
      scale: s > 0, in units of the loss.

    Returns:
      The shape of SoftAD in the scaling of its authors' code.

    Raises:
      ValueError: if ``scale`` is a number that is not positive and finite.
      TypeError: if ``scale`` is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> r = jnp.array([-1.0, 0.5, 5.0])
      >>> [f"{m:.4f}" for m in soft().multiplier(r)]
      ['-0.7071', '0.4472', '0.9806']
      >>> [f"{m:.4f}" for m in soft(scale=3.0).multiplier(r)]
      ['-0.9487', '0.4932', '2.5725']

    References:
      Holland and Nakatani, Soft ascent-descent as a stable and flexible alternative
      to flooding, NeurIPS 2024, https://arxiv.org/abs/2310.10006
    """
    _check_parameter("soft(scale=...)", scale, "positive", lambda s: s > 0)

    def value(r: jax.Array) -> jax.Array:
        s = jnp.asarray(scale, r.dtype)
        x = r / s
        near = jnp.clip(x, -1, 1)  # the form without cancellation
        square_root = jnp.hypot(jnp.ones_like(x), x)
        small = near * near / (1 + jnp.sqrt(1 + near * near))
        return s * s * jnp.where(jnp.abs(x) < 1, small, square_root - 1)

    def multiplier(r: jax.Array) -> jax.Array:
        s = jnp.asarray(scale, r.dtype)
        return s * jnp.sin(jnp.arctan(r / s))  # = r / sqrt(1 + (r/s)^2), s at r = inf

    return Shape(value, multiplier)


def pause() -> Shape:
    r"""Stops training below the level, without ascent.

    :math:`\phi(r) = \max(r, 0)`, m = 1 for r >= 0 and 0 below. At a tie the step
    descends (m = 1). NaN gives NaN in both.

    Returns:
      The restricted form used for GAN discriminators and free bits.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(pause().multiplier(jnp.array([-0.2, 0.0, 1.5])))
      [0. 1. 1.]

    References:
      Yahiro, Ishida and Yokoya, Flooding Regularization for Stable Training of
      Generative Adversarial Networks, https://arxiv.org/abs/2311.00318
    """
    return Shape(_pause_value, _pause_multiplier)


def asymmetric(
    ascent: float | jax.Array = 1.0, dead_band: float | jax.Array = 0.0
) -> Shape:
    r"""Ascends with another strength than it descends, after a dead band.

    With a = ``ascent`` and d = ``dead_band``: :math:`\phi(r) = r` and m = 1 for
    r >= -d; below, :math:`\phi(r) = -a (r + d) - d` and m = -a. At the tie r == -d the
    step descends. NaN gives NaN in both.

    Args:
      ascent: a >= 0, the strength of the ascent; 1 is flooding, 0 a pause.
      dead_band: d >= 0, how far below the level descent goes on, in units of the loss.

    Returns:
      The shape of the risk correction of nnPU; flooding for the defaults.

    Raises:
      ValueError: if an argument is a number that is negative, infinite or NaN.
      TypeError: if an argument is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> shape = asymmetric(ascent=0.5, dead_band=0.1)
      >>> print(shape.multiplier(jnp.array([-0.3, -0.05, 1.5])))
      [-0.5  1.   1. ]
      >>> [f"{phi:.2f}" for phi in shape.value(jnp.array([-0.3, -0.05, 1.5]))]
      ['0.00', '-0.05', '1.50']

    References:
      Kiryo et al., Positive-Unlabeled Learning with Non-Negative Risk Estimator,
      NeurIPS 2017, algorithm 1, https://arxiv.org/abs/1703.00593
    """
    _check_parameter("asymmetric(ascent=...)", ascent, "non-negative", lambda a: a >= 0)
    _check_parameter(
        "asymmetric(dead_band=...)", dead_band, "non-negative", lambda d: d >= 0
    )

    def value(r: jax.Array) -> jax.Array:
        a, d = jnp.asarray(ascent, r.dtype), jnp.asarray(dead_band, r.dtype)
        return jnp.where(r >= -d, r, -a * (r + d) - d) + _nan_squared(r)

    def multiplier(r: jax.Array) -> jax.Array:
        a, d = jnp.asarray(ascent, r.dtype), jnp.asarray(dead_band, r.dtype)
        return _keep_nan(r, jnp.where(r >= -d, jnp.ones_like(r), -a))

    return Shape(value, multiplier)


def _reflect_value(r: jax.Array) -> jax.Array:
    return jnp.where(r >= 0, r, -r) + _nan_squared(r)


def _reflect_multiplier(r: jax.Array) -> jax.Array:
    return _keep_nan(r, jnp.where(r >= 0, jnp.ones_like(r), -jnp.ones_like(r)))


def _pause_value(r: jax.Array) -> jax.Array:
    return jnp.where(r >= 0, r, jnp.zeros_like(r)) + _nan_squared(r)


def _pause_multiplier(r: jax.Array) -> jax.Array:
    return _keep_nan(r, jnp.where(r >= 0, jnp.ones_like(r), jnp.zeros_like(r)))


def _keep_nan(r: jax.Array, multiplier: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(r), r, multiplier)


def _nan_squared(r: jax.Array) -> jax.Array:
    """Zero with derivative zero, but NaN with derivative NaN where r is NaN."""
    nan = jnp.where(jnp.isnan(r), r, jnp.zeros_like(r))
    return nan * nan


def _check_parameter(
    call: str, given: Any, rule: str, holds: Callable[[float], bool]
) -> None:
    """Checks a concrete shape parameter; tracers pass."""
    if isinstance(given, Tracer):
        return
    scalar = np.shape(given) == () and hasattr(given, "item")
    number = given.item() if scalar else given
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"`{call}` must be a real number, got {given!r}.")
    if not (np.isfinite(float(number)) and holds(float(number))):
        raise ValueError(f"`{call}` must be {rule} and finite, got {given}.")
