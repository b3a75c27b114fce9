"""Runs trainers, each in an environment of its own that uv makes and keeps."""

import ast
import datetime
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks import record
from benchmarks.trainers import page

HERE = pathlib.Path(__file__).parent
LIMIT = 3600  # seconds for one trainer, with what it takes to install it
PROCESS = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}
LITERALS = ("TITLE", "SECTION", "REQUIREMENTS", "PYTHON", "VARIABLES", "ABSENT")
# Those with more downloads from the package index come first, those that it does not
# rank by how often they are cited.
ORDER = (
    *("keras", "nnx", "muon", "gan", "linen", "sums", "equinox", "grain", "haiku"),
    *("schedule_free", "numpyro", "optimistix", "tunix", "brax", "maxtext"),
    *("big_vision", "levanter", "easydel", "kauldron", "gpjax", "flowjax", "penzai"),
)


@dataclass(frozen=True)
class Trainer:
    """What a trainer's module says of itself."""

    name: str
    title: str
    section: str
    requirements: tuple[str, ...]
    python: str
    variables: dict[str, str]
    absent: str

    def described(self) -> dict[str, Any]:
        """What its row says whether it runs or not."""
        return {
            "title": self.title,
            "section": self.section,
            "requirements": list(self.requirements),
        }


def described(path: pathlib.Path) -> Trainer:
    """What a module says of itself, without importing it."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in LITERALS:
                found[name] = ast.literal_eval(node.value)
    return Trainer(
        name=path.stem,
        title=found["TITLE"],
        section=found["SECTION"],
        requirements=tuple(found["REQUIREMENTS"]),
        python=found.get("PYTHON", "3.13"),
        variables=found.get("VARIABLES", {}),
        absent=found.get("ABSENT", ""),
    )


def trainers() -> dict[str, Trainer]:
    """The trainers of this folder, by name, what people use most first."""
    return {name: described(HERE / f"{name}.py") for name in ORDER}


def fingerprint(trainer: Trainer, *, smoke: bool) -> str:
    """What a row depends on: our sources, the module, the recipe, the versions."""
    digest = hashlib.sha256(repr((trainer, smoke)).encode())
    own = ("rows", "problem", "worker", "own_loop", trainer.name)
    sources = (record.REPOSITORY / "flood_optax").rglob("*.py")
    for source in [*sorted(sources), *(HERE / f"{name}.py" for name in own)]:
        digest.update(source.read_bytes())
    for block in page.blocks(page.SHARED) + page.blocks(trainer.section):
        digest.update(block.strip().encode())
    return digest.hexdigest()[:16]


def command(trainer: Trainer) -> list[str]:
    """What starts Python where the trainer is installed.

    Raises:
      RuntimeError: if there is no uv.
    """
    beside = pathlib.Path(sys.executable).parent  # where pip puts it
    uv = shutil.which("uv") or shutil.which("uv", path=beside)
    if not uv:
        raise RuntimeError("uv is not installed: `pip install uv`.")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    python = sys.executable if trainer.python == here else trainer.python
    wanted = (f"--with={requirement}" for requirement in trainer.requirements)
    return [uv, "run", "--no-project", "--quiet", "--python", python, *wanted, "python"]


def why(said: str) -> str:
    """The first error of an installer and its cause, without what comes before."""
    lines = [line.strip() for line in said.splitlines()] or ["no output"]
    errors = (number for number, line in enumerate(lines) if "error" in line.lower())
    first = next(errors, len(lines) - 1)
    return " ".join(lines[first : first + 2])


def anonymous(text: str) -> str:
    """A message without the paths of this machine."""
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+){2,}/?", "PATH", text)


def run(trainer: Trainer, *, smoke: bool) -> dict[str, Any]:
    """The row of a trainer, by a process in its environment."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    row = trainer.described() | {"date": today}
    if trainer.absent:
        return row | {"error": trainer.absent}
    variables = {**os.environ, **PROCESS, **trainer.variables}
    variables["PYTHONPATH"] = str(record.REPOSITORY)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        (work / "work").mkdir()
        result, log = work / "row.json", work / "log.txt"
        worker = ["-m", "benchmarks.trainers.worker", trainer.name]
        with log.open("wb") as stream:
            try:
                subprocess.run(
                    [*command(trainer), *worker, str(result), str(work / "work")]
                    + ["--smoke"] * smoke,
                    check=False,
                    cwd=record.REPOSITORY,
                    env=variables,
                    stdout=stream,
                    stderr=stream,
                    timeout=LIMIT,
                )
            except subprocess.TimeoutExpired:
                row["error"] = f"It did not end within {LIMIT} s."
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        if result.exists():
            row |= json.loads(result.read_text(encoding="utf-8"))
        elif "error" not in row:  # Python did not start, or died
            row["error"] = why(said)
        if "error" in row:
            print(said[-3000:])
            row["error"] = anonymous(row["error"])[:300]
    return row | {"seconds": round(time.monotonic() - start, 1)}
