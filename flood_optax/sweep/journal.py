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
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils

Array = npt.NDArray[Any]
FORMAT = "flood_optax.sweep/2"
BEFORE = "flood_optax.sweep/1"  # its fingerprint saw less of the training's data
MEANING = {
    "levels": "other levels",
    "keys": "other keys",
    "metrics": "other metrics",
    "train": "another train function (or the data it uses, or the version of JAX)",
}


class Journal:
    """The results of a sweep so far; without a path they are kept in memory alone.

    Of many processes, the first reads and writes the file.

    Attributes:
      metrics: [runs, ...] for each metric, filled in as runs are done.
      missing: the numbers of the runs that are not.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        like: Mapping[str, jax.ShapeDtypeStruct],
        number: int,
        header: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Restores what the file has, and makes it ready to append to."""
        self._path: pathlib.Path | None = None
        self._done = np.zeros(number, bool)
        self.metrics = {
            name: np.zeros((number, *one.shape), one.dtype)
            for name, one in like.items()
        }
        if path is None:
            return
        file, first = pathlib.Path(path), jax.process_index() == 0
        kept = file.read_bytes() if first and file.exists() else b""
        about = {"format": FORMAT, **header()}
        good = self._restore(_from_first_process(kept), about, file.name)
        if first:
            self._path = file
            _start(file, _line(about), good)

    @property
    def missing(self) -> Array:
        """The numbers of the runs that are not done."""
        return np.flatnonzero(~self._done)

    def add(self, runs: Array, rows: Mapping[str, Array]) -> None:
        """Adds the metrics of some runs, one row each."""
        for name, value in rows.items():
            self.metrics[name][runs] = value
        self._done[runs] = True
        if self._path is None:
            return
        encoded = {
            name: base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            for name, value in rows.items()
        }
        with self._path.open("ab", buffering=0) as file:
            file.write(_line({"runs": runs.tolist(), "metrics": encoded}))
            os.fsync(file.fileno())

    def _restore(self, content: bytes, about: Mapping[str, Any], name: str) -> int:
        """Fills in the runs that are in the file; returns how many bytes are good."""
        start = _line(about)
        if start.startswith(content) and content != start:  # nothing, or torn at once
            return 0
        first, *lines, _torn = content.split(b"\n") if b"\n" in content else [b"", b""]
        _check_header(_parsed(first), about, name)
        good = len(first) + 1
        for number, line in enumerate(lines, start=2):
            chunk = _parsed(line)
            if chunk is None:
                if number <= len(lines):
                    raise ValueError(
                        f"`sweep.run(path=...)`: line {number} of {name} is damaged. "
                        "Delete that line to run its part again, or the file to start "
                        "over."
                    )
                break
            runs = np.array(chunk["runs"])
            for metric, values in self.metrics.items():
                raw = base64.b64decode(chunk["metrics"][metric])
                rows = np.frombuffer(raw, values.dtype)
                values[runs] = rows.reshape(len(runs), *values.shape[1:])
            self._done[runs] = True
            good += len(line) + 1
        return good


def _check_header(found: Any, about: Mapping[str, Any], name: str) -> None:
    """Refuses the file of something else, and of another sweep."""
    form = found.get("format") if isinstance(found, dict) else None
    if form == BEFORE:
        raise ValueError(
            f"`sweep.run(path=...)` must be a file of this version, got {name} of an "
            "earlier one, which may hold a sweep of other data. Give another path, or "
            "delete the file to start over."
        )
    if form != FORMAT:
        raise ValueError(
            f"`sweep.run(path=...)` must be a file of this sweep, or none: {name} is "
            "something else. Give another path."
        )
    for part, meaning in MEANING.items():
        if found.get(part) != about[part]:
            raise ValueError(
                f"`sweep.run(path=...)` must be a file of this sweep, got {name} of a "
                f"sweep with {meaning}. Give another path, or delete the file to start "
                "over."
            )


def _start(path: pathlib.Path, first: bytes, good: int) -> None:
    """Makes the file ready to append to: a header, and no torn line at the end."""
    if good:
        with path.open("r+b") as file:
            file.truncate(good)
            os.fsync(file.fileno())
        return
    scratch = path.with_name(f"{path.name}.new")
    with scratch.open("wb") as file:
        file.write(first)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _from_first_process(content: bytes) -> bytes:
    """What the first process read, in all of them."""
    if jax.process_count() == 1:
        return content
    length = multihost_utils.broadcast_one_to_all(np.int32(len(content)))
    padded = np.zeros(int(length), np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def _line(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The document of a line, None if it is damaged."""
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    return json.loads(text)
