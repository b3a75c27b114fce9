"""In which dtype numbers are compared, and sums that stay right in float32."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# So many numbers added one by one are off by 256 / 2**25 = 8e-6 at most, in practice by
# a fifth of it; a million of them by 1.4 %.
RUN = 256
GOLDEN = np.uint32(0x9E3779B1)  # 2**32 times the golden ratio - 1


def wide(x: ArrayLike) -> jax.Array:
    """Real numbers in float32 at least, in which a loss is compared with its level."""
    array = jnp.asarray(x)
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def rounded(x: jax.Array) -> jax.Array:
    """Rounds numbers of 16 bits at most to their dtype, which XLA may else skip."""
    if x.dtype.itemsize > 2:
        return x
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant)


def segment_sums(
    values: jax.Array, ids: jax.Array, members: jax.Array, most: int
) -> jax.Array:
    """Sums the values of each segment as a tree, in which no run of numbers is long.

    XLA sums an array as a tree already, and a scatter one by one: what is small beside
    the sum so far is lost. So a segment of more than RUN members gets further places,
    over which its members are spread, and its places are added up afterwards.

    Args:
        values: Of shape [n, ...].
        ids: The segment of each value, int32; one out of range counts nowhere.
        members: How many values each segment has, int32.
        most: How many it has at most, static.
    """
    number, size = members.shape[0], values.shape[0]
    if most <= RUN:
        return jax.ops.segment_sum(values, ids, number)
    further = jnp.maximum((members + (RUN - 1)) // RUN - 1, 0)
    ends = jnp.cumsum(further, dtype=jnp.int32)
    last = number + ends - further - 1
    # Which place a member gets depends on where it stands: the multiples of the golden
    # ratio fill a circle evenly, also with a period, as ids often have one.
    turn = (lax.iota(jnp.uint32, size) * GOLDEN >> np.uint32(8)).astype(jnp.float32)
    places = further.at[ids].get(mode="clip")
    place = (turn * 2**-24 * (places + 1).astype(jnp.float32)).astype(jnp.int32)
    place = jnp.minimum(place, places)  # the product may round up
    spread = jnp.where(place > 0, last.at[ids].get(mode="clip") + place, ids)
    spare = size // RUN  # as many further places as all segments together can need
    table = jax.ops.segment_sum(values, spread, number + spare)
    owners = jnp.searchsorted(ends, jnp.arange(spare, dtype=jnp.int32), side="right")
    owners = owners.astype(jnp.int32)
    rest = segment_sums(table[number:], owners, further, -(-most // RUN))
    return table[:number] + rest
