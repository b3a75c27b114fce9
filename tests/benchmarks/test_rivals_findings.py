"""The configurations, the rows that are kept, and what the tables say of them."""

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import record, report, rivals, statistics
from benchmarks.rivals import compared, findings, methods, settings
from benchmarks.rivals.methods import METHODS


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("flips", [0.0, 0.2])
def test_every_method_tries_as_many_configurations_of_the_same_rates(flips, classes):
    shared = None
    for name, method in METHODS.items():
        if method.of or not method.fits(flips, is_text=False):
            continue
        recipes = method.recipes(flips, classes)
        drawn = [one for key, one in recipes.items() if key not in methods.SCHEDULES]
        assert len(drawn) == 20, name
        assert len(set(drawn)) == 20, name
        shared = shared or [(one.rate, one.cosine) for one in drawn]
        assert [(one.rate, one.cosine) for one in drawn] == shared
        for one in recipes.values():
            assert 2e-4 <= one.rate <= 2e-2
            assert (one.level > settings.OFF or one.of_estimate > 0) == method.ours
            assert one.assumed == (flips if name == "forward" else 0)
            assert one.band in (0.0, 0.2)
        assert (len(recipes) - 20) == (0 if method.defaults is None else 2)
    assert shared is not None
    assert sum(cosine for _, cosine in shared) in (9, 10, 11)
    # evenly in the logarithm: a Halton sequence leaves no fifth of it out
    places = np.log(np.array([rate for rate, _ in shared]) / 2e-4) / np.log(100)
    assert set(np.bincount((5 * places).astype(int))) <= {3, 4, 5}


def test_defaults_of_ours_are_the_recommended_recipe():
    one = METHODS["floor"].recipes(0.2, 10)["constant"]
    floor = -0.8 * np.log(0.8) - 0.2 * np.log(0.2 / 9)
    assert one.level == pytest.approx(floor, rel=1e-6)
    assert (one.rate, one.band, one.cosine) == (1e-3, 0.2, 0.0)
    estimated = METHODS["estimated"].recipes(0.2, 10)["cosine"]
    assert (estimated.of_estimate, estimated.band, estimated.cosine) == (1, 0.2, 1)
    assert METHODS["flooding"].defaults is METHODS["band"].defaults is None


def test_entries_are_of_the_readout_that_validates_better():
    # two defaults, three drawn; stops, readouts, columns
    reached = np.zeros((5, 2, 2, 4))
    reached[2:, 0, :, 0] = [[0.5, 0.4], [0.6, 0.6], [0.9, 0.2]]
    reached[3, 0, :, 1] = [0.7, 0.3]  # equal accuracies: the lower loss
    reached[4, 0, 0, 1] = np.nan  # diverged
    reached[..., 2] = np.arange(20).reshape(5, 2, 2) / 100
    reached[0, 0, :, 3] = 1.25, 2.5
    names = ["constant", "cosine", "0", "1", "2"]
    found = rivals.entries(METHODS["band_sam"], names, reached)
    assert found["validation"]["last"] == "50.00000 59.99970 20.00000"
    assert found["accuracy"]["last"] == "8.00 13.00 17.00"
    assert found["defaults"]["constant/last/averaged"] == "1.0000 2.5000"
    assert set(found["defaults"]) == {
        f"{name}/last/{readout}"
        for name in ("constant", "cosine")
        for readout in ("last", "averaged")
    }
    bare = rivals.entries(METHODS["flooding"], names, reached)
    assert bare["accuracy"]["last"] == "8.00 12.00 16.00"  # its last weights alone
    assert bare["validation"]["last"].endswith(" -1.00000")


@pytest.mark.slow  # compiles four kinds of runs
def test_resumed_piece_reads_what_is_kept_and_redoes_what_is_changed(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", "")
    small = settings.SIZES["wine"]._replace(steps=4, seeds=1, flips=(0.2,))
    monkeypatch.setitem(rivals.SIZES, "wine", small)
    monkeypatch.setattr(rivals, "Constants", lambda: settings.SMOKE)
    parser = record.arguments("rivals", rivals.__doc__)
    rivals.options(parser)
    words = ["wine", "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    args = parser.parse_args([*words, "--methods", "plain", "estimated"])
    first = rivals.measure(args)
    kept = (tmp_path / "wine.jsonl").read_text()
    assert [json.loads(line) for line in kept.splitlines()] == first["rows"]
    assert rivals.measure(args) == first
    assert (tmp_path / "wine.jsonl").read_text() == kept
    # from the record alone, and one seed more
    (tmp_path / "wine.jsonl").unlink()
    record.write("rivals/wine", first, tmp_path / "out")
    args = parser.parse_args(
        [*words, "--methods", "plain", "estimated", "--seeds", "2"]
    )
    more = rivals.measure(args)
    assert more["rows"][:2] == first["rows"]
    assert [row["seed"] for row in more["rows"]] == [0, 0, 1, 1]
    assert len((tmp_path / "wine.jsonl").read_text().splitlines()) == 2
    args.minutes = 1e-9
    monkeypatch.setitem(rivals.SIZES, "wine", small._replace(steps=6))
    assert rivals.measure(args)["rows"] == []  # of other steps, and out of time


GAINS = {"plain": 0, "sam": 3, "forward": 9, "flooding": -4, "band": 1, "floor": 12}
NOISE = (0.0, 0.5, -0.25, 0.1)  # by seed
RULES = ("wave", "evidence")


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
                        "validation": {s: rivals.words(spread, "%.5f") for s in stops},
                        "accuracy": {
                            s: rivals.words(accuracy[s], "%.2f") for s in stops
                        },
                        "defaults": {
                            f"{schedule}/{stop}/{readout}": f"{base - 6:.2f} 1.0"
                            for stop in {*stops} - {"best"}
                            for schedule in methods.SCHEDULES
                            for readout in compared.READOUTS
                        },
                    }
                )
    size = settings.SIZES[piece]._replace(flips=(0.0, 0.2))
    return {
        "piece": piece,
        "data": piece,
        "pool": 1000,
        "methods_tried": list(GAINS),
        "protocol": size._asdict(),
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
    made = findings.tables(payload)
    pieces = made["rivals-pieces"]
    assert "| wine | 60, 60, 58 | 600 of 20 | 0%, 20%, 40% | 0 of 4 |" in pieces
    assert "| text | 256, 64, 256 | 600 of 16 | 0%, 2%, 10% | **missing** |" in pieces
    assert made["rivals-spaces"].count("\n") > 20
    for table in made.values():
        assert table.startswith("| ")
        assert "commit abc" in table
    surely = statistics.Effect(2.0, 0.01, 8)
    hardly = statistics.Effect(2.0, 0.8, 8)  # p = .037 alone, .074 after Holm's step
    judged = findings.judged(
        {"a": surely, "b": hardly, "c": statistics.Effect(0, 1, 8)}
    )
    assert judged["a"] == "+2.0 ± 0.0, **ahead**"
    assert judged["b"] == "+2.0 ± 1.8"
    standings = findings.flat(compared.Findings(payload).standings()).values()
    seen = [one for one in standings if np.isfinite(one.mean)]
    above, below = statistics.verdicts(one.interval for one in seen)
    assert f"Of {len(seen)} differences Holm's steps leave " in made["rivals-standing"]
    assert f"of {above} lie above 0 and those of {below} " in made["rivals-standing"]
    assert findings.figures(payload).keys() == {"rivals"}


def test_report_merges_the_pieces_of_a_folder(tmp_path):
    for name in ("wine", "digits"):
        record_path = tmp_path / "rivals" / f"{name}.json"
        record_path.parent.mkdir(exist_ok=True)
        record_path.write_text(json.dumps(made_up(name)))
    ((name, module, payload),) = report.records(tmp_path)
    assert name == "rivals"
    assert module is rivals
    assert [piece["piece"] for piece in payload["pieces"]] == ["digits", "wine"]
