"""A band where the batch is split over devices: turned by the loss of all of it."""

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from tests import forms, oracles
from tests.sharded import Checks, mapped, mesh_of

LEVEL, BAND = 0.625, 0.125
ROWS, DEVICES = 60, 4
CHECKS = Checks()


def device_losses():
    """Of each device; their mean walks through the band, each by itself does not."""
    rng = np.random.default_rng(2)
    mean = LEVEL + 0.3 * np.sin(np.arange(ROWS) / 4) + rng.uniform(-0.1, 0.1, ROWS)
    apart = np.array([-0.5, -0.125, 0.25, 0.375])
    # thirty-seconds, whose means, ties among them, are exact
    return np.float32(np.round(32 * mean)[:, None] / 32 + apart)


@CHECKS.once
def band_under_shard_map_turns_by_the_loss_of_all():
    losses = device_losses()
    weights = np.float32(1 + np.arange(ROWS)[:, None] % 3 + [0, 2, 0, 1])
    means = {
        False: losses.mean(1),
        True: (weights * losses).sum(1) / weights.sum(1),
    }
    specs = (P(None, "data"), P(None, "data"))
    for name, make in forms.OPTAX.items():
        for weigh, mean in means.items():
            optimizer = make(optax.identity(), LEVEL, band=BAND, axis_name="data")

            def run(losses, weights, optimizer=optimizer, weigh=weigh):
                one = jnp.ones([])

                def step(state, row):
                    more = {"weight": row[1][0]} if weigh else {}
                    update, state = optimizer.update(
                        one, state, one, value=row[0][0], **more
                    )
                    return state, update

                return lax.scan(step, optimizer.init(one), (losses, weights))[1]

            run = mapped(run, mesh_of("data"), specs, check_vma=True)
            got = np.asarray(run(losses, weights))
            wanted = oracles.strokes(mean, LEVEL, BAND)[1]
            if name == "flood_every_k":
                sums = weights.sum(1) if weigh else np.ones(ROWS)
                wanted = oracles.stroke_windows([2], mean, LEVEL, BAND, weights=sums)
            np.testing.assert_array_equal(np.sign(got), wanted, f"{name} {weigh}")
            assert 6 < np.sum(wanted < 0) < ROWS - 6
    whole = oracles.strokes(means[False], LEVEL, BAND)[1]
    for own in losses.T:
        assert (oracles.strokes(own, LEVEL, BAND)[1] != whole).any()


@CHECKS.parametrize()
def test_sharding(name, devices):
    CHECKS.assert_held(name, __file__, devices)


if __name__ == "__main__":
    CHECKS.report()
