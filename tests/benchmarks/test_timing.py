"""Rivals are timed in pairs; costs are what the compiler counts."""

import jax.numpy as jnp
import pytest

from benchmarks import timing


def test_compare_pairs_the_times_of_a_round(monkeypatch):
    now, slow = [0.0], [1.0]
    order = []

    def rival(name, cost):
        def call():
            order.append(name)
            now[0] += cost * slow[0]
            slow[0] *= 1.0 if len(order) % 12 else 3.0  # the machine gets slower
            return jnp.zeros([])

        return call

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    rivals = {"plain": rival("plain", 2.0), "other": rival("other", 3.0)}
    seen = timing.compare(rivals, rounds=5, calls=6, warm_up=0)
    assert seen["plain"]["time_ratio_median"] == 1.0
    assert seen["other"]["time_ratio_median"] == pytest.approx(1.5)
    assert seen["other"]["time_ratio_iqr"] == pytest.approx([1.5, 1.5])
    assert seen["other"]["seconds_min"] == pytest.approx(3.0)
    assert len(order) == 5 * 6 * 2
    firsts = order[::12]
    assert set(firsts) == {"plain", "other"}  # not always the same one goes first


def test_compiled_cost_counts_the_flops_of_a_product():
    cost = timing.compiled_cost(jnp.matmul, jnp.ones((30, 40)), jnp.ones((40, 50)))
    assert cost["flops"] == pytest.approx(2 * 30 * 40 * 50, rel=0.01)
    assert cost["kernels"] == 1


def test_traces_counts_a_retrace_for_another_dtype():
    same = timing.traces(jnp.sin, (jnp.ones(3),), (jnp.zeros(3),))
    other = timing.traces(jnp.sin, (jnp.ones(3),), (jnp.ones(3, jnp.bfloat16),))
    assert (same, other) == (1, 2)
