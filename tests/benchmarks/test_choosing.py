"""The rules' arithmetic is what it says, and the runs are explicit loops."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import choosing, points, statistics, study
from benchmarks.choosing import (
    findings,
    rules,
    runs,
    settings,
    training,
    wrong_labels,
)
from flood_optax import levels

TINY = settings.SMOKE
WINE = settings.Setting("wine", 0.2)


def make_trunk(losses, changed, seen):
    losses = np.array(losses, np.float32)
    return rules.Trunk(losses, losses * 0 + 1, np.array(changed), np.array(seen))


@pytest.mark.parametrize(
    ("changed", "window", "check"),
    [
        ([50, 30, 10, 12, 5, 4], 1, 2),
        ([50, 30, 10, 14, 15, 9], 2, 3),  # means 40, 20, 12, 14.5, 12 from check 1 on
        ([50, 30, 10, 12, 5, 9], 2, 5),  # means 40, 20, 11, 8.5, 7: no minimum
        ([50, 30, 10, 10, 12, 1], 1, 3),  # the last of equals, before it rises
        ([9, 12, 14, 13, 15, 2], 1, 3),  # a rise from the start is no minimum
        ([9, 8, 7, 6], 1, 3),
        ([9, 8], 2, 1),
    ],
)
def test_label_wave_is_the_first_minimum_of_the_moving_average(changed, window, check):
    assert rules.label_wave(np.array(changed, np.float32), window) == check


def test_successive_halving_trains_what_an_explicit_loop_trains():
    rng = np.random.default_rng(0)
    scores = rng.random((5, 8))
    begins, cuts, steps = [0, 0, 8, 3, 16], (0.25, 0.5, 0.75), 24
    alive, trained = list(range(5)), set()
    for check in range(8):
        for level in alive:  # every step of a level, or of the trunk it is still on
            for step in range(3 * check, 3 * check + 3):
                trained.add((level if level and step >= begins[level] else 0, step))
        if (check + 1) / 8 in cuts:
            ranked = sorted(alive, key=lambda i: -scores[i, check])
            alive = ranked[: math.ceil(len(alive) / 2)]
    best = max(alive, key=lambda i: scores[i, -1])
    got, cost = rules.halving(scores, cuts, begins, steps)
    assert got == best
    assert cost == pytest.approx(len(trained) / steps)


def test_halving_takes_the_lowest_of_equals():
    best, cost = rules.halving(np.ones((4, 4)), (0.5,), [0, 0, 0, 0], 8)
    assert (best, cost) == (0, 3.0)  # two whole runs and two halves


def test_a_branch_begins_at_the_last_check_before_the_loss_is_below():
    losses = np.array([0.9, 0.7, 0.5, 0.4, 0.3, 0.1], np.float32)
    assert [rules.leaves(losses, b, 2) for b in (1.0, 0.6, 0.5, 0.35, 0.1)] == [
        0,
        2,
        2,
        4,
        6,
    ]
    assert rules.leaves(losses, -math.inf, 2) == 6


@pytest.mark.filterwarnings("ignore::flood_optax.FloodWarning")  # the first is best
def test_rules_read_off_what_the_checks_have_seen():
    seen = np.array(
        [[0.5, 0.6, 0.61, 1, 2], [0.4, 0.5, 0.62, 3, 4], [0.7, 0.6, 0.3, 5, 6]]
    )
    trunk = make_trunk([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], [9, 4, 6], seen)
    found = rules.plain_rules(trunk, np.arange(5.0), 1)
    np.testing.assert_array_equal(found["plain"].reached, [0.3, 5, 6])
    np.testing.assert_array_equal(found["early_loss"].reached, [0.62, 3, 4])
    np.testing.assert_array_equal(found["early_accuracy"].reached, [0.61, 1, 2])
    np.testing.assert_array_equal(found["label_wave"].reached, [0.62, 3, 4])
    assert found["label_wave"].cost == 1.0  # the rise is seen at the last check
    level = rules.read_off(trunk, dataclasses.replace(TINY, window=1, wave=1))
    assert level["best_loss"] == pytest.approx(0.5)  # the mean of 0.6 and 0.4
    assert level["best_accuracy"] == pytest.approx(0.9)
    assert level["wave"] == pytest.approx(0.5)
    assert level["accordance"] == -math.inf
    flooded = np.array([0, 0.59, 0.9, 7, 8])
    assert rules.keep_better(trunk, flooded, 1.5).reached[0] == 0.61
    flooded[1] = 0.6
    assert rules.keep_better(trunk, flooded, 1.5).reached[0] == 0.9


def test_the_grid_is_chosen_by_validation_and_costs_its_runs():
    ends = np.array([[9, 0.5, 0.1, 1, 1], [9, 0.7, 0.3, 2, 2], [9, 0.7, 0.4, 3, 3]])
    seen = np.repeat(ends[:, None], 4, axis=1)
    seen[1, 2] = [9, 0.8, 0.6, 4, 4]
    averaged = np.array([[9, 0.8, 0.2, 1, 1], [9, 0.7, 0.9, 2, 2], [9, 0.8, 0.5, 3, 3]])
    found = rules.grid_rules(seen, averaged, [0, 2, 6], cuts=(0.5,), steps=8)
    assert found["grid_best"].reached[0] == 0.6
    assert found["grid_average"].reached[0] == 0.2
    assert found["grid"].reached[0] == 0.3
    assert found["grid"].cost == 3
    assert found["grid_shared"].cost == pytest.approx(1 + 6 / 8 + 2 / 8)
    assert found["oracle"].reached[0] == 0.4
    trunk = make_trunk([1.0] * 4, [1] * 4, seen[0])
    better = rules.validated(trunk, ends[1:])
    assert (better.reached[0], better.cost) == (0.3, 3)


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


@pytest.mark.slow  # compiles four trainings
@pytest.mark.parametrize("batch", [None, 10])
def test_a_flooded_run_is_an_explicit_loop(batch):
    setting = dataclasses.replace(WINE, optimizer="sgd", batch=batch)
    runner = runs.Runner(setting, TINY, settings.drawing(setting), None)
    model, keys = runner.model, jax.random.split(jax.random.key(3), 3)
    start = model.start(runner.draw(keys[0]), keys[1])
    batches = model.batches(60, keys[2])
    x, y = start.sets.train
    assert batches.indices.shape == (TINY.steps, batch or 60)
    assert len(np.unique(batches.indices[: 60 // (batch or 60)])) == 60

    params, velocity = start.params, jax.tree.map(jnp.zeros_like, start.params)
    state = start
    for i in range(4):
        at = batches.indices[i]

        def loss_fn(params, at=at):
            logits = model.logits(params, x[at])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y[at]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        level = 1.08  # between the losses of the first steps
        sign = 1 if loss >= level else -1
        velocity = jax.tree.map(lambda v, g, s=sign: 0.9 * v + s * g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batches)
        state, metrics = model.flooded_step(state, one, jnp.float32(level))
        assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
        assert bool(jnp.isnan(metrics["seen"]).all()) == (i % 2 == 0)
    for mine, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


def test_rivals_that_do_nothing_are_plain_training():
    runner = runs.Runner(WINE, TINY, settings.drawing(WINE), None)
    model, keys = runner.model, jax.random.split(jax.random.key(4), 3)
    start = model.start(runner.draw(keys[0]), keys[1])
    batches = model.batches(60, keys[2])
    given = [
        training.Rival(),
        training.Rival(decay=0.5),
        training.Rival(smoothing=0.5),
        training.Rival(gamma=0.2),
        training.Rival(initial=3.0),
    ]
    columns = training.Rival(*map(jnp.array, zip(*given, strict=True)))
    ends = model.rivals(start, batches, jnp.linspace(0.0, 3.0, 60), columns)
    state = start
    for i in range(TINY.steps):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batches)
        state, metrics = model.flooded_step(state, one, jnp.float32(-jnp.inf))
    np.testing.assert_allclose(ends[0], metrics["seen"], rtol=1e-4)
    assert all(abs(float(end[3] - ends[0][3])) > 1e-4 for end in ends[1:])


def test_pairs_flip_to_the_next_class_and_have_the_entropy_of_two():
    pair = dataclasses.replace(WINE, pair=True)
    labels = jnp.array([0, 1, 2] * 10)
    flipped = settings.flip(jax.random.key(0), labels, pair)
    moved = np.asarray((flipped - labels) % 3)
    assert np.bincount(moved).tolist() == [24, 6]
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert runs.floor(pair, 1) == pytest.approx(entropy, rel=1e-6)
    even = float(levels.noise_floor(0.1, 3))
    assert runs.floor(WINE, 0.5) == pytest.approx(even, rel=1e-6)


def test_settings_cover_every_axis_and_have_names_of_their_own():
    every = settings.SETTINGS
    assert len({s.name for s in every}) == len(every)
    assert {s.data for s in every} == settings.SIZES.keys()
    assert {s.optimizer for s in every} == {"adam", "sgd"}
    assert {0.0, 0.1, 0.2, 0.4} <= {s.flips for s in every if not s.development}
    assert {s.pair for s in every} == {s.batch is None for s in every} == {True, False}
    cells = {(s.data, s.flips) for s in every if s.data in points.GENERATORS}
    assert len(cells) == 9
    for setting in every:
        size, batch = settings.SIZES[setting.data][0], setting.batch
        assert size % settings.Constants().folds == 0
        assert (batch or size) % 2 == 0


def test_finished_seeds_are_kept_and_of_one_protocol(tmp_path, monkeypatch):
    draw = settings.drawing(WINE)
    runner = runs.Runner(WINE, TINY, draw, tmp_path)
    key = jax.random.key(5)
    first = runs.outcomes(runner, 0, key)

    def fail(*_):
        raise AssertionError("trains again")

    monkeypatch.setattr(runs.Runner, "train", fail)
    again = runs.outcomes(runner, 0, key)
    for rule, outcome in first.items():
        np.testing.assert_array_equal(outcome.reached, again[rule].reached)
    other = dataclasses.replace(TINY, adam=0.5)
    with pytest.raises(ValueError, match="must be of the same setting and constants"):
        runs.outcomes(runs.Runner(WINE, other, draw, tmp_path), 0, key)
    with pytest.raises(AssertionError, match="trains again"):
        runs.outcomes(runner, 1, key)


def test_the_record_says_what_is_missing(tmp_path, capsys):
    parser = choosing_parser()
    args = parser.parse_args(["--smoke", "--out", str(tmp_path), "--minutes", "0"])
    payload = choosing.measure(args)
    capsys.readouterr()
    name = payload["settings"][0]["setting"]
    assert payload["protocol"]["missing"] == {}
    (setting,) = payload["settings"]
    assert np.isfinite(findings.gains(setting, "floor")).all()
    args.minutes = 1e-9
    late = choosing.measure(args)
    assert late["settings"] == []
    assert late["protocol"]["missing"] == {name: "out of time"}
    assert json.dumps(late)


def choosing_parser():
    from benchmarks import record  # noqa: PLC0415 - as the command does

    parser = record.arguments("choosing", choosing.__doc__)
    choosing.options(parser)
    return parser


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
