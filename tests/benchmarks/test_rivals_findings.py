"""What the tables of the rivals say of recorded rows."""

import json
from typing import Any

import numpy as np
import pytest

from benchmarks import report, rivals, statistics
from benchmarks.rivals import compared, methods
from benchmarks.rivals.methods import METHODS

GAINS = {"plain": 0, "sam": 3, "forward": 9, "flooding": -4, "band": 1, "floor": 12}
NOISE = (0.0, 0.5, -0.25, 0.1)  # by seed
RULES = ("wave", "evidence")


def words(values):
    return " ".join(f"{value:.5f}" for value in values)


def made_up(piece, *, more=0.0) -> dict[str, Any]:
    """Four seeds; the better a configuration validates, the better it is, by 10."""
    spread = np.linspace(-10, 0, 20)
    rows: list[dict[str, Any]] = []
    for method, gain in GAINS.items():
        for flips in (0.0, 0.2):
            for seed, noise in enumerate(NOISE):
                if not METHODS[method].fits(flips, is_text=False):
                    continue
                base = 70 + (gain + more if method != "plain" else 0) + noise * gain
                accuracy = {"last": base + spread, "best": base + spread + 5}
                stops = ("last", "best")
                if method == "plain":
                    accuracy |= dict.fromkeys(RULES, base + spread - 1)
                    stops += RULES
                rows.append(
                    {
                        "method": method,
                        "flips": flips,
                        "seed": seed,
                        "commit": "abc",
                        "digest": "0",
                        "validation": dict.fromkeys(stops, words(spread)),
                        "accuracy": {s: words(accuracy[s]) for s in stops},
                        "defaults": {
                            f"{schedule}/{stop}/{readout}": f"{base - 6:.2f} 1.0"
                            for stop in {*stops} - {"best"}
                            for schedule in methods.SCHEDULES
                            for readout in compared.READOUTS
                        },
                    }
                )
    size = {"train": 60, "validation": 60, "test": 58, "steps": 600, "batch": 20}
    return {
        "piece": piece,
        "data": piece,
        "pool": 1000,
        "methods_tried": list(GAINS),
        "protocol": {**size, "seeds": 4, "flips": (0.0, 0.2)},
        "rows": rows,
        "environment": dict.fromkeys(("jax", "optax", "cpu_count", "cpu")),
    }


def test_findings_compare_by_data_sets_what_was_tried():
    payload = {
        "pieces": [made_up("wine"), made_up("iris", more=1.0), made_up("digits")]
    }
    found = compared.Findings(payload)
    assert [s.title for s in found.noisy] == ["wine, 20%", "iris, 20%", "digits, 20%"]
    wine = found.noisy[0]
    # one try: the mean of -10 to 0; of 20 draws with replacement the closed form
    assert wine.tried("plain", 1, "end").mean() == pytest.approx(65, abs=0.01)
    i = np.arange(1, 21)
    weights = (i / 20) ** 20 - ((i - 1) / 20) ** 20
    best = float((weights * np.linspace(-10, 0, 20)).sum())
    assert wine.tried("plain", 20, "early").mean() == pytest.approx(75 + best, abs=0.01)
    assert wine.fixed(*compared.PLAIN) == pytest.approx([64] * 4)
    # SAM over plain: 3, 4, 3 points at every budget, times the noise of the seeds
    sam, plain = (found.gain_of_tries(m, 4, "end") for m in ("sam", "plain"))
    gain = sam - plain
    assert gain == pytest.approx(3 * (1 + np.mean(NOISE)) + 1 / 3, abs=0.01)
    # all are shifted alike: so the best of ours (the floor, 12) less forward (9)
    standing = found.standings()["told"]["end"]
    assert standing.mean == pytest.approx(3 * (1 + np.mean(NOISE)), abs=0.01)
    assert standing.freedom == 2  # of three data sets
    by_hand = [3 * (1 + np.array(NOISE))] * 3
    assert standing.error == pytest.approx(
        statistics.clustered(
            {"a": by_hand[:1], "b": by_hand[1:2], "c": by_hand[2:]}
        ).error,
        rel=1e-6,
    )
    # nobody is told: the band (1) less SAM (3); bare flooding (-4) less SAM
    assert found.standings()["untold"]["early"].mean < -1.5
    assert found.standings()["bare"]["end"].mean == pytest.approx(
        -7 * (1 + np.mean(NOISE)), abs=0.01
    )
    # on right labels nobody is told anything: flooding's best is the band
    assert found.standings()["all"]["clean/end"].mean == pytest.approx(
        -2 * (1 + np.mean(NOISE)), abs=0.01
    )
    added = found.added()["plain"]["end"]
    assert added.mean == pytest.approx(1 + np.mean(NOISE) + 1 / 3, abs=0.01)
    assert set(found.added()) == {"plain"}  # no other pair was run


def test_seeds_that_not_every_method_has_run_are_left_out():
    piece = made_up("wine")
    piece["rows"] = [
        row for row in piece["rows"] if (row["method"], row["seed"]) != ("band", 2)
    ]
    (clean, noisy) = compared.settings_of(piece)
    assert clean.seeds == noisy.seeds == [0, 1, 3]
    few = (1, 3)
    piece["rows"] = [row for row in piece["rows"] if row["seed"] not in few]
    assert compared.settings_of(piece) == []  # one seed cannot choose and judge


def test_tables_say_what_holms_correction_lets_them():
    payload = {"pieces": [made_up("wine"), made_up("digits")]}
    made = rivals.tables(payload)
    pieces = made["rivals-pieces"]
    assert "| wine | 60, 60, 58 | 600 of 20 | 0%, 20% | 4 of 4 | 800 | abc |" in pieces
    assert made["rivals-spaces"].count("\n") > 20
    for table in made.values():
        assert table.startswith("| ")
        assert "commit abc" in table
    surely = statistics.Effect(2.0, 0.01, 8)
    hardly = statistics.Effect(2.0, 0.8, 8)  # p = .037 alone, .074 after Holm's step
    judged = rivals.judged({"a": surely, "b": hardly, "c": statistics.Effect(0, 1, 8)})
    assert judged["a"] == "+2.0 ± 0.0, **ahead**"
    assert judged["b"] == "+2.0 ± 1.8"
    standings = rivals.flat(compared.Findings(payload).standings()).values()
    seen = [one for one in standings if np.isfinite(one.mean)]
    above, below = statistics.verdicts(one.interval for one in seen)
    assert f"Of {len(seen)} differences Holm's steps leave " in made["rivals-standing"]
    assert f"of {above} lie above 0 and those of {below} " in made["rivals-standing"]
    assert rivals.figures(payload).keys() == {"rivals"}


def test_report_merges_the_pieces_of_a_folder(tmp_path):
    for name in ("wine", "digits"):
        record_path = tmp_path / "rivals" / f"{name}.json"
        record_path.parent.mkdir(exist_ok=True)
        record_path.write_text(json.dumps(made_up(name)))
    ((name, module, payload),) = report.records(tmp_path)
    assert name == "rivals"
    assert module is rivals
    assert [piece["piece"] for piece in payload["pieces"]] == ["digits", "wine"]
