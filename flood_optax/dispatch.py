"""Op by op each operation is a dispatch of its own: many of them as one program."""

import functools
import itertools
from collections.abc import Callable, Sequence
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
        leaves = jax.tree.leaves((args, options))
        run: Callable[..., Result] = function
        if not any(isinstance(x, Tracer) for x in leaves):
            arrays = (x for x in leaves if isinstance(x, jax.Array))
            devices = {device for x in arrays for device in x.devices()}
            run = compiled if len(devices) < 2 else function  # each keeps its place
        return run(*args, **options)

    return call


def on_chosen(
    function: Callable[[list[Any]], tuple[Any, ...]], tree: Any, chosen: Sequence[bool]
) -> tuple[Any, ...]:
    """What a function makes of the chosen leaves of a tree, all in one call.

    First come the leaves, in their places among the others, which stay the objects that
    they are; then what else the function returns.
    """
    leaves, structure = jax.tree.flatten(tree)
    made, *rest = function([*itertools.compress(leaves, chosen)])
    new, pairs = iter(made), zip(leaves, chosen, strict=True)
    return structure.unflatten(next(new) if yes else x for x, yes in pairs), *rest
