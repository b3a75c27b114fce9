"""What is timed on a device, tried on a small model on the CPU."""

import jax
import pytest

from benchmarks import __main__ as command, accelerator
from benchmarks.accelerator import SMOKE, WINDOWS


def test_without_an_accelerator_it_says_so_and_stops(tmp_path, capsys):
    if jax.default_backend() != "cpu":
        pytest.skip("there is an accelerator")
    command.main(["accelerator", "--out", str(tmp_path)])
    assert capsys.readouterr().out == (
        "Skipped: no GPU or TPU here. `--smoke` measures a little on the CPU.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_forms_agree_after_steps_up_and_down():
    rows = accelerator.agreement(SMOKE.models["mlp"], "float32")
    found = {row["form"]: row for row in rows}
    assert found.keys() == {*accelerator.FLOODED, WINDOWS}
    assert 0 < found["optax form"]["below"] == found["wrapper"]["below"] < 20
    assert max(row["difference"] for row in rows) < 1e-4


def test_distance_is_in_units_of_the_way():
    start, end = {"w": jax.numpy.zeros(2)}, {"w": jax.numpy.array([0.0, 4.0])}
    other = {"w": jax.numpy.array([0.5, 3.0])}
    assert accelerator.distance(other, end, start) == 0.25
