"""What a shape must be: a function and its derivative; for a band, one that turns."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flood_optax.shapes import Shape


def check_shape(shape: Any, call: str) -> None:
    """Demands a Shape whose multiplier is the derivative of its value."""
    if not isinstance(shape, Shape):
        got = type(shape).__name__
        if callable(shape):
            name = getattr(shape, "__name__", got)
            makes = getattr(shape, "__module__", None) == Shape.__module__
            cure = f"call it: {name}()" if makes else "`Shape(value, multiplier)`"
            got = f"the function {name}: {cure}"
        raise TypeError(f"`{call}` must be a `flood_optax.Shape`, got {got}.")
    if getattr(shape.value, "derivative", None) == shape.multiplier:  # made here
        return
    h = 1 / 32
    for r in (-0.8125, 1.5):
        around = (r - h, r, r + h)
        phi, m = _at(shape.value, around), _at(shape.multiplier, around)
        if phi is None or m is None:  # their own numbers are traced
            return
        # a mean of the derivative between the ends, also where it jumps there
        slope = (phi[2] - phi[0]) / (2 * h)
        slack = 1e-3 * np.abs(m).max() + 1e-5 * np.abs(phi).max()
        if slope < m.min() - slack or slope > m.max() + slack:
            raise ValueError(
                f"`{call}` must have a multiplier that is the derivative of its value, "
                f"got {shape!r}: at r = {r} the value rises by {slope:.3g} per unit, "
                f"the multiplier is {m[1]:.3g}. `Shape(value, multiplier)` takes phi "
                "first, then its derivative."
            )


def check_turns_around(shape: Shape, band: float, call: str) -> None:
    """Demands that the loss climbs to one end of a band, and sinks to the other."""
    far, close = 2 * band, 1e-4 * band  # r at the other end, and just before this one
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


def _at(part: Callable[..., Any], residuals: tuple[float, ...]) -> np.ndarray | None:
    """A function of a shape at these residuals; None where its numbers are traced."""
    try:
        hash(part)
    except TypeError:
        return _evaluated.__wrapped__(part, residuals)
    try:
        return _evaluated(part, residuals)
    except jax.errors.TracerArrayConversionError:
        return None


@functools.lru_cache(maxsize=256)
def _evaluated(part: Callable[..., Any], residuals: tuple[float, ...]) -> np.ndarray:
    """Compiled, so that a Python number in it is no transfer; it may be for scalars."""

    def at(r: jax.Array) -> jax.Array:
        found = part(r)
        if not hasattr(found, "astype") or jnp.shape(found) != ():
            name = getattr(part, "__qualname__", repr(part))
            raise TypeError(
                f"`Shape({name})` must return an array of the shape of r, got "
                f"{found!r} for a scalar: for a constant c, `jnp.full_like(r, c)`."
            )
        return found

    with jax.ensure_compile_time_eval():
        found = jax.jit(jax.vmap(at))(jax.device_put(np.asarray(residuals, np.float32)))
    return np.asarray(found, np.float64)
