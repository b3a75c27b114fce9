"""The file in which a sweep keeps its runs as they come, to be resumed and extended.

A line says of which training it is, one per chunk holds the metrics of some runs, each
known by its level and key. Lines carry their checksum and are only ever appended. So
what a killed process or a full disk leaves is a torn line, which costs its own chunk,
and what two processes that share the file cost each other is time.
"""

import base64
import json
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flood_optax.checks import FloodWarning, check_that
from flood_optax.sweep.inputs import Array
from flood_optax.sweep.traced import settings

PATH, SAME = "sweep.run(path=...)", "be a file of this sweep"
OTHERWISE = "another path, or delete the file to start over."
RunName = tuple[Any, ...]  # the level's digits and the numbers of the key
FORMAT = "flood_optax.sweep/3"
NUMBERED = "flood_optax.sweep/2"  # its chunks name a run by the number in a grid
BEFORE = "flood_optax.sweep/1"  # its fingerprint saw less of the training's data
MEANING = {
    "key": "another kind of keys",
    "metrics": "other metrics",
    "train": "another train function (or the data it uses)",
}
# A checksum and what follows it: also within a line, behind a torn one.
DOCUMENT = re.compile(rb"([0-9a-f]{8}) (?=\{)")


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
        metric_types: Mapping[str, jax.ShapeDtypeStruct],
        names: Sequence[RunName],
        header: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Restores what the file has, and makes it ready to append to."""
        self._path: pathlib.Path | None = None
        self._names = names
        self._done = np.zeros(len(names), bool)
        self.metrics = {
            metric: np.zeros((len(names), *one.shape), one.dtype)
            for metric, one in metric_types.items()
        }
        if path is None:
            return
        file, first = pathlib.Path(path), jax.process_index() == 0
        about = {"format": FORMAT, **header(), "settings": settings()}
        found = file.read_bytes() if first and file.exists() else b""
        content = _from_first_process(found)
        begun = self._restore(content, about, file.name)
        if first:
            self._path = file
            if not begun:
                self._append(about)

    @property
    def missing(self) -> Array:
        """The numbers of the runs that are not done."""
        return np.flatnonzero(~self._done)

    def add(self, runs: Array, rows: Mapping[str, Array]) -> None:
        """Adds the metrics of some runs, one row each."""
        for metric, value in rows.items():
            self.metrics[metric][runs] = value
        if self._path is not None:
            encoded = {
                metric: base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
                for metric, value in rows.items()
            }
            names = [self._names[run] for run in runs]
            self._append({"runs": names, "metrics": encoded})
        self._done[runs] = True

    def _append(self, document: Mapping[str, Any]) -> None:
        """Appends a line of its own, the whole of it, or raises."""
        assert self._path is not None
        try:
            with self._path.open("ab+", buffering=0) as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
                torn = file.read(1) not in (b"", b"\n")
                rest = memoryview(b"\n" * torn + _line(document))
                while rest:  # a disk that is nearly full takes a part
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
        except OSError as error:
            error.add_note(
                f"`sweep.run(path=...)`: {self._path.name} keeps {self._done.sum()} of "
                f"{len(self._done)} runs. When it can be written to again, the same "
                "call does the others alone."
            )
            raise

    def _restore(self, content: bytes, about: Mapping[str, Any], name: str) -> bool:
        """Fills in the runs that the file has; returns whether it has a header."""
        lines = content.split(b"\n")
        documents = [document for line in lines for document in _documents(line)]
        headers = [document for document in documents if "format" in document]
        # Without one, the file is new, or torn where it began.
        if not headers and not all(_line(about).startswith(line) for line in lines):
            raise ValueError(
                f"`sweep.run(path=...)` must be a file of this sweep, or none: {name} "
                "is something else. Give another path."
            )
        grid: list[RunName] = []
        for header in headers:
            if header["format"] == NUMBERED:
                impl, keys = header["keys"]
                grid = [(level, *words) for level in header["levels"] for words in keys]
                same = {"format": FORMAT, "key": impl, "settings": about["settings"]}
                _check_header({**header, **same}, about, name)
            else:
                _check_header(header, about, name)
        places = {run: place for place, run in enumerate(self._names)}
        for chunk in documents:
            if "runs" not in chunk:
                continue
            names = [grid[r] if isinstance(r, int) else tuple(r) for r in chunk["runs"]]
            wanted = [run in places for run in names]
            runs = [places[run] for run in names if run in places]
            for metric, values in self.metrics.items():
                raw = base64.b64decode(chunk["metrics"][metric])
                rows = np.frombuffer(raw, values.dtype)
                values[runs] = rows.reshape(len(names), *values.shape[1:])[wanted]
            self._done[runs] = True
        begun = any(header["format"] == FORMAT for header in headers)
        if grid and not begun:
            warnings.warn(
                f"`sweep.run(path=...)`: {name} does not say with which version and "
                "settings of JAX it was begun, which are taken to be those of now.",
                FloodWarning,
                stacklevel=4,
            )
        return begun


def _check_header(found: Any, about: Mapping[str, Any], name: str) -> None:
    """Refuses the file of another sweep."""
    of, remedy = repr(found["format"]), f" Give {OTHERWISE}"
    if found["format"] == BEFORE:
        of = "an earlier one, which may hold a sweep of other data"
    now = found["format"] == FORMAT
    check_that(now, PATH, "be a file of this version", f"{name} of {of}", remedy)
    were, now = found["settings"], about["settings"]
    changed = [
        f"{each} {were.get(each)} (now {now.get(each)})"
        for each in sorted({*were, *now})
        if were.get(each, "None") != now.get(each, "None")
    ]
    got = (
        f"{name} of a sweep with {', '.join(changed)}, of which the numbers may differ"
    )
    back = f" Set that back to go on, give {OTHERWISE}"
    check_that(not changed, PATH, SAME, got, back)
    for part, meaning in MEANING.items():
        got = f"{name} of a sweep with {meaning}"
        check_that(found.get(part) == about[part], PATH, SAME, got, remedy)


def _from_first_process(content: bytes) -> bytes:
    """What the first process read, in all of them."""
    if jax.process_count() == 1:
        return content
    from jax.experimental import multihost_utils  # noqa: PLC0415, slow to import

    length = multihost_utils.broadcast_one_to_all(np.int32(len(content)))
    padded = np.zeros(int(length), np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def _line(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _documents(line: bytes) -> Iterator[dict[str, Any]]:
    """The document of a line, if it is whole, or has only a torn one in front."""
    for found in DOCUMENT.finditer(line):
        text = line[found.end() :]
        if found[1] == b"%08x" % zlib.crc32(text):
            yield json.loads(text)
            return
