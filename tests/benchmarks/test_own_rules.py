"""The two rules for the level that left the library, by their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import own_rules


def plateau_rule(metrics, step, patience):
    """The rule read off the whole history, one window at a time."""
    level, path = np.float32(0), []
    best_at, start, judged = None, 0, True
    for now, metric in enumerate(metrics):
        if best_at is None or metric > metrics[best_at]:
            best_at, start, judged = now, now + 1, True
        elif now - start + 1 == patience:
            best = metrics[best_at]
            window = max(metrics[start : now + 1])
            preceding = metrics[max(start - patience, best_at) : start]
            decays = window < max(preceding) or start == best_at + 1
            move = 1 if window == best or decays else -1
            judged = judged or window == best
            if judged:
                level = np.float32(max(level + move * np.float32(step), 0))
            start, judged = now + 1, not judged
        path.append(level)
    return path


@pytest.mark.parametrize("patience", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_on_plateau_follows_its_rule(seed, patience):
    rng = np.random.default_rng(seed)
    metrics = rng.integers(0, 12, 200).astype(np.float32) - 0.02 * np.arange(200)
    metrics = metrics.astype(np.float32)
    expected = plateau_rule(metrics, 0.125, patience)
    init, update = own_rules.on_plateau(step=0.125, patience=patience)
    _, path = jax.lax.scan(lambda s, m: update(s, m)[::-1], init(), -metrics)
    np.testing.assert_array_equal(path, expected)
    assert len(set(expected)) > 2, "the rule hardly moved"


@pytest.mark.parametrize(
    ("accordances", "threshold", "expected"),
    [
        ([0.5, 0.1, -0.1, 0.3, -0.5], 0.0, 0.7),
        ([0.5, 0.1, 0.0, 0.3, 0.2], 0.0, -np.inf),
        ([0.5, 0.1, 0.2, 0.3, 0.2], 0.15, 0.8),
        ([np.nan, 0.1, np.nan, 0.3, -0.2], 0.0, 0.5),
    ],
    ids=["first", "none", "threshold", "nan"],
)
def test_accordance_level_is_the_loss_where_accordance_breaks_down(
    accordances, threshold, expected
):
    losses = jnp.array([0.9, 0.8, 0.7, 0.6, 0.5])
    find = functools.partial(own_rules.accordance_level, threshold=threshold)
    assert find(losses, jnp.array(accordances)) == np.float32(expected)
    assert jax.jit(find)(losses, jnp.array(accordances)) == np.float32(expected)
