"""What the synthetic table says is what the runs reached."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks.synthetic import findings
from flood_optax import sweep

ENVIRONMENT = dict.fromkeys(
    ("commit", "dirty", "command", "jax", "optax", "cpu_count", "cpu")
)


def planted():
    """Three levels and two trials; what a run reaches tells which run it was."""
    level, trial = np.meshgrid(np.arange(3.0), np.arange(2.0), indexing="ij")
    reached = np.zeros((3, 2, 3, 2, 2))
    reached[:, :, 2, 0, 1] = 0.5 + 0.1 * level + 0.01 * trial
    validation = np.zeros((3, 2, 4))
    validation[:, 0, -1] = [0.7, 0.8, 0.8]  # a tie: the lower level
    validation[:, 1, -1] = [0.6, 0.7, 0.9]
    validation[:, 0, 1] = [0.95, 0.9, 0.9]  # early stopping would choose level 0
    validation[:, 1, 2] = [0.9, 0.95, 0.9]
    train = np.full((3, 2, 3), 0.3)
    train[1, 0] = [0.3, 0.05, 0.05]
    metrics = {
        "last": reached,
        "best": reached + 0.2,
        "validation_accuracy": validation,
        "train_loss": train,
        "gradient_norm_last": level,
        "gradient_norm_best": level,
    }
    return sweep.Result(np.array([0.0, 0.1, 0.2]), metrics)


def test_summarise_picks_each_trial_its_level_on_validation():
    entries = findings.summarise("spiral", 0.05, planted())
    keys = ("early_stopping", "flooded", "accuracies", "levels")
    seen = [[entry[key] for key in keys] for entry in entries]
    expected = [
        [False, False, [50.0, 51.0], [0.0, 0.0]],
        [False, True, [60.0, 71.0], [0.1, 0.2]],
        [True, False, [70.0, 71.0], [0.0, 0.0]],
        [True, True, [70.0, 81.0], [0.0, 0.1]],
    ]
    for got, want in zip(seen, expected, strict=True):
        assert got[:2] == want[:2]
        np.testing.assert_allclose(got[2], want[2])
        np.testing.assert_allclose(got[3], want[3])
    flooded = entries[1]
    assert flooded["accuracy_mean"] == pytest.approx(65.5)
    assert flooded["accuracy_sd"] == pytest.approx(11 / 2**0.5)
    assert flooded["level_mean"] == pytest.approx(0.15)
    assert flooded["share_below"] == pytest.approx((2 / 3 + 0) / 2)
    assert (flooded["paper_mean"], flooded["paper_sd"]) == (93.90, 0.90)
    assert entries[0]["paper_mean"] == 89.94


def test_synthetic_table_shows_paper_difference_and_interval():
    entries = findings.summarise("spiral", 0.05, planted())
    made = findings.tables(
        {
            "environment": ENVIRONMENT,
            "cells": entries,
            "by_level": [],
            "curves": [],
        }
    )
    row = made["synthetic"].splitlines()[2]
    off = (65.5 - 93.90) / 0.90
    # Gains 10 and 20: mean 15, sd 7.07; t(0.975, 1) = 12.706 over sqrt(2).
    for part in ("65.50 (7.78)", "93.90 (0.90)", f"{off:+.1f}", "+15.00 ± 63.53"):
        assert part in row
    assert "0 of 4 accuracies are within two" in made["synthetic"]


def test_paper_table_adds_up_to_the_printed_columns():
    # Sums of the nine entries of each column of the table as printed.
    printed = {False: (784.73, 814.64, 1.51), True: (799.88, 815.61, 1.43)}
    assert len(findings.PAPER) == 18
    for early_stopping, sums in printed.items():
        rows = [v for k, v in findings.PAPER.items() if k[2] == early_stopping]
        np.testing.assert_allclose(np.sum(rows, 0)[:, 0], sums, atol=1e-9)


def test_second_descent_is_found_where_it_is():
    epochs = np.arange(300.0)
    double = (
        0.2 + np.exp(-epochs / 10) + 0.8 * np.exp(-(((epochs - 120) / 30) ** 2)) + 0.3
    )
    found = findings.second_descent(double)
    assert found is not None
    assert 20 < found.trough < 80
    assert abs(found.peak - 120) < 5
    assert found.second_trough > 180
    assert findings.second_descent(np.exp(-epochs / 50)) is None  # falls
    rising = 0.5 + np.exp(-epochs / 10) + epochs / 300
    assert findings.second_descent(rising) is None  # never falls again
    noise = np.random.default_rng(0).normal(0, 0.02, 300)
    assert findings.second_descent(1 + noise) is None


def test_synthetic_figures_say_where_there_is_no_second_descent(tmp_path):
    loss = (0.3 + np.exp(-np.arange(60.0) / 5)).tolist()
    cell = {"data": "spiral", "noise": 0.1, "level": [0.0, 0.1]}
    cell |= {"test_accuracy_last": [0.8, 0.9], "test_accuracy_best": [0.85, 0.9]}
    curves = [
        {"data": "spiral", "noise": 0.1, "level": level, "test_loss": loss}
        for level in (0.0, 0.1)
    ]
    drawn = findings.figures({"by_level": [cell], "curves": curves})
    assert set(drawn) == {"synthetic-levels", "synthetic-curves"}
    labels = [
        text.get_text()
        for text in drawn["synthetic-curves"].axes[0].get_legend().get_texts()
    ]
    assert labels == [
        "no flooding: no second descent",
        "level 0.10: no second descent",
    ]
    for key, fig in drawn.items():
        fig.savefig(tmp_path / f"{key}.png")
