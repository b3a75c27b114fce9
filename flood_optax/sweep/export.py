"""Where a result goes: JSON, xarray and matplotlib."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flood_optax.checks import check_that, must
from flood_optax.sweep.extras import optional
from flood_optax.sweep.inputs import Array

FORMAT = "flood_optax.sweep.Result/2"
NUMBERS = "flood_optax.sweep.Result/1"  # arrays as lists of numbers
CALL, WRITTEN = "Result.from_json(text)", "be what `Result.to_json` returned"
ARRAYS = ("levels", "keys")


def to_json(fields: Mapping[str, Any]) -> str:
    """The fields of a result as strict JSON, arrays as their bytes."""
    metrics = {name: _encoded(value) for name, value in fields["metrics"].items()}
    arrays = {name: _encoded(fields[name]) for name in ARRAYS}
    document = {"format": FORMAT, **fields, **arrays, "metrics": metrics}
    return json.dumps(document, allow_nan=False)


def from_json(text: str) -> dict[str, Any]:
    """The fields of a result from what `to_json` returned."""
    try:
        document: Any = json.loads(text)
        found = document.pop("format")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        remedy = (
            " Of a file, pass the text, `pathlib.Path(path).read_text()`; that of "
            "`sweep.run(path=...)` is read by the same call of `sweep.run`."
        )
        got = f"something else ({error})"
        raise ValueError(must(CALL, WRITTEN, got, remedy)) from error
    got = f"the format {found!r} where {FORMAT!r} is due"
    check_that(found in {FORMAT, NUMBERS}, CALL, WRITTEN, got)
    metrics = {name: _decoded(one) for name, one in document["metrics"].items()}
    arrays = {name: _decoded(document[name]) for name in ARRAYS}
    return {**document, **arrays, "metrics": metrics, "axes": (*document["axes"],)}


def _encoded(value: Array | None) -> dict[str, Any] | None:
    if value is None:
        return None
    content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"dtype": str(value.dtype), "shape": [*value.shape], "bytes": content}


def _decoded(document: dict[str, Any] | None) -> Array | None:
    if document is None:
        return None
    # JAX's own dtypes, such as bfloat16, are known by name once jax is imported.
    dtype, shape = np.dtype(document["dtype"]), document["shape"]
    if "bytes" in document:
        content = bytearray(base64.b64decode(document["bytes"]))  # to be written to
        return np.frombuffer(content, dtype).reshape(shape)
    values = document["values"]
    if dtype.kind in "biu":
        return np.array(values, dtype).reshape(shape)
    # A string is infinite, or the bits of a NaN, of which one is as good as another.
    numbers = [math.nan if str(x).startswith("0x") else float(x) for x in values]
    return np.array(numbers).astype(dtype).reshape(shape)


def to_xarray(levels: Array, metrics: Mapping[str, tuple[list[str], Array]]) -> Any:
    """The dataset of metrics, each with the names of its axes."""
    xarray = optional("xarray", "Result.to_xarray()")
    lengths: dict[str, set[int]] = {"level": {len(levels)}}
    for names, value in metrics.values():
        for axis, length in zip(names, value.shape, strict=True):
            lengths.setdefault(axis, set()).add(length)
    variables: dict[str, Any] = {}
    for metric, (names, value) in metrics.items():
        axes = [a if len(lengths[a]) == 1 else f"{a}_{metric}" for a in names]
        variables[f"{metric}_" if metric in lengths else metric] = (axes, value)
    return xarray.Dataset(variables, coords={"level": levels})


def axes_for(ax: Any, call: str) -> Any:
    """The matplotlib axes that were given, or new ones."""
    return optional("matplotlib.pyplot", call).subplots()[1] if ax is None else ax


def draw_band(ax: Any, x: Array, mean: Array, spread: Array, label: str) -> Any:
    """The line of a mean, and what is within the spread of it, where that is known."""
    (line,) = ax.plot(x, mean, label=label)
    if not np.isnan(spread).all():
        band = mean - spread, mean + spread
        ax.fill_between(x, *band, color=line.get_color(), alpha=0.2, lw=0)
    return line
