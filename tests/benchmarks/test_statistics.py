"""Intervals, corrections and choices are as tables, enumeration or simulation say."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

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


def test_overlapping_draws_widen_the_error_by_what_they_share():
    # Nadeau and Bengio: s^2 (1/J + n_test / n_train); here s^2 = 7/3, J = 3, ratio 1/4.
    found = statistics.corrected([1.0, 2.0, 4.0], 0.25)
    assert found.error == pytest.approx((7 / 3 * (1 / 3 + 1 / 4)) ** 0.5)
    assert found.interval.half == pytest.approx(4.303 * found.error, rel=1e-4)
    apart = statistics.corrected([1.0, 2.0, 4.0], 0.0)
    assert apart.interval == pytest.approx(statistics.interval([1.0, 2.0, 4.0]))
    assert apart.p == pytest.approx(stats.ttest_1samp([1.0, 2.0, 4.0], 0.0).pvalue)


def test_clusters_have_the_error_of_every_two_stage_resample():
    # All resamples of three data sets, the second with two settings, whose seeds are
    # drawn together: 3^3 choices of data sets times 4^3 of seeds, equally likely.
    seeds = {"a": [(1.0, 2.0)], "b": [(4.0, 1.0), (6.0, 2.0)], "c": [(0.0, 5.0)]}
    picks = list(itertools.product(range(2), repeat=2))
    means = []
    for names in itertools.product(seeds, repeat=3):
        for drawn in itertools.product(picks, repeat=3):
            values = [
                np.mean([setting[i] for i in pick])
                for name, pick in zip(names, drawn, strict=True)
                for setting in seeds[name]
            ]
            means.append(np.mean(values))
    found = statistics.clustered(seeds, draws=20_000)
    assert found.mean == pytest.approx(np.mean([1.5, 2.5, 4.0, 2.5]))
    assert found.error == pytest.approx(1.5**0.5 * np.std(means), rel=0.02)
    assert found.freedom == 2
    assert found == statistics.clustered(seeds, draws=20_000)  # the key is fixed
    assert statistics.clustered({"a": seeds["a"]}).interval == (1.5, math.inf)


def test_seeds_are_drawn_setting_by_setting_where_their_numbers_differ():
    ragged = {"a": [(1.0, 3.0), (0.0, 0.0, 6.0)], "b": [(2.0, 2.0), (2.0, 2.0, 2.0)]}
    # Between the data sets nothing; within the first the variance of a mean of two
    # means, (1/2 + 8/3) / 4, counted as often as it is drawn, half the time.
    within = (1 / 2 + 8 / 3) / 4
    due = (2 / 1) ** 0.5 * (within / 2 / 2) ** 0.5
    assert statistics.clustered(ragged, draws=20_000).error == pytest.approx(
        due, rel=0.03
    )


def test_intervals_over_data_sets_cover_and_those_over_all_seeds_do_not():
    rng = np.random.default_rng(3)
    covered = naive = 0
    for _ in range(400):
        truth = rng.normal(size=(6, 1))  # of each data set; 0 over all data sets
        values = truth + rng.normal(size=(6, 8))
        clusters = {str(i): [row] for i, row in enumerate(values)}
        found = statistics.clustered(clusters, draws=400).interval
        covered += abs(found.mean) < found.half
        naive += not (
            (over_all := statistics.interval(values.ravel())).above or over_all.below
        )
    # Binomial standard deviation of 400 at 95%: 1.1%.
    assert 0.92 <= covered / 400 <= 0.99
    assert naive / 400 < 0.7


def test_a_family_is_judged_by_holms_steps():
    # By hand: .01 x 4, .02 x 3, .03 x 2 (never below the one before), .2 x 1.
    assert statistics.holm([0.2, 0.01, 0.03, 0.02]) == pytest.approx(
        [0.2, 0.04, 0.06, 0.06]
    )
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    clear, weak = statistics.Effect(-3.0, 0.1, 9), statistics.Effect(2.5, 1.0, 9)
    assert 0.025 < weak.p < 0.05
    alone, none = statistics.Effect(0.0, 0.0, 9), statistics.Effect(9.0, math.inf, 0)
    assert statistics.verdicts_of([weak]) == ["ahead"]
    family = [weak, clear, alone, none]
    assert statistics.verdicts_of(family) == [
        "not told apart",
        "behind",
        "not told apart",
        "not told apart",
    ]


def test_the_best_of_a_group_is_judged_by_seeds_that_did_not_choose_it():
    group = {"a": [9.0, 1.0, 9.0, 2.0], "b": [4.0, 5.0, 6.0, 5.0]}
    # Even seeds choose a, judged on the odd ones; odd seeds choose b.
    assert statistics.cross_fitted(group).tolist() == [4.0, 1.0, 6.0, 2.0]
    # Of equal methods with independent noise the winner gains nothing, in the mean.
    noise = np.random.default_rng(0).normal(size=(500, 20, 6))
    judged = [statistics.cross_fitted(dict(enumerate(one))).mean() for one in noise]
    assert abs(np.mean(judged)) < 3 * np.std(judged) / 500**0.5
    assert noise.mean(-1).max(1).mean() > 0.5  # chosen and judged by all: half a sd
    with pytest.raises(ValueError, match="One seed cannot"):
        statistics.cross_fitted({"a": [1.0]})


@pytest.mark.parametrize("k", [1, 2, 4])
def test_expected_best_of_k_is_that_of_every_draw_with_replacement(k):
    validation, test = [3.0, 1.0, -math.inf, 3.0, 2.0], [5.0, 9.0, 0.0, 6.0, 8.0]
    tests = []
    for drawn in itertools.product(range(5), repeat=k):
        best = max(validation[i] for i in drawn)
        tests.append(np.mean([test[i] for i in drawn if validation[i] == best]))
    found = statistics.expected_best(k, [validation, validation], [test, test])
    assert found == pytest.approx([np.mean(tests)] * 2)
    highest = [max(draw) for draw in itertools.product((1.0, 2.0, 4.0), repeat=k)]
    own = statistics.expected_best(k, [4.0, 1.0, 2.0])
    assert own == pytest.approx(np.mean(highest))
    with pytest.raises(ValueError, match="without a validation"):
        statistics.expected_best(k, [1.0, math.nan])
