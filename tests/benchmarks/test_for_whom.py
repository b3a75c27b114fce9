"""The table says what the records hold, chosen and judged by different seeds."""

import json

import numpy as np
import pytest

from benchmarks import for_whom, record, statistics


def reached(**tools):
    return {name: np.array(values, float) for name, values in tools.items()}


def test_one_tool_for_all_settings_is_judged_by_the_other_half_of_the_seeds():
    settings = [
        ("wine", reached(a=[9, 1, 9, 1], b=[5, 5, 5, 5], f=[7, 7, 8, 8])),
        ("digits", reached(a=[9, 1, 9, 1], b=[5, 6, 5, 6], f=[9, 9, 9, 9])),
    ]
    found = for_whom.compared(settings, {"a": "A", "b": "B"}, {"f": "F"})
    # The odd seeds choose b for the even ones, and the even ones choose a for the odd.
    due = statistics.clustered({"wine": [[2, 6, 3, 7]], "digits": [[4, 8, 4, 8]]})
    assert (found.tool, found.form, found.effect) == ("B", "F", due)
    assert for_whom.compared([], {"a": "A"}, {"f": "F"}) is None


def test_every_user_has_a_row_and_says_not_measured_without_a_record():
    table = for_whom.table({})
    lines = table.splitlines()[2:]
    assert len(lines) == len(for_whom.rows({})) == 15
    assert all(line.count("not measured") == 1 for line in lines)
    assert lines[-1].startswith("| train a large model |")


def test_fewer_canaries_and_smaller_gaps_are_ahead():
    rows = [
        {"data": data, "method": m, "canaries": [found, found - 0.01]}
        for data in ("digits", "mnist-5k")
        for m, found in (
            dict.fromkeys(["plain", *for_whom.ATTACKED], 0.5) | {"elr": 0.4}
        ).items()
    ]
    rows += [
        {"data": data, "method": m, "canaries": [0.3, 0.29 + 0.001 * (m == "soft")]}
        for data in ("digits", "mnist-5k")
        for m in for_whom.SHIELDS
    ]
    found = for_whom.membership({"membership": {"rows": rows}})
    assert (found.tool, found.form) == ("early-learning regularisation", "flooding")
    assert found.effect.mean == pytest.approx(10.0)
    gaps = {"retain": [5.0, 6.0], "clamp_each": [2.0, 2.5], "soft_each": [3.0, 3.0]}
    payload = {
        "protocol": {"rates": [1, 2, 3], "horizons": [10, 20, 30]},
        "titles": {name: name for name in gaps},
        "settings": [
            {
                "setting": name,
                "rows": [{"method": "gold", "at": {"end": {}}}]
                + [
                    {"method": m, "rate": 2, "factor": 1.0, "at": {"20": {"gap": gap}}}
                    for m, gap in gaps.items()
                ],
            }
            for name in ("images", "text")
        ],
    }
    found = for_whom.unlearning({"unlearning": payload})
    assert (found.tool, found.form) == ("clamp_each", "soft_each")
    assert found.effect.mean == pytest.approx(-0.75)


def test_a_standing_of_the_rivals_keeps_its_interval():
    effect = statistics.Effect(-3.5, 1.1, 7)
    none = statistics.Effect(float("nan"), float("inf"), 0)
    known = {"all": {"end": effect, "early": none}}
    assert for_whom.rivals(known, "all", "end").effect == effect
    assert for_whom.rivals(known, "all", "early") is None
    assert for_whom.rivals(known, "recipe", "none") is None
    assert for_whom.standings({"rivals": {"rows": []}}) == {}


def test_text_takes_the_configuration_of_the_best_validation():
    def row(method, flips, seed, accuracy):
        kept = {
            "validation": {"last": "0.1 0.9"},
            "accuracy": {"last": f"99 {accuracy}"},
        }
        return {"method": method, "flips": flips, "seed": seed, **kept}

    rows = [
        row(m, flips, seed, value + seed * step)
        for m, value, step in (("plain", 30, 1), ("band", 28, 2), ("elr", 20, 1))
        for flips in (0.0, 0.1)
        for seed in range(4)
        if (m, flips) != ("elr", 0.0)
    ]
    piece = {"piece": "text", "methods_tried": ["plain", "band", "elr"], "rows": rows}
    piece |= {"protocol": {"test": 20}, "pool": 120}
    found = for_whom.text({"rivals": {"pieces": [piece]}})
    assert (found.tool, found.form) == ("plain training", "in a band")
    assert found.effect == statistics.corrected([-2.0, -1.0, 0.0, 1.0], 20 / 100)


def test_rows_of_the_recorded_study_are_recomputed_by_hand():
    payload = record.read("choosing")
    settings = [s for s in payload["settings"] if s["flips"] and s["batch"] is None]
    found = dict(for_whom.rows({"choosing": payload}))[
        "have wrong labels, train to the end on full batches, know their share"
    ]
    means = {
        name: np.mean([np.mean(s["rules"][name]["accuracies"]) for s in settings])
        for name in ("decay", "floor", "floor_average", "plain", "smoothing", "average")
    }
    assert max(means, key=means.get) == "floor"
    assert found.form == "at `noise_floor`, last weights"
    assert found.tool == "weight decay, by validation"
    # The halves agree on both: the mean difference is that of the means.
    assert found.effect.mean == pytest.approx(means["floor"] - means["decay"])
    assert json.dumps(found.effect.freedom) == "5"  # six data sets
