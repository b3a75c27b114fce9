"""Intervals and gains are those of a table of Student's t, and print as they should."""

import math

import numpy as np
import pytest

from benchmarks import statistics


def test_interval_is_that_of_a_table_of_students_t():
    # t(0.975) for 1, 2 and 4 degrees of freedom, as printed: 12.706, 4.303 and 2.776.
    values = [1.0, 2.0, 4.0, 4.0, 9.0]  # mean 4, squared deviations 9 + 4 + 25 = 38
    found = statistics.interval(values)
    assert found.mean == 4.0
    assert found.half == pytest.approx(2.776 * (38 / 4 / 5) ** 0.5, rel=2e-4)
    two = statistics.interval([1.0, 4.0])
    assert two.half == pytest.approx(12.706 * 1.5, rel=1e-4)
    three = statistics.interval([1.0, 1.0, 4.0])
    assert three.half == pytest.approx(4.303 * (6 / 2 / 3) ** 0.5, rel=1e-4)
    assert statistics.interval([3.5]) == (3.5, math.inf)


def test_gain_is_paired_by_seed_and_counts_from_plain_training():
    plain = {"accuracies": [80.0, 90.0, 70.0]}
    flooded = {"accuracies": [81.0, 92.0, 74.0]}
    gain = statistics.gain(flooded, plain)
    # The gains 1, 2 and 4: far less apart than the accuracies.
    assert gain.mean == pytest.approx(7 / 3)
    expected = statistics.interval([1.0, 2.0, 4.0])
    assert gain == pytest.approx(expected)
    assert statistics.gain(plain, flooded).mean == pytest.approx(-7 / 3)


def test_verdicts_count_the_intervals_that_leave_zero_out():
    ahead, behind = (2.0, 1.9), (-2.0, 1.9)
    undecided = [(2.0, 2.1), (-2.0, 2.1), (0.0, 0.0), (5.0, math.inf)]
    every = [statistics.Interval(*one) for one in (ahead, *undecided, behind, ahead)]
    assert statistics.verdicts(every) == (2, 1)


@pytest.mark.parametrize(
    ("interval", "spec", "expected"),
    [
        ((1.234, 0.567), ".2f", "1.23 ± 0.57"),
        ((1.234, 0.567), "+.1f", "+1.2 ± 0.6"),
        ((-1.234, 0.567), "+.2f", "-1.23 ± 0.57"),
        ((1.0, math.inf), "+.2f", "+1.00"),
    ],
)
def test_interval_prints_a_sign_for_its_mean_alone(interval, spec, expected):
    assert format(statistics.Interval(*interval), spec) == expected


def test_standard_deviation_is_the_sample_one_and_zero_for_one_value():
    assert statistics.sd(np.array([1.0, 2.0, 6.0])) == pytest.approx(7**0.5)
    assert statistics.sd(np.array([5.0])) == 0.0
    assert statistics.summary("loss", np.array([1.0, 2.0, 6.0])) == {
        "loss_mean": 3.0,
        "loss_sd": pytest.approx(7**0.5),
    }
