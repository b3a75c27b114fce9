"""The verdicts of unlearning: paired, counted by cell, of the form named before."""

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")
from benchmarks import unlearning
from benchmarks.unlearning import findings, measures, settings, training
from benchmarks.unlearning.methods import METHODS

CONSTANTS = settings.Constants(
    rates=(1e-2, 3e-2), factors=(0.5,), horizons=(2, 7), checks=(1, 2, 5, 7), relearn=60
)


def made_up():
    """Two seeds of one setting: gaps at two horizons of one rate."""
    gaps = {
        "retain": ([5.0, 5.2], [5.0, 5.2]),
        "npo": ([1.0, 3.0], [9.0, 9.2]),
        "reflect_ranked": ([2.0, 2.2], [2.0, 2.2]),
        "clamp_ranked": ([2.1, 2.1], [1.0, 1.2]),
    }
    other = {c: [0.5, 0.5] for c in (*measures.COLUMNS, *measures.DEEP)}
    rows = [
        {"method": m, "at": {"end": {"gap": [7.0, 7.1]} | other}}
        for m in training.MODELS
    ]
    for method, (first, second) in gaps.items():
        at = {"10": {"gap": first} | other, "30": {"gap": second} | other}
        at |= {"stopped": {"gap": first}, "oracle": {"gap": [0.5, 0.6]}}
        row = {"method": method, "rate": 0.1, "factor": 1.0, "at": at}
        rows.append(row | {"course": [1.0, 2.0]})
    setting = {"setting": "images", "title": "images", "tau": [0.5, 0.6]}
    protocol = {"rates": [0.1], "horizons": [10, 30], "checks": [10, 30], "factors": []}
    return {
        "protocol": protocol,
        "titles": {name: method.title for name, method in METHODS.items()},
        "settings": [setting | {"flops": {"retain": 2.0, "npo": 3.0}, "rows": rows}],
        "environment": dict.fromkeys(
            ("commit", "dirty", "command", "jax", "optax", "cpu_count", "cpu")
        ),
    }


def test_verdicts_count_paired_intervals_of_the_form_named_before():
    payload = made_up()
    (setting,) = findings.settings_of(payload)
    # -3 and -3 exactly beside retain only; beside NPO 1, -.8 (an interval that holds 0)
    # and -7; beside the clamp -.1, .1 and then 1, 1, which is farther
    words = lambda other: findings.words(setting.differences("reflect_ranked", other))
    assert words("retain") == "2, 0, 0 (-3.0)"
    assert words("npo") == "1, 1, 0 (-3.5)"
    assert words("clamp_ranked") == "0, 1, 1 (+0.5)"
    assert words("simnpo") == "-"
    assert findings.passes(setting)
    # one cell in which a rival is closer, and it does not pass
    closer = {"gap": [1.0, 1.2]}
    payload["settings"][0]["rows"][3]["at"]["30"] |= closer
    assert not findings.passes(findings.settings_of(payload)[0])
    made = findings.tables(payload)
    assert all(table.startswith("| ") for table in made.values())
    assert "| NPO | 9.1 ± 1.3 |" not in made["unlearning-gaps-images"]
    assert "2.0 ± 12.7 | 9.1 ± 1.3 |" in made["unlearning-gaps-images"]
    assert set(findings.figures(payload)) == {"unlearning"}


def test_row_is_read_at_the_horizons_and_at_the_least_gap():
    course = np.zeros((2, 4, len(measures.COLUMNS)))  # seeds, checks after 1, 2, 5, 7
    loss, retain = (
        measures.COLUMNS.index(c) for c in ("forget_loss", "retain_accuracy")
    )
    course[:, :, loss] = [[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, np.nan]]
    course[:, :, retain] = [[0.9, 0.8, 0.5, 0.1], [0.2, 0.3, 0.8, 0.9]]
    golds = np.zeros((2, len(measures.COLUMNS)))
    golds[:, retain] = 0.9, 0.7
    reached = {"course": course, "stopped": course[:, 2], "stop": np.array([5, 7])}
    reached["deep"] = np.arange(18.0).reshape(2, 3, 3)
    row = unlearning.run_row(reached, golds, CONSTANTS)
    assert row["at"]["2"]["forget_loss"] == [2.0, 4.0]
    assert row["at"]["7"]["forget_loss"] == [4.0, None]
    assert row["at"]["7"]["relearn"] == [3.0, 12.0]
    assert row["at"]["7"]["gap"] == [20.0, 5.0]
    assert row["at"]["stopped"]["step"] == [5.0, 7.0]
    assert row["at"]["stopped"]["attack"] == [7.0, 16.0]
    assert row["at"]["oracle"] == {"gap": [0.0, 2.5], "step": [1.0, 5.0]}
    assert row["course"] == [2.0, 3.0, 4.0, None]


def test_gap_is_the_mean_distance_of_four_measures_in_points():
    seen, gold = np.zeros((2, 2, len(measures.COLUMNS)))
    columns = {name: i for i, name in enumerate(measures.COLUMNS)}
    seen[0, columns["forget_accuracy"]], seen[0, columns["auc"]] = 0.4, 0.7
    gold[0, columns["auc"]], gold[0, columns["kl"]] = 0.5, 9.0
    np.testing.assert_allclose(measures.gap(seen, gold), [15.0, 0.0])
