"""Losses on several devices: mapped axes, which have names, and explicit meshes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from flood_optax.checks import check_axis
from flood_optax.precision import wide

AxisName = str | tuple[str, ...]


# ---- mapped axes: shard_map, pmap, vmap ----


def global_mean(x: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The mean over the mapped axes, float32 at least inside; x itself without axes."""
    if not axis_name:
        return x
    return lax.pmean(wide(x), axis_name).astype(x.dtype)


def varying_like(x: jax.Array, share: jax.Array) -> jax.Array:
    """Returns x, typed as varying over the mapped axes over which `share` varies."""
    # A select, since jax names the varying axes of a type otherwise in each version.
    return jnp.where(lax.stop_gradient(share) > 0, x, x)


def check_axes(call: str, loss: jax.Array, axis_name: AxisName | None) -> None:
    """Demands mapped axes, and that the loss of one device is not flooded unasked."""
    if axis_name is not None:
        check_axis(call, axis_name)
        return
    # known under `shard_map(check_vma=True)` alone: elsewhere types are silent
    kind = jax.typeof(loss)
    varying = getattr(getattr(kind, "manual_axis_type", kind), "varying", None)
    varying = getattr(kind, "vma", None) if varying is None else varying
    if varying:
        axes = tuple(sorted(varying))
        named = repr(axes[0] if len(axes) == 1 else axes)
        raise ValueError(
            f"`{call}` floods the loss of each device by itself, for it varies over "
            f"the mapped axis {named}. Pass `axis_name={named}` to flood the mean over "
            "the devices, or `axis_name=()` if each device is to have its own flood."
        )


# ---- explicit axes: `jax.set_mesh` of what `jax.make_mesh` gives by default ----


def explicit_axes(x: jax.Array) -> tuple[str, ...]:
    """The explicit axes of the mesh on which an array is."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def zeros_like(x: jax.Array, dtype: np.dtype | None = None) -> jax.Array:
    """Zeros, split over explicit axes as x is."""
    if not explicit_axes(x):
        return jnp.zeros_like(x, dtype=dtype)
    # jnp.zeros_like forgets how an array is split that a `jit` closes over
    zero = jnp.zeros((), x.dtype if dtype is None else dtype)
    return jnp.broadcast_to(zero, x.shape, out_sharding=jax.typeof(x).sharding)


def split_like(x: jax.Array, loss: jax.Array) -> jax.Array:
    """Returns x, of the loss's shape, split over explicit axes as the loss is."""
    # JAX adds what is replicated to what is split, and selects among neither; x + 0
    # and x or False are x, and take no communication.
    return x + zeros_like(loss, x.dtype) if explicit_axes(loss) else x


def on_any_mesh(function: Callable[..., Any], split: jax.Array) -> Callable[..., Any]:
    """The function, under automatic sharding also where `split` is on explicit axes.

    What it returns is then the same on all devices. On explicit axes JAX wants to be
    told the sharding of each scatter and gather, and knows none for partial sums.
    """
    axes = explicit_axes(split)
    if not axes:
        return function
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=PartitionSpec())
