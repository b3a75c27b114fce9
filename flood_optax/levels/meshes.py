"""Sums and orders over examples that an explicit mesh splits over devices."""

import jax
from jax.sharding import NamedSharding, PartitionSpec


def replicated(x: jax.Array) -> jax.Array:
    """The whole array on every device, where an explicit mesh splits it."""
    sharding = whole(x)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def whole(*arrays: jax.Array) -> NamedSharding | None:
    """The sharding of what every device holds; None where no explicit mesh splits.

    Only explicit axes show in a type: under automatic sharding nothing is to be said.
    """
    for x in arrays:
        sharding = jax.typeof(x).sharding
        if any(axis is not None for axis in sharding.spec):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None
