"""Runs trainers, each in an environment of its own that uv makes and keeps."""

import ast
import datetime
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks import environments, record
from benchmarks.trainers import page

HERE = pathlib.Path(__file__).parent
LIMIT = 3600  # seconds for one trainer, with what it takes to install it
PROCESS = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}
PYTHON = "3.13"
LITERALS = ("TITLE", "SECTION", "REQUIREMENTS", "VARIABLES", "ABSENT")
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
        variables=found.get("VARIABLES", {}),
        absent=found.get("ABSENT", ""),
    )


def trainers() -> dict[str, Trainer]:
    """The trainers of this folder, by name, what people use most first."""
    return {name: described(HERE / f"{name}.py") for name in ORDER}


def fingerprint(trainer: Trainer, *, smoke: bool) -> str:
    """What a row depends on: our sources, the module, the recipe, the versions."""
    own = ("rows", "problem", "worker", "own_loop", trainer.name)
    sources = sorted((record.REPOSITORY / "flood_optax").rglob("*.py"))
    recipe = page.blocks(page.SHARED) + page.blocks(trainer.section)
    return environments.digest(
        repr((trainer, smoke, [block.strip() for block in recipe])),
        [*sources, *(HERE / f"{name}.py" for name in own)],
    )


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
    python = environments.command(trainer.requirements, PYTHON)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        (work / "work").mkdir()
        result, log = work / "row.json", work / "log.txt"
        worker = ["-m", "benchmarks.trainers.worker", trainer.name]
        with log.open("wb") as stream:
            try:
                subprocess.run(
                    [*python, *worker, str(result), str(work / "work")]
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
            row["error"] = environments.why(said)
        if "error" in row:
            print(said[-3000:])
            row["error"] = anonymous(row["error"])[:300]
    return row | {"seconds": round(time.monotonic() - start, 1)}
