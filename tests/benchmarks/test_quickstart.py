"""The newcomer's first command: what it shows, and what it once found."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the quickstart needs the extra `bench`")

from benchmarks import __main__ as command, quickstart, record


def test_quickstart_smoke_shows_that_the_forms_coincide(tmp_path, capsys):
    command.main(["quickstart", "--smoke", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "quickstart.json").read_text())
    assert result["largest_parameter_difference_between_forms"] < 1e-9
    assert [row["form"] for row in result["rows"]] == [
        "plain",
        "loss form",
        "optax form",
    ]
    assert (tmp_path / "quickstart.svg").stat().st_size > 10_000
    shown = capsys.readouterr()
    assert quickstart.tables(result)["quickstart"] in shown.out
    assert f"Drew {tmp_path / 'quickstart.svg'}" in shown.out
    assert "Look at the test loss" in shown.out
    assert not shown.err  # no progress where there is no terminal
    plain, flooded = (np.array(result["curves"][run]) for run in ("plain", "flooded"))
    assert np.isfinite([plain, flooded]).all()  # what is drawn is seen in each epoch
    assert (flooded[:, 1:, 3] > flooded[:, 1:, 1]).all()  # at first an average lags
    assert jnp.zeros([]).dtype == jnp.float32  # the precision is put back


def test_committed_quickstart_reached_its_levels_and_lowered_the_test_loss():
    rows = record.read("quickstart")["rows"]
    plain = rows[0]
    for row in rows[1:]:
        assert row["train_loss"] == pytest.approx(row["level"], abs=0.02)
        assert row["test_loss"] < plain["test_loss"]
        assert row["test_accuracy"] > plain["test_accuracy"]


def planted(second_form):
    """Two seeds of plain training, best at its second epoch, and one level, twice."""
    plain = [[[2.0, 1.5, 0.3, 1.6], [1.0, 0.5, 0.8, 1.2], [0.1, 0.9, 0.7, 0.8]]]
    plain += [[[2.2, 1.7, 0.1, 1.8], [1.4, 0.9, 0.6, 1.4], [0.3, 0.8, 0.5, 1.0]]]
    flooded = np.array([[[1.0, 0.6, 0.85, 0.5]], [[0.2, 0.8, 0.75, 0.6]]])
    rows = [
        quickstart.summarise("plain", None, np.array(plain)),
        quickstart.summarise("loss form", 0.4, flooded),
        quickstart.summarise("optax form", 0.4, flooded + second_form),
    ]
    curves = {"level": 0.4, "plain": plain, "flooded": flooded.tolist()}
    return {"rows": rows, "curves": curves, quickstart.APART: 9.1e-12}


def test_quickstart_table_has_one_line_for_two_forms_that_print_the_same():
    made = quickstart.tables(planted(second_form=1e-9))["quickstart"]
    lines = made.splitlines()[2:5]
    # The mean test loss, 1.6, 0.7, 0.85, is least at the second epoch; its standard
    # deviation there is .4 / sqrt(2). One of the two flooded losses is below the level.
    assert lines == [
        "| plain | - | 0.200 ± 0.141 | 0.850 ± 0.071 | 0.600 ± 0.141 | 0% |",
        "| plain, stopped at its best epoch, 2 | - | 1.200 ± 0.283 | 0.700 ± 0.283 "
        "| 0.700 ± 0.141 | 0% |",
        "| flooded | 0.4 | 0.600 ± 0.566 | 0.700 ± 0.141 | 0.800 ± 0.071 | 50% |",
    ]
    assert "within 9e-12 of each other" in made
    apart = quickstart.tables(planted(second_form=1e-3))["quickstart"]
    assert apart.count("| flooded | 0.4 |") == 2


def test_quickstart_figure_marks_the_best_epoch_of_plain_training_on_both_panels():
    (figure,) = quickstart.figures(planted(0.0)).values()
    said = {text.get_text() for axis in figure.axes for text in axis.texts}
    assert said == {
        *("train loss 0.20", "test loss 0.85", "train loss 0.60", "test loss 0.70"),
        *("best epoch, 2: 0.70", "averaged weights 0.55"),
    }
    assert [0.55] in [pytest.approx(line.get_ydata()) for line in figure.axes[1].lines]
    for axis in figure.axes:
        assert [0.7, 0.7] in [list(line.get_ydata()) for line in axis.lines]
    (dot,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dot.get_xydata(), [[1, 0.7]])  # drawn from epoch 0
    assert figure.axes[1].get_title() == "flooded at 0.4"
