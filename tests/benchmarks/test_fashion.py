"""iFlood and SoftAD as their authors ran them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import images, pixels
from benchmarks.fashion import findings, training
from flood_optax import sweep


@pytest.mark.slow  # four networks; the methods themselves are in test_family.py
def test_fashion_methods_are_plain_training_far_from_the_level():
    protocol = dataclasses.replace(training.SMOKE, epochs=2)
    loaded = pixels.load("digits", None, images.SIZES)
    level, key = jnp.float32(-jnp.inf), jax.random.key(0)
    plain, *others = (
        jax.jit(training.trainer(loaded, name, protocol))(level, key)
        for name in ("plain", "iflood", "softad")
    )
    assert plain["reached"].shape == (2, 3, 2)  # looks; sets; loss and accuracy
    assert float(plain["reached"][0, 0, 0]) > float(plain["reached"][1, 0, 0])
    for other in others:
        chex.assert_trees_all_close(other, plain, rtol=1e-3)
    high = jax.jit(training.trainer(loaded, "iflood", protocol))(jnp.float32(9.0), key)
    assert float(high["reached"][1, 0, 0]) > 1.1 * float(plain["reached"][1, 0, 0])


def test_fashion_row_holds_each_seed_at_its_picked_level():
    level, seed = np.meshgrid(np.arange(2.0), np.arange(3.0), indexing="ij")
    reached = np.zeros((2, 3, 4, 3, 2))
    reached[:, :, -1, 1, 1] = [[0.8, 0.7, 0.9], [0.7, 0.9, 0.9]]  # a tie: the lower
    reached[:, :, 0, 1, 1] = [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]  # not the last look
    reached[:, :, -1, 2, 0] = 0.5 + level + 0.1 * seed
    metrics = {"reached": reached, "norm": np.full((2, 3, 4), 7.0)}
    metrics["validation_accuracy"] = reached[..., 1, 1]
    result = sweep.Result(np.array([0.1, 0.2]), metrics)
    picked = result.best("validation_accuracy", "max", at=-1)
    row = findings.summarise("iflood", 20, "picked", result, picked)
    assert row["levels"] == [0.1, 0.2, 0.1]
    losses = np.array([0.5, 1.6, 0.7])
    assert row["test_loss_mean"] == pytest.approx(losses.mean())
    assert row["test_loss_sd"] == pytest.approx(losses.std(ddof=1))
    assert row["norm_mean"] == 7.0
    assert [one["test_loss"] for one in findings.by_level("iflood", result)] == [
        pytest.approx(0.6),
        pytest.approx(1.6),
    ]
