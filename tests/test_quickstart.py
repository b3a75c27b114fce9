"""The newcomer's first command, and the agreement of pages and results."""

import json

import jax.numpy as jnp
import pytest

pytest.importorskip("sklearn", reason="the quickstart needs the extra `bench`")

from benchmarks import __main__ as command, quickstart, record, report


def test_quickstart_smoke_shows_that_the_forms_coincide(tmp_path, capsys):
    command.main(["quickstart", "--smoke", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "quickstart.json").read_text())
    assert result["largest_parameter_difference_between_forms"] < 1e-9
    assert [row["form"] for row in result["rows"]] == [
        "plain",
        "loss form",
        "optax form",
    ]
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert quickstart.table(result["rows"]) in capsys.readouterr().out
    assert jnp.zeros([]).dtype == jnp.float32  # the precision is put back


def test_committed_quickstart_reached_its_levels_and_lowered_the_test_loss():
    rows = record.read("quickstart")["rows"]
    plain = rows[0]
    for row in rows[1:]:
        assert row["train_loss"] == pytest.approx(row["level"], abs=0.02)
        assert row["test_loss"] < plain["test_loss"]
        assert row["test_accuracy"] > plain["test_accuracy"]


def test_listing_names_every_benchmark(capsys):
    command.main([])
    listing = capsys.readouterr().out
    assert "quickstart" in listing
    assert quickstart.__doc__.partition("\n")[0] in listing


def test_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="No benchmark named 'quick'; there are: "):
        command.main(["quick"])


def test_pages_agree_with_the_results():
    assert report.check() == []


def test_a_changed_number_in_a_page_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    text = (record.REPOSITORY / "README.md").read_text()
    (tmp_path / "README.md").write_text(
        text.replace("| plain | - | 0.0", "| plain | - | 0.1")
    )
    assert "README.md: table quickstart differs from its result" in report.check(
        tmp_path, record.RESULTS
    )
