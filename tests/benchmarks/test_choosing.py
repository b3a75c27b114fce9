"""What the rules give, from the recorded columns; the share of wrong labels, run."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import choosing, pools, statistics, study
from benchmarks.choosing import findings, wrong_labels


def make_payload():
    """Three settings of two data sets, and what grid, floor and its average gain."""
    given = {
        "a": ("wine", 0.2, None, [4.0, 5.0, 6.0], [3.0, 5.0, 5.5], [1.0, 2.0, 3.0]),
        "b": ("wine", 0.4, 10, [1.9, 2.0, 2.1], [2.0, 3.0, 4.0], [5.0, 5.0, 8.0]),
        "c": ("spiral", 0.1, 10, [-1.0, 0.0, 1.0], [-2.0, -2.1, -2.2], [0.0, 1.0, 2.0]),
        "d": ("spiral", 0.0, None, [0.0, 0.0, 0.3], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]),
    }
    rows = []
    for name, (data, flips, batch, grid, floor, average) in given.items():
        gain = {rule: [0.0, 0.0, 0.0] for rule in ["plain", *findings.RULES]}
        gain |= {"grid": grid, "floor": floor, "floor_average": average}
        reached = {
            rule: {
                "accuracies": [60.0 + one for one in gains],
                "losses": [1.0, 2.0, 3.0],
                "ece": 0.1,
                "cost": 3.0 if rule == "grid" else 1.0,
            }
            for rule, gains in gain.items()
        }
        setting = {"data": data, "flips": flips, "optimizer": "adam", "batch": batch}
        setting |= {"setting": name, "pair": False, "development": name == "a"}
        rows.append(setting | {"rules": reached})
    sizes = {"wine": [60, 60, 1000], "spiral": [200, 200, 1000]}
    protocol = {"seeds": 3, "grid": [0.1, 0.2], "sizes": sizes}
    environment = dict.fromkeys(("command", "dirty", "jax", "optax", "cpu"), "x")
    environment |= {"commit": "0" * 40, "cpu_count": 2}
    return {"settings": rows, "protocol": protocol, "environment": environment}


def test_gains_are_means_over_all_noisy_settings_with_data_sets_as_the_unit():
    payload = make_payload()
    noisy, mini = (findings.chosen(payload, group) for group in ("all", "mini"))
    own, grid = (4.5 + 3 - 2.1) / 3, (5 + 2 + 0) / 3
    assert findings.over_data(noisy, "floor").mean == pytest.approx(own)
    assert findings.share(noisy, "floor") == pytest.approx(own / grid)
    assert findings.over_data(mini, "floor").mean == pytest.approx((3 - 2.1) / 2)
    rows = {s["setting"]: findings.gains(s, "floor") for s in payload["settings"]}
    due = statistics.clustered({"wine": [rows["a"], rows["b"]], "spiral": [rows["c"]]})
    assert findings.over_data(noisy, "floor").interval == pytest.approx(due.interval)

    def half(name):
        (setting,) = (s for s in payload["settings"] if s["setting"] == name)
        return findings.in_setting(payload, setting, "floor").interval.half

    # Of wine's 178 examples 58 are tested; the spiral has no pool.
    wide = statistics.corrected(rows["b"], 58 / 120).interval
    assert half("b") == pytest.approx(wide.half)
    assert half("c") == pytest.approx(statistics.interval(rows["c"]).half)


def test_the_rule_of_the_weights_is_chosen_on_other_data_sets():
    payload = make_payload()
    noisy = findings.chosen(payload, "all")
    a, b, c = noisy
    # Wine's mini-batches do best with the average, the spiral's too.
    assert findings.without(noisy, b) == findings.without(noisy, c) == "floor_average"
    worse = {**c, "rules": {**c["rules"], "floor": c["rules"]["floor_average"]}}
    worse["rules"]["floor_average"] = c["rules"]["floor"]
    assert findings.without([a, b, worse], b) == "floor"
    assert findings.without([a, b, worse], worse) == "floor_average"
    strong = {**c, "rules": {**c["rules"], "floor": {"accuracies": [200.0] * 3}}}
    assert findings.without([b, c, strong], c) == "floor_average"  # of one data set
    assert [findings.by_batch(s) for s in noisy] == ["floor"] + ["floor_average"] * 2


def test_tables_say_where_flooding_is_off_and_hold_every_rule():
    made = findings.tables(make_payload())
    rule = made["choosing"].splitlines()
    assert len(findings.RULES) == len([line for line in rule if "|" in line]) - 2
    floor = next(line for line in rule if "share known | last" in line)
    assert floor.split(" | ")[-3] == "off"
    help_lines = made["choosing-help"].splitlines()
    assert help_lines[2].startswith("| none | 1 | off | +0.0 (0, 0) |")
    # On mini-batches the averaged weights: (6 + 1) / 2.
    assert help_lines[-1].startswith("| 10 to 40 %, mini-batches | 2 | +3.5 (")


@pytest.mark.parametrize("name", wrong_labels.SIZES)
def test_the_share_of_wrong_labels_is_asked_of_draws_with_exact_flips(name):
    key, size = jax.random.key(3), wrong_labels.SIZES[name]
    clean, noisy = (wrong_labels.drawn(name, share, key) for share in (0.0, 0.3))
    np.testing.assert_array_equal(clean[0], noisy[0])
    assert len(clean[0]) == len(clean[1]) == size
    assert (clean[1] != noisy[1]).sum() == 0.3 * size
    if name in ("digits", "wine", "breast_cancer"):
        pool_x, pool_y = pools.load(name)
        true = {row.tobytes(): y for row, y in zip(pool_x, pool_y, strict=True)}
        x = [np.asarray(row).tobytes() for row in clean[0]]
        assert len(set(x)) == len(x)
        assert [true[row] for row in x] == np.asarray(clean[1]).tolist()


@pytest.mark.slow
def test_the_share_of_wrong_labels_has_a_record_of_its_own(tmp_path):
    study.conduct(choosing, ["--wrong-labels", "--smoke", "--out", str(tmp_path)])
    payload = json.loads((tmp_path / "choosing-wrong-labels.json").read_text())
    (row,) = payload["wrong_labels"]
    assert (row["data"], row["flips"], len(row["half"])) == ("wine", 0.2, 2)
    table = choosing.tables(payload)["choosing-wrong-labels"]
    mean, sd = 100 * np.mean(row["half"]), 100 * np.std(row["half"], ddof=1)
    assert f"| wine (60) | {mean:.1f} ({sd:.1f}) |" in table
    part = payload["subset"]
    more = 100 * np.subtract(part["part"], part["whole"])
    assert f"{more.mean():+.1f} ({more.std(ddof=1):.1f}) points more" in table
    annotator = payload["annotator"]
    assert np.mean(annotator["wrong"]) > 2 * np.mean(annotator["half"])
    assert choosing.figures(payload) == {}
    assert wrong_labels.subset(0) == wrong_labels.subset(0)
