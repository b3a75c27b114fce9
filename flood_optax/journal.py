"""The file in which a sweep keeps its results as they come, to be resumed.

One line per chunk after a line that says which sweep it is. Each line carries its
checksum, is written by one call and synced, so what a killed process leaves is at
worst a torn last line, which is dropped.
"""

import base64
import json
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FORMAT = "flood_optax.sweep/1"
MEANING = {
    "levels": "other levels",
    "keys": "other keys",
    "metrics": "other metrics",
    "train": "another train function (or the data it uses, or the version of JAX)",
}


def read(path: pathlib.Path) -> bytes:
    """The content of the file, nothing if there is none."""
    return path.read_bytes() if path.exists() else b""


def restore(
    content: bytes,
    header: Mapping[str, Any],
    path: pathlib.Path,
    done: Array,
    metrics: Mapping[str, Array],
) -> int:
    """Fills in the runs that are in the file; returns how many bytes of it are good."""
    start = _line({"format": FORMAT, **header})
    if start.startswith(content) and content != start:  # nothing, or torn at once
        return 0
    *lines, _torn = content.split(b"\n")
    found = _parsed(lines[0]) if lines else None
    if found is None or found.get("format") != FORMAT:
        raise ValueError(
            f"`sweep.run(path=...)` must be a file of this sweep, or none: {path.name} "
            "is something else. Give another path."
        )
    for name, meaning in MEANING.items():
        if found.get(name) != header[name]:
            raise ValueError(
                f"`sweep.run(path=...)` must be a file of this sweep, got "
                f"{path.name} of a sweep with {meaning}. Give another path, or delete "
                "the file to start over."
            )
    good = len(lines[0]) + 1
    for number, line in enumerate(lines[1:], start=2):
        chunk = _parsed(line)
        if chunk is None:
            if number < len(lines):
                raise ValueError(
                    f"`sweep.run(path=...)`: line {number} of {path.name} is damaged. "
                    "Delete that line to run its part again, or the file to start over."
                )
            break
        runs = np.array(chunk["runs"])
        for name, metric in metrics.items():
            raw = base64.b64decode(chunk["metrics"][name])
            rows = np.frombuffer(raw, metric.dtype)
            metric[runs] = rows.reshape(len(runs), *metric.shape[1:])
        done[runs] = True
        good += len(line) + 1
    return good


def start(path: pathlib.Path, header: Mapping[str, Any], good: int) -> None:
    """Makes the file ready to append to: a header, and no torn line at the end."""
    if good:
        with path.open("r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())
        return
    scratch = path.with_name(f"{path.name}.new")
    with scratch.open("wb") as file:
        file.write(_line({"format": FORMAT, **header}))
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def append(path: pathlib.Path, runs: Array, metrics: Mapping[str, Array]) -> None:
    """Adds the metrics of some runs, one row each."""
    rows = {
        name: base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        for name, value in metrics.items()
    }
    with path.open("ab", buffering=0) as file:
        file.write(_line({"runs": runs.tolist(), "metrics": rows}))
        os.fsync(file.fileno())


def _line(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The document of a line, None if it is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)
