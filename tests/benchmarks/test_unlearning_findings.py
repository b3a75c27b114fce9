"""The verdicts of unlearning: paired, counted by cell, of the form named before."""

from benchmarks import unlearning


def made_up():
    """Two seeds of one setting: gaps at two horizons of one rate."""
    gaps = {
        "retain": ([5.0, 5.2], [5.0, 5.2]),
        "npo": ([1.0, 3.0], [9.0, 9.2]),
        "reflect_ranked": ([2.0, 2.2], [2.0, 2.2]),
        "clamp_ranked": ([2.1, 2.1], [1.0, 1.2]),
    }
    other = {c: [0.5, 0.5] for c in unlearning.MEASURES if c != "gap"}
    rows = [
        {"method": m, "at": {"end": {"gap": [7.0, 7.1]} | other}}
        for m in unlearning.MODELS
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
        "titles": {
            name: name.upper()
            for name in [*gaps, *unlearning.UNTUNED, *sum(unlearning.PAIRS, ())]
        },
        "settings": [setting | {"flops": {"retain": 2.0, "npo": 3.0}, "rows": rows}],
        "environment": dict.fromkeys(
            ("commit", "dirty", "command", "jax", "optax", "cpu_count", "cpu")
        ),
    }


def test_verdicts_count_paired_intervals_of_the_form_named_before():
    payload = made_up()
    (setting,) = unlearning.settings_of(payload)
    # -3 and -3 exactly beside retain only; beside NPO 1, -.8 (an interval that holds 0)
    # and -7; beside the clamp -.1, .1 and then 1, 1, which is farther
    words = lambda other: unlearning.words(setting.differences("reflect_ranked", other))
    assert words("retain") == "2, 0, 0 (-3.0)"
    assert words("npo") == "1, 1, 0 (-3.5)"
    assert words("clamp_ranked") == "0, 1, 1 (+0.5)"
    assert words("simnpo") == "-"
    assert unlearning.passes(setting)
    # one cell in which a rival is closer, and it does not pass
    closer = {"gap": [1.0, 1.2]}
    payload["settings"][0]["rows"][3]["at"]["30"] |= closer
    assert not unlearning.passes(unlearning.settings_of(payload)[0])
    made = unlearning.tables(payload)
    assert all(table.startswith("| ") for table in made.values())
    assert "| NPO | 9.1 ± 1.3 |" not in made["unlearning-gaps-images"]
    assert "2.0 ± 12.7 | 9.1 ± 1.3 |" in made["unlearning-gaps-images"]
    assert set(unlearning.figures(payload)) == {"unlearning"}
