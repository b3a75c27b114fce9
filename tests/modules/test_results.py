"""What a sweep found: choosing a level, and taking the result elsewhere."""

import inspect
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from flood_optax import FloodWarning, levels, sweep
from flood_optax.sweep import Result

NAN = np.nan
LEVELS = np.array([0.2, 0.0, 0.1])  # not in order, on purpose
SCORES = np.array([[0.8, 0.5, NAN], [0.8, 0.7, 0.2], [0.6, 0.9, 0.3]])
CURVES = np.arange(24.0).reshape(3, 2, 4)


def result(**metrics):
    return Result(LEVELS, metrics or {"acc": SCORES})


def ignoring_nan(function, *args, **kwargs):
    with pytest.warns(FloodWarning, match="which are not chosen"):
        return function(*args, **kwargs)


@pytest.mark.parametrize("function", [Result.best, Result.best_overall, levels.at_best])
def test_what_is_good_has_no_default(function):
    # A default would return the worst level of a loss without a word.
    mode = inspect.signature(function).parameters["mode"]
    assert mode.default is inspect.Parameter.empty


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("seed", range(5))
def test_best_equals_a_search_in_python(seed, mode):
    """The lowest of equal levels; the worst number before NaN; NaN where all are."""
    rng = np.random.default_rng(seed)
    levels = rng.permutation(np.linspace(-1, 1, 7))
    scores = rng.choice([-np.inf, 0, 1, 2, np.inf], (7, 20))  # many ties
    scores[rng.random(scores.shape) < 0.3] = NAN
    scores[:, 0], scores[1:, 1], scores[1:, 2] = NAN, NAN, NAN
    scores[0, 1:3] = -np.inf, np.inf
    best = ignoring_nan(Result(levels, {"m": scores}).best, "m", mode)
    for column, chosen in zip(scores.T, best, strict=True):
        pairs = [(s, b) for s, b in zip(column, levels, strict=True) if not np.isnan(s)]
        sign = -1 if mode == "max" else 1
        expected = min(pairs, key=lambda p: (sign * p[0], p[1]), default=(0, NAN))[1]
        np.testing.assert_equal(chosen, expected)


def test_best_warns_of_nan_and_nan_runs_names_them():
    scores = np.array([[NAN, 1.0], [NAN, NAN], [NAN, -np.inf]])
    with pytest.warns(FloodWarning, match="'acc' is NaN in 4 of 6 runs"):
        result(acc=scores).best("acc", "max")
    np.testing.assert_array_equal(
        result(acc=scores).nan_runs("acc"), [[0, 0], [1, 0], [1, 1], [2, 0]]
    )


def test_best_of_a_curve_takes_the_step_asked_for():
    curves = np.array([[[1, 5, 2]], [[3, 3, 3]], [[4, 1, NAN]]], float)
    made = result(acc=curves)
    np.testing.assert_array_equal(made.best("acc", "max", at=0), [0.1])
    np.testing.assert_array_equal(ignoring_nan(made.best, "acc", "max", at=-1), [0.0])
    np.testing.assert_array_equal(made.best("acc", "max", at="best"), [0.2])
    np.testing.assert_array_equal(made.best("acc", "min", at="best"), [0.1])


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, jnp.bfloat16])
def test_best_compares_numbers_in_their_own_dtype(dtype):
    one, two = (0.25, 0.5) if dtype == jnp.bfloat16 else (2**62, 2**62 + 1)
    scores = np.array([[one, two], [two, one], [0, 0]], dtype)
    made = result(count=scores, curve=scores[..., None])
    np.testing.assert_array_equal(made.best("count", "max"), [0.0, 0.2])
    np.testing.assert_array_equal(made.best("count", "min"), [0.1, 0.1])
    np.testing.assert_array_equal(made.best("curve", "max", at="best"), [0.0, 0.2])


def test_best_without_keys_is_one_level():
    made = Result(
        LEVELS, {"loss": np.array([[3, 1], [2, 2], [1, 3.0]])}, ("level", "step")
    )
    np.testing.assert_array_equal(made.best("loss", "min", at=-1), 0.2)
    assert made.best_overall("loss", "min", at=0).level == 0.1


def test_best_overall_is_the_best_mean_with_its_standard_error():
    scores = np.array([[0.9, 0.7, 0.8], [0.8, 0.6, 0.76], [1.0, NAN, 1.0]])
    choice = ignoring_nan(result(acc=scores).best_overall, "acc", "max")
    assert choice.level == 0.2  # 0.1 is better where it is known, but has a NaN
    assert choice.mean == pytest.approx(0.8, rel=1e-12)
    # Deviations .1, -.1, 0: s = sqrt(.02 / 2), divided by sqrt(3).
    assert choice.standard_error == pytest.approx(np.sqrt(0.01 / 3), rel=1e-12)
    assert choice.num_keys == 3


def test_one_standard_error_takes_the_lowest_level_within_it():
    # The mean of level 0 is .72, below .8 - .0577 = .7423; that of 0.1 is .75, within.
    scores = np.array([[0.9, 0.7, 0.8], [0.72] * 3, [0.75] * 3])
    made = result(acc=scores)
    assert made.best_overall("acc", "max").level == 0.2
    careful = made.best_overall("acc", "max", one_standard_error=True)
    assert (careful.level, careful.standard_error) == (0.1, 0.0)
    assert made.best_overall("acc", "min", one_standard_error=True).level == 0.0


def test_one_standard_error_needs_two_keys():
    made = result(acc=SCORES[:, :1])
    assert np.isnan(made.best_overall("acc", "max").standard_error)
    with pytest.raises(ValueError, match="must have two keys at least, got 1"):
        made.best_overall("acc", "max", one_standard_error=True)


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize(
    ("scores", "mode", "level", "mean"),
    [
        ([[1, 2], [np.inf, 3], [4, 4.5]], "max", 0.0, np.inf),
        ([[1, 2], [np.inf, 3], [4, 4.5]], "min", 0.2, 1.5),
        ([[1, 2], [np.inf, 3], [np.inf, np.inf]], "max", 0.0, np.inf),
        ([[np.inf, 2], [NAN, 3], [np.inf, np.inf]], "min", 0.1, np.inf),
        ([[np.inf, -np.inf], [5, 5], [4, 4]], "max", 0.0, 5.0),
        ([[-np.inf, 2], [3, 3], [3, 4]], "min", 0.2, -np.inf),
    ],
)
def test_best_overall_with_infinite_runs(scores, mode, level, mean, careful):
    # Warnings are errors: an infinite run is a result, not a fault of the arithmetic.
    made = result(m=np.array(scores, float))
    call = ignoring_nan if np.isnan(scores).any() else lambda f, *a, **k: f(*a, **k)
    choice = call(made.best_overall, "m", mode, one_standard_error=careful)
    assert (choice.level, choice.mean) == (level, mean)


def test_best_overall_without_a_level_free_of_nan_is_refused():
    scores = np.array([[1, NAN], [NAN, 1], [NAN, NAN]])
    with pytest.raises(ValueError, match="got NaN at every level"):
        ignoring_nan(result(acc=scores).best_overall, "acc", "max")


def test_curves_of_a_level_and_of_one_level_per_key():
    made = result(loss=CURVES)
    np.testing.assert_array_equal(made.curves("loss", 0.1), CURVES[2])
    np.testing.assert_array_equal(made.curves("loss", np.float32(0.1)), CURVES[2])
    np.testing.assert_array_equal(
        made.curves("loss", [0.0, 0.2]), [CURVES[1, 0], CURVES[0, 1]]
    )


def assert_same(ours, theirs):
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.tobytes() == theirs.tobytes()


def test_json_gives_everything_back_to_be_written_to():
    keys = np.array([[0, 2**32 - 1], [7, 8]], np.uint32)
    levels = np.array([-np.inf, 0.1, 1 / 3])
    metrics = {"none": np.zeros((3, 2, 0), np.float32), "curve": CURVES}
    for axes, *more in ((("level", "key"), keys), (("level", "step"), None, 7, 9)):
        made = Result(levels, metrics, axes, *more)
        text = made.to_json()
        json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
        again = Result.from_json(text)
        assert again.axes == axes
        counts = (7, 9) if axes[1] == "step" else (None, None)
        assert (again.steps_run, again.steps_separate) == counts
        pairs = [(again.metrics[name], metrics[name]) for name in metrics]
        pairs += [(again.levels, levels)]
        if axes[1] == "key":
            pairs += [(again.keys, keys)]
        else:
            assert again.keys is None
        for ours, theirs in pairs:
            assert_same(ours, theirs)
            assert ours.flags.writeable


NARROW = ("bool", "int4", "uint4", "float4_e2m1fn")


def every_bit_pattern(dtype):
    """All 2**8 or 2**16 numbers of a dtype; of a wider one the odd and many more."""
    if dtype.name in NARROW:
        return np.array([0, 1, 2]).astype(dtype)
    if dtype.itemsize == 1:
        return np.arange(256, dtype=np.uint8).view(dtype)
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype=np.uint16).view(dtype)
    bits = np.random.default_rng(0).integers(
        0, 2 ** (8 * dtype.itemsize) - 1, 3000, f"u{dtype.itemsize}", endpoint=True
    )
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1 / 3]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        odd = [0, info.min, info.max, info.max - 1, info.max // 2 + 1]
    return np.concatenate([bits.view(dtype), np.array(odd, dtype)])


@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}{n}" for kind in ("int", "uint", "float") for n in (16, 32, 64)),
        *("int8", "uint8", "bfloat16", *NARROW),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
    ],
)
def test_json_gives_every_number_back_bit_for_bit(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    made = Result(LEVELS, {"m": np.stack([every_bit_pattern(dtype)] * 3)})
    assert_same(Result.from_json(made.to_json()).metrics["m"], made.metrics["m"])


BEFORE = """{"format": "flood_optax.sweep.Result/1", "axes": ["level", "key"],
"levels": {"dtype": "float64", "shape": [2], "values": ["-inf", 0.1]}, "keys":
{"dtype": "uint32", "shape": [2, 2], "values": [0, 4294967295, 7, 8]},
"steps_run": null, "steps_separate": null, "metrics":
{"half": {"dtype": "bfloat16", "shape": [2, 1], "values": [0.5, "0x7fc0"]},
"nan": {"dtype": "float32", "shape": [2, 1], "values": ["nan", "inf"]},
"int": {"dtype": "int64", "shape": [2, 1], "values": [9007199254740993, -1]},
"bool": {"dtype": "bool", "shape": [2, 1], "values": [true, false]}}}"""


def test_json_written_by_the_version_before_is_still_read():
    again = Result.from_json(BEFORE)
    np.testing.assert_array_equal(again.levels, [-np.inf, 0.1])
    np.testing.assert_array_equal(again.keys, np.uint32([[0, 2**32 - 1], [7, 8]]))
    expected = {
        "half": np.array([[0.5], [NAN]], jnp.bfloat16),
        "nan": np.array([[NAN], [np.inf]], np.float32),
        "int": np.array([[2**53 + 1], [-1]]),
        "bool": np.array([[True], [False]]),
    }
    for name, value in expected.items():
        found = again.metrics[name]
        assert found.dtype == value.dtype
        wide = np.float64 if found.dtype.kind in "fV" else found.dtype
        np.testing.assert_array_equal(found.astype(wide), value.astype(wide))


def test_json_is_the_text_itself(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(result().to_json())
    for given in (path, str(path)):
        with pytest.raises(ValueError, match=r"the text, `pathlib.Path\(path\)"):
            Result.from_json(given)
    again = Result.from_json(pathlib.Path(path).read_text())
    np.testing.assert_array_equal(again.metrics["acc"], SCORES)


def test_json_of_a_file_of_a_sweep_is_refused_and_the_same_call_reads_it(tmp_path):
    path, keys = tmp_path / "sweep.jsonl", jax.random.split(jax.random.key(0))
    made, again = (
        sweep.run(lambda b, k: {"b": 2 * b}, [0.1, 0.2], keys, path=path)
        for _ in range(2)
    )
    with pytest.raises(ValueError, match="is read by the same call of `sweep"):
        Result.from_json(path.read_text())
    np.testing.assert_array_equal(again.metrics["b"], made.metrics["b"])


def test_xarray_names_the_axes():
    pytest.importorskip("xarray")
    data = result(acc=SCORES[:, :2], loss=CURVES).to_xarray()
    assert data["acc"].dims == ("level", "key")
    assert data["loss"].dims == ("level", "key", "step")
    np.testing.assert_array_equal(data["loss"].sel(level=0.1), CURVES[2])
    forked = Result(LEVELS, {"loss": CURVES}, ("level", "step")).to_xarray()
    assert forked["loss"].dims == ("level", "step", "axis_2")


def test_xarray_of_metrics_of_different_lengths_and_names_of_axes():
    pytest.importorskip("xarray")
    metrics = {
        "loss": CURVES,
        "valid": CURVES[..., ::2],
        "level": SCORES[:, :2],
        "grid": np.zeros((3, 2, 4, 5)),
        "other": np.zeros((3, 2, 4, 5)),
    }
    data = result(**metrics).to_xarray()
    assert data["loss"].dims == ("level", "key", "step_loss")
    assert data["valid"].dims == ("level", "key", "step_valid")
    assert data["grid"].dims == ("level", "key", "step_grid", "axis_3")
    assert data["level_"].dims == ("level", "key")
    np.testing.assert_array_equal(data["valid"].sel(level=0.1), CURVES[2, :, ::2])
    np.testing.assert_array_equal(data["level"], LEVELS)
    np.testing.assert_array_equal(data["level_"], SCORES[:, :2])
    equal = result(loss=CURVES, valid=-CURVES).to_xarray()
    assert equal["valid"].dims == ("level", "key", "step")


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    yield plt
    plt.close("all")


def test_plot_shows_mean_and_runs_in_order_of_levels(pyplot):
    levels = np.array([0.2, -np.inf, 0.0, 0.1])
    scores = np.array([[3.0, 5.0], [0.5, 1.5], [1.0, 3.0], [2.0, 4.0]])
    ax = Result(levels, {"acc": scores}).plot("acc")
    mean, *runs, plain = ax.get_lines()
    np.testing.assert_array_equal(mean.get_xdata(), [0.0, 0.1, 0.2])
    np.testing.assert_array_equal(mean.get_ydata(), [2.0, 3.0, 4.0])
    np.testing.assert_array_equal([r.get_ydata() for r in runs], [[1, 2, 3], [3, 4, 5]])
    np.testing.assert_array_equal(plain.get_ydata(), [1.0, 1.0])
    (band,) = ax.collections
    low, high = band.get_datalim(ax.transData).get_points()[:, 1]
    assert (low, high) == pytest.approx((2 - np.sqrt(2), 4 + np.sqrt(2)))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("flood level", "acc")


def test_plot_of_infinite_runs_and_of_each_best_step(pyplot):
    scores = np.array([[3.0, np.inf], [1.0, 3.0], [2.0, 4.0]])
    mean, *_ = result(acc=scores).plot("acc").get_lines()
    np.testing.assert_array_equal(mean.get_ydata(), [2.0, 3.0, np.inf])
    pyplot.close("all")
    mean, *_ = result(loss=CURVES).plot("loss", "min", at="best").get_lines()
    np.testing.assert_array_equal(mean.get_ydata(), CURVES.min(-1).mean(-1)[[1, 2, 0]])
    with pytest.raises(
        ValueError, match=r'mode=...\)` must be "max" or "min", got None'
    ):
        result(loss=CURVES).plot("loss", at="best")


def test_plot_curves_shows_the_chosen_level(pyplot):
    _, ax = pyplot.subplots()
    made = result(loss=CURVES)
    assert made.plot_curves("loss", 0.1, ax=ax) is ax
    made.plot_curves("loss", [0.0, 0.2], ax=ax)
    one, each = ax.get_lines()
    np.testing.assert_array_equal(one.get_ydata(), CURVES[2].mean(axis=0))
    mean = (CURVES[1, 0] + CURVES[0, 1]) / 2
    np.testing.assert_array_equal(each.get_ydata(), mean)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["level 0.1", "level per key"]


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("xarray", lambda r: r.to_xarray()),
        ("matplotlib.pyplot", lambda r: r.plot("acc")),
        ("matplotlib.pyplot", lambda r: r.plot_curves("loss", 0.1)),
    ],
    ids=["xarray", "plot", "plot_curves"],
)
def test_missing_package_names_the_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    message = rf"needs {package}: pip install 'flood_optax\[bench\]'"
    with pytest.raises(ImportError, match=message):
        call(result(acc=SCORES[:, :2], loss=CURVES))
