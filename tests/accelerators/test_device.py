"""Flooded steps on a GPU or TPU: times, memory, and that forms agree there too.

    python -m pytest -m gpu

These are the findings of `python -m benchmarks accelerator`, with what they must be.
"""

import jax
import pytest

from benchmarks import accelerator
from benchmarks.accelerator import FULL, STEPS, WINDOWS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() == "cpu",
        reason="no GPU or TPU here: python -m benchmarks accelerator --smoke",
    ),
]
SETTINGS = pytest.mark.parametrize(
    ("model", "dtype"), FULL.settings, ids=[" ".join(one) for one in FULL.settings]
)


@SETTINGS
def test_step_takes_as_long_as_the_plain_one_and_its_buffers(model, dtype):
    times = accelerator.compared_times(
        FULL.models[model], dtype, rounds=20, round_seconds=FULL.round_seconds
    )
    for form, row in times.items():
        assert row["donated"] == row["arrays"], form
    for form in ("loss form", "optax form", "wrapper", WINDOWS):
        # the same step beside itself says what a ratio of 1 looks like here
        noise = abs(times[accelerator.AGAIN]["time_ratio_median"] - 1)
        assert times[form]["time_ratio_median"] <= 1.005 + noise, form


@SETTINGS
def test_forms_agree_with_the_one_liner_and_windows_with_the_large_batch(model, dtype):
    rows = accelerator.agreement(FULL.models[model], dtype)
    assert 0 < rows[1]["below"] < 20  # steps up and down
    for row in rows:
        if dtype == "float32":
            assert row["difference"] <= 1e-3, row
        elif row["form"] != WINDOWS:  # whose gradients are rounded in smaller parts
            assert row["difference"] <= 0.2, row


@pytest.mark.parametrize("form", ["loss form", "optax form", WINDOWS])
def test_no_more_memory_is_held(form):
    model, dtype = FULL.settings[1]
    against = STEPS if form == WINDOWS else "plain"
    own, base = (
        accelerator.held_by(name, model, dtype, smoke=False) for name in (form, against)
    )
    if own is None or base is None:
        pytest.skip("this device does not say how much memory it held")
    assert own <= 1.01 * base


def test_sweep_is_ten_times_as_fast_as_loops():
    rows = {
        row["rival"]: row
        for row in accelerator.compared_sweeps(FULL.levels, FULL.seeds, FULL.steps)
    }
    swept = rows["sweep.run, vmap"]
    assert swept["times_faster"] >= 10
    assert swept["times_faster_than_argument"] >= 10
    assert swept["difference"] <= 1e-3
