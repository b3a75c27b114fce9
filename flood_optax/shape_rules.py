"""What a shape must be: a function and its derivative; for a band, one that turns."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flood_optax.checks import check_that, must
from flood_optax.shapes import Shape

_RESIDUALS = (-0.84375, -0.8125, -0.78125, 1.46875, 1.5, 1.53125)


def check_shape(shape: Any, call: str) -> None:
    """Demands a Shape whose multiplier is the derivative of its value."""
    if not isinstance(shape, Shape):
        got = type(shape).__name__
        if callable(shape):
            name = getattr(shape, "__name__", got)
            makes = getattr(shape, "__module__", None) == Shape.__module__
            cure = f"call it: {name}()" if makes else "`Shape(value, multiplier)`"
            got = f"the function {name}: {cure}"
        raise TypeError(must(call, "be a `flood_optax.Shape`", got))
    if getattr(shape.value, "derivative", None) == shape.multiplier:  # made here
        return
    phi, m = _at(shape.value, _RESIDUALS), _at(shape.multiplier, _RESIDUALS)
    if phi is None or m is None:  # their own numbers are traced
        return
    slack = 1e-3 * np.abs(m).max() + 1e-5 * np.abs(phi).max()
    for i in (0, 3):
        here = slice(i, i + 3)
        # a mean of the derivative between the ends, also where it jumps there
        slope = (phi[i + 2] - phi[i]) / (_RESIDUALS[i + 2] - _RESIDUALS[i])
        fits = m[here].min() - slack <= slope <= m[here].max() + slack
        rule = "have a multiplier that is the derivative of its value"
        rises = f"at r = {_RESIDUALS[i + 1]} the value rises by {slope:.3g} per unit"
        got = f"{shape!r}: {rises}, the multiplier is {m[i + 1]:.3g}"
        order = " `Shape(value, multiplier)` takes phi first, then its derivative."
        check_that(fits, call, rule, got, order)


def check_turns_around(shape: Shape, band: float, call: str) -> None:
    """Demands that the loss climbs to one end of a band, and sinks to the other."""
    # r at the other end and just before this one, normal numbers in float32
    far, close = (min(max(x, 1e-37), 3e38) for x in (2 * band, 1e-4 * band))
    m = _at(shape.multiplier, (-far, -close, close, far))
    if m is None:
        return
    # A hundredth of its strength close to an end is a rest there, as of `soft`.
    if m[0] < 0 and m[1] <= m[0] / 100 and m[3] > 0 and m[2] >= m[3] / 100:
        return
    raise ValueError(
        f"`{call}` must come with a shape that turns the loss around at both ends, got "
        f"{shape!r}, whose multiplier is {m[0]:.3g} at the far end and {m[1]:.3g} just "
        f"before the upper one, {m[3]:.3g} and {m[2]:.3g} towards the lower one. Use "
        "`reflect()` or `asymmetric(ascent)`."
    )


def is_static(shape: Shape) -> bool:
    """Whether compiled code may be kept for it: it is hashable, its numbers known."""
    try:
        hash(shape)
    except TypeError:
        return False
    numbers = [getattr(part, "numbers", None) for part in shape]
    if None in numbers:  # not made here: what its functions hold is seen in a result
        return all(_at(part, _RESIDUALS) is not None for part in shape)
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(numbers))


def _at(part: Callable[..., Any], residuals: tuple[float, ...]) -> np.ndarray | None:
    """A function of a shape at these residuals; None where its numbers are traced."""
    try:
        hash(part)
    except TypeError:
        evaluated = _evaluated.__wrapped__
    else:
        evaluated = _evaluated
    try:
        return evaluated(part, residuals)
    except jax.errors.TracerArrayConversionError:
        return None


@functools.lru_cache(maxsize=256)
def _evaluated(part: Callable[..., Any], residuals: tuple[float, ...]) -> np.ndarray:
    """Compiled, so that a Python number in it is no transfer; it may be for scalars."""

    def at(r: jax.Array) -> jax.Array:
        found = part(r)
        if not hasattr(found, "astype") or jnp.shape(found) != ():
            name = getattr(part, "__qualname__", repr(part))
            rule = "return an array of the shape of r"
            got = f"{found!r} for a scalar: for a constant c, `jnp.full_like(r, c)`"
            raise TypeError(must(f"Shape({name})", rule, got))
        return found

    with jax.ensure_compile_time_eval():
        found = jax.jit(jax.vmap(at))(jax.device_put(np.asarray(residuals, np.float32)))
    return np.asarray(found, np.float64)
