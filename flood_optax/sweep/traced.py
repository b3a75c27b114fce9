"""A function that is traced once, called under any transformation, and recognised."""

import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# They call a function of Python, of which a jaxpr holds the address alone.
CALLS_PYTHON = {"pure_callback", "io_callback", "custom_vmap_call", "debug_callback"}
# They change numbers, but not the jaxpr that a training is recognised by.
SETTINGS = (
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_accurate_erf_inv",
    "jax_use_hlo_logistic_lowering",
)


class Traced(NamedTuple):
    """A function after tracing.

    Attributes:
      function: the function under `jax.jit`, which need not trace it again either.
      jaxpr: what the function computes, with the arrays it closes over.
      shape: the tree of its result, with shapes and dtypes.
    """

    function: Callable[..., Any]
    jaxpr: Any
    shape: Any

    def call(self, *args: Any) -> Any:
        """Calls the function without tracing it again."""
        from jax.extend.core import jaxpr_as_fun  # noqa: PLC0415, brings Pallas

        flat = jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(self.shape), flat)


def trace(function: Callable[..., Any], call: str, *args: Any) -> Traced:
    """Traces a function of arrays; a branch in Python on their numbers gets a note."""
    try:
        jitted = jax.jit(function)
        stage = jitted.trace(*args)
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        error.add_note(
            f"`{call}` must be traceable: it is traced once for all levels, so it must "
            "not need their numbers in Python. Use `jnp.where` or `jax.lax.cond` "
            "instead of `if`, and the level as it is instead of `float(level)`."
        )
        raise
    return Traced(jitted, stage.jaxpr, stage.out_info)


class Fingerprint(NamedTuple):
    """What a computation is recognised by.

    Attributes:
      digest: of the computation and of all arrays that it uses, at any depth.
      hidden: primitives that call Python, which a digest does not see.
    """

    digest: str
    hidden: frozenset[str]


def fingerprint(jaxpr: Any) -> Fingerprint:
    """The fingerprint of a computation.

    Rules of derivatives need no look: where they are used, they are in the jaxpr.
    """
    # The text has names, shapes, parameters and all digits of single numbers. Of
    # functions it has an address, which is another in each process, and of arrays no
    # more than some numbers, so they follow.
    text = re.sub(r"(?<= at )0x[0-9a-f]+", "", str(jaxpr))
    hidden: set[str] = set()
    numbers = _digest(jaxpr, hidden, {})
    digest = hashlib.sha256(text.encode() + numbers).hexdigest()
    return Fingerprint(digest, frozenset(hidden))


def _digest(part: Any, hidden: set[str], known: dict[int, bytes]) -> bytes:
    """The digest of the arrays in a jaxpr, or in what equations have as parameters."""
    # jit gives one jaxpr to all calls of a function; each is looked at once.
    if id(part) in known:
        return known[id(part)]
    digest = hashlib.sha256()
    if hasattr(part, "eqns"):  # a jaxpr, closed or not: JAX 0.12 has one class for both
        parts = list(getattr(part, "consts", ()))
        jaxpr = getattr(part, "jaxpr", part)
        operands = [*jaxpr.outvars]
        for equation in jaxpr.eqns:
            hidden.update({equation.primitive.name} & CALLS_PYTHON)
            parts += jax.tree.leaves(equation.params)
            operands += equation.invars
        # Of a setting of JAX it depends whether arrays are constants or literals.
        literals = [x.val for x in operands if hasattr(x, "val")]  # a variable has none
        parts += [value for value in literals if np.ndim(value)]
        for inner in parts:
            digest.update(_digest(inner, hidden, known))
        known[id(part)] = digest.digest()
    elif hasattr(part, "__array__"):
        typed_key = jnp.issubdtype(part.dtype, jax.dtypes.prng_key)
        numbers = np.asarray(jax.random.key_data(part) if typed_key else part)
        digest.update(f"{part.dtype}{part.shape}".encode())
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return digest.digest()


def settings() -> dict[str, str]:
    """What changes numbers though the training is the same: JAX and its settings."""
    found = {name: str(getattr(jax.config, name, None)) for name in SETTINGS}
    return {"jax": jax.__version__, **found}
