"""What the rules give, from the recorded columns."""

import pytest

from benchmarks import statistics
from benchmarks.choosing import findings


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
