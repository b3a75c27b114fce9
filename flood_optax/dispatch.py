"""Op by op each operation is a dispatch of its own: many of them as one program."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.core import Tracer

P = ParamSpec("P")
Result = TypeVar("Result")


def one_dispatch(
    function: Callable[P, Result], *, static: str | tuple[str, ...] = ()
) -> Callable[P, Result]:
    """Compiles a function of arrays for eager calls; traced it is what it was.

    What an eager call returns are arrays of its own, also where they are equal to an
    argument: the caller may donate either.
    """
    compiled = jax.jit(function, static_argnames=static)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> Result:
        run: Callable[..., Result] = compiled if _together(args) else function
        return run(*args, **options)

    return call


def _together(args: Any) -> bool:
    """Whether all is known, and on one device: spread out, each keeps its place."""
    devices: set[Any] = set()
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, Tracer):
            return False
        if isinstance(leaf, jax.Array):
            devices |= leaf.devices()
    return len(devices) < 2
