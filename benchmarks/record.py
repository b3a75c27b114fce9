"""Writes what a benchmark found, with the circumstances under which it was found."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "flood_optax", "torch")
# What runs write and reports draw changes no measurement.
OUTPUTS = (":(exclude)benchmarks/results", ":(exclude)docs/figures")


def arguments(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with the two options of every benchmark."""
    parser = argparse.ArgumentParser(f"python -m benchmarks {name}", description=doc)
    parser.add_argument("--smoke", action="store_true", help="seconds, not minutes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    return parser


def environment(repository: pathlib.Path | None = None) -> dict[str, Any]:
    """Versions, device, processor, commit and command; nothing names the machine."""
    import jax  # noqa: PLC0415 - listing the benchmarks needs no jax

    commit, dirty = tree(repository or REPOSITORY)
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "commit": commit,
        "dirty": dirty,
        "command": command(sys.argv),
    }


def write(name: str, payload: dict[str, Any], out: pathlib.Path) -> pathlib.Path:
    """Writes `out/name.json`: the environment, then the payload.

    A name with a slash is that of a piece, in a folder of `out`.

    Raises:
      RuntimeError: if `out` is the repository's own results and the tree is not clean.
    """
    check_destination(out)
    document = {"environment": environment(), **payload}
    path = out / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def read(name: str, results: pathlib.Path | None = None) -> dict[str, Any]:
    """The document that `write` wrote."""
    path = (results or RESULTS) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def lines(journal: pathlib.Path | None) -> list[dict[str, Any]]:
    """The rows that a journal holds; a line that a killed process tore is none."""
    found: list[dict[str, Any]] = []
    if journal is not None and journal.is_file():
        for line in journal.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return found


def append(journal: pathlib.Path | None, row: dict[str, Any]) -> None:
    """Adds a row to a journal, if there is one."""
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def check_destination(
    out: pathlib.Path, repository: pathlib.Path | None = None
) -> None:
    """Refuses results that no commit can reproduce.

    Raises:
      RuntimeError: if `out` is in `benchmarks/results` of a tree that is not clean.
    """
    repository = repository or REPOSITORY
    if not out.resolve().is_relative_to(repository / "benchmarks" / "results"):
        return
    commit, dirty = tree(repository)
    if commit is None:
        raise RuntimeError(
            "`--out benchmarks/results` needs a git checkout, to record the commit; "
            "write elsewhere, e.g. `--out out`."
        )
    if dirty:
        raise RuntimeError(
            "`--out benchmarks/results` needs a clean tree, so that the commit says "
            f"what was measured, got changes on top of {commit}: commit them first, or "
            "write elsewhere, e.g. `--out out`."
        )


def tree(repository: pathlib.Path) -> tuple[str | None, bool | None]:
    """The commit, and whether anything but outputs differs from it or is untracked."""

    def git(*args: str) -> str:
        return subprocess.run(
            ("git", "-C", str(repository), *args),
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    try:
        return (
            git("rev-parse", "HEAD"),
            bool(git("status", "--porcelain", "--", ".", *OUTPUTS)),
        )
    except (OSError, subprocess.CalledProcessError):
        return None, None


def command(argv: Sequence[str]) -> str | None:
    """The command line without the paths in it; None if called from Python."""
    if pathlib.Path(argv[0]).name != "__main__.py":
        return None
    words: list[str] = []
    skip = False
    for word in argv[1:]:
        if not skip and word.partition("=")[0] != "--out":
            words.append("PATH" if os.sep in word else word)
        skip = not skip and word == "--out"
    return " ".join(["python -m benchmarks", *words])


def version(package: str) -> str | None:
    """The installed version, None if absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [
        line.partition(":")[2].strip()
        for line in text.splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()
