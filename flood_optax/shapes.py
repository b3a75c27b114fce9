"""How the loss is bent at the level: a function phi of r = loss - level, and phi'.

Every method of the family replaces a loss by ``phi(loss - level) + level``. The
gradient is then the plain one times the multiplier ``m = phi'(loss - level)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from flood_optax.checks import check_number

__all__ = ["Shape", "asymmetric", "pause", "reflect", "soft"]


class Shape(NamedTuple):
    r"""A function :math:`\phi(r)` of the residual r = loss - level, and its derivative.

    Both functions are elementwise, keep shape and dtype of r, and must be traceable.
    Where ``value(r) == r`` and ``multiplier(r) == 1`` the flooded loss is the loss
    itself, bit for bit. The gradient of a flooded loss is taken from ``multiplier``,
    its second derivative from the derivative of ``multiplier``.

    The shapes of this module are equal, and one static argument, where their numbers
    are; no gradient flows into these. Traced numbers in functions of your own need
    `jax.lax.stop_gradient`. That ``multiplier`` is the derivative of ``value`` is
    checked once, where a shape is first used, at two residuals.

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

    def __repr__(self) -> str:
        """The call that made it, or the names of its functions."""
        if getattr(self.value, "derivative", None) == self.multiplier:
            return repr(self.value).removesuffix(".value")
        names = (getattr(part, "__qualname__", repr(part)) for part in self)
        return "Shape(value={}, multiplier={})".format(*names)


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
    return _shape(_reflect_value, _reflect_multiplier)


def soft(scale: float | jax.Array = 1.0) -> Shape:
    r"""Bends the loss smoothly around the level (SoftAD).

    :math:`\phi(r) = s^2(\sqrt{1 + (r/s)^2} - 1)` and
    :math:`m = r / \sqrt{1 + (r/s)^2}`, with s = ``scale``. The multiplier is 0 at the
    level, so a tie stands still; it tends to s above and to -s below, and is r close
    to the level. It is not the identity above the level: the step size is scaled by m.
    NaN gives NaN in both, m(inf) = s.

    Args:
      scale: s > 0, in units of the loss. No gradient flows into it.

    Returns:
      The shape of SoftAD in the scaling of its authors' code.

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
    check_number("soft(scale=...)", scale, "positive and finite")
    return _shape(_soft_value, _soft_multiplier, scale=scale)


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
    return _shape(_pause_value, _pause_multiplier)


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
        No gradient flows into either.

    Returns:
      The shape of the risk correction of nnPU; flooding for the defaults.

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
    rule = "non-negative and finite"
    check_number("asymmetric(ascent=...)", ascent, rule)
    check_number("asymmetric(dead_band=...)", dead_band, rule)
    numbers = {"ascent": ascent, "dead_band": dead_band}
    return _shape(_asymmetric_value, _asymmetric_multiplier, **numbers)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Part:
    """A function of r and numbers: equal where they are equal, and picklable."""

    function: Callable[..., jax.Array]
    numbers: Mapping[str, float | jax.Array]
    derivative: Callable[..., jax.Array] | None = None

    def __call__(self, r: jax.Array) -> jax.Array:
        known = self.numbers.values()
        fixed = (lax.stop_gradient(jnp.asarray(x, r.dtype)) for x in known)
        return self.function(r, *fixed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Part) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        _, shape, part = self.function.__name__.split("_")
        numbers = ", ".join(f"{name}={x}" for name, x in self.numbers.items())
        return f"{shape}({numbers}).{part}"

    @property
    def _key(self) -> tuple[Any, ...]:
        # A tracer has neither a hash nor a truth value: it equals itself alone.
        numbers = self.numbers.values()
        return self.function, *(x if isinstance(x, float) else id(x) for x in numbers)


def _shape(
    value: Callable[..., jax.Array],
    multiplier: Callable[..., jax.Array],
    **numbers: float | jax.Array,
) -> Shape:
    """Binds checked numbers to both functions; one that is known as a Python float."""
    known = {k: x if isinstance(x, Tracer) else float(x) for k, x in numbers.items()}
    derivative = _Part(multiplier, known)
    return Shape(_Part(value, known, derivative), derivative)


def _reflect_value(r: jax.Array) -> jax.Array:
    return jnp.where(r >= 0, r, -r) + _nan_squared(r)


def _reflect_multiplier(r: jax.Array) -> jax.Array:
    one = jnp.ones_like(r)
    return jnp.where(r >= 0, one, jnp.where(r < 0, -one, r))  # NaN is neither


def _soft_value(r: jax.Array, s: jax.Array) -> jax.Array:
    x = r / s
    far = jnp.abs(x) > 1
    near = jnp.where(far, jnp.zeros_like(x), x)
    small = near * near / (1 + jnp.sqrt(1 + near * near))  # without cancellation
    # sqrt(1 + x^2) without overflow; not jnp.hypot, which jet cannot pass in jax 0.12
    inverse = 1 / jnp.where(far, x, jnp.ones_like(x))
    square_root = jnp.abs(x) * jnp.sqrt(1 + inverse * inverse)
    return s * s * jnp.where(far, square_root - 1, small)


def _soft_multiplier(r: jax.Array, s: jax.Array) -> jax.Array:
    x = r / s
    far = jnp.abs(x) > 1
    near = jnp.where(far, jnp.zeros_like(x), x)
    # x / sqrt(1 + x^2) is inf / inf far out: there both are divided by |x|. These are
    # two forms and not sin(arctan(x)), for which `jax.experimental.jet` has no rule.
    inverse = 1 / jnp.where(far, x, jnp.ones_like(x))
    outer = jnp.sign(x) / jnp.sqrt(1 + inverse * inverse)
    return s * jnp.where(far, outer, near / jnp.sqrt(1 + near * near))


def _pause_value(r: jax.Array) -> jax.Array:
    return jnp.where(r >= 0, r, jnp.zeros_like(r)) + _nan_squared(r)


def _pause_multiplier(r: jax.Array) -> jax.Array:
    return jnp.where(r >= 0, jnp.ones_like(r), jnp.where(r < 0, jnp.zeros_like(r), r))


def _asymmetric_value(r: jax.Array, a: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.where(r >= -d, r, -a * (r + d) - d) + _nan_squared(r)


def _asymmetric_multiplier(r: jax.Array, a: jax.Array, d: jax.Array) -> jax.Array:
    return jnp.where(r >= -d, jnp.ones_like(r), jnp.where(r < -d, -a, r))


def _nan_squared(r: jax.Array) -> jax.Array:
    """Zero with derivative zero, but NaN with derivative NaN where r is NaN."""
    # The comparisons above send NaN down one branch, whose derivative would be +-1.
    nan = jnp.where(jnp.isnan(r), r, jnp.zeros_like(r))
    return nan * nan
