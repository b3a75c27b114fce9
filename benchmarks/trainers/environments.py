"""Installs trainers, each in an environment of its own, and runs them there."""

import ast
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
LIMIT = 1800  # seconds for one trainer
PROCESS = {
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}


@dataclass(frozen=True)
class Trainer:
    """What a trainer's module says of itself."""

    name: str
    title: str
    section: str
    requirements: tuple[str, ...]
    python: str
    variables: dict[str, str]

    def described(self) -> dict[str, Any]:
        """What its row says whether it runs or not."""
        return {
            "title": self.title,
            "section": self.section,
            "requirements": list(self.requirements),
        }


def described(path: pathlib.Path) -> Trainer | None:
    """What a module says of itself, without importing it; None if it is no trainer."""
    found: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("TITLE", "SECTION", "REQUIREMENTS", "PYTHON", "VARIABLES"):
                found[name] = ast.literal_eval(node.value)
    if "REQUIREMENTS" not in found:
        return None
    return Trainer(
        name=path.stem,
        title=found["TITLE"],
        section=found["SECTION"],
        requirements=tuple(found["REQUIREMENTS"]),
        python=found.get("PYTHON", "3.11"),
        variables=found.get("VARIABLES", {}),
    )


def trainers() -> dict[str, Trainer]:
    """The trainers of this folder, by name."""
    every = (described(path) for path in sorted(HERE.glob("*.py")))
    return {trainer.name: trainer for trainer in every if trainer}


def default() -> pathlib.Path:
    """Where the trainers are kept: `FLOOD_OPTAX_TRAINERS`, or the user's cache."""
    given = os.environ.get("FLOOD_OPTAX_TRAINERS")
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(given or pathlib.Path(cache) / "flood_optax" / "trainers")


def fingerprint(trainer: Trainer, *, smoke: bool) -> str:
    """What a row depends on: our sources, the module, the recipe, the versions."""
    digest = hashlib.sha256(repr((trainer, smoke)).encode())
    own = [HERE / f"{name}.py" for name in (trainer.name, "rows", "problem", "worker")]
    for source in sorted((record.REPOSITORY / "flood_optax").rglob("*.py")) + own:
        digest.update(source.read_bytes())
    for block in page.blocks(page.SHARED) + page.blocks(trainer.section):
        digest.update(block.strip().encode())
    return digest.hexdigest()[:16]


def python_of(trainer: Trainer, envs: pathlib.Path) -> pathlib.Path:
    return envs / trainer.name / "bin" / "python"


def interpreter(version: str) -> str:
    """A Python of this version.

    Raises:
      RuntimeError: if there is none on the path.
    """
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    found = shutil.which(f"python{version}")
    asked = [found or "", "-V"]
    if not found or subprocess.run(asked, check=False, capture_output=True).returncode:
        raise RuntimeError(f"There is no python{version} on the path.")
    return found


def why(said: str) -> str:
    """The first error of an installer and its cause, without what comes before."""
    lines = [line.strip() for line in said.splitlines()] or ["no output"]
    errors = (number for number, line in enumerate(lines) if "error" in line.lower())
    first = next(errors, len(lines) - 1)
    return " ".join(lines[first : first + 2])[:300]


def install(trainer: Trainer, envs: pathlib.Path) -> None:
    """Makes the environment: the trainer, and this repository as it stands.

    Raises:
      RuntimeError: with the installer's first error, if it cannot be installed.
    """
    home = envs / trainer.name
    mark = home / "requirements.json"
    wanted = [trainer.python, *trainer.requirements]
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) == wanted:
        return
    print(f"Installing {', '.join(trainer.requirements)} in {home}.", flush=True)
    make = [interpreter(trainer.python), "-m", "venv", "--clear", str(home)]
    python = str(python_of(trainer, envs))
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    if uv := shutil.which(
        "uv"
    ):  # pip tries releases for hours where this needs seconds
        pip = [uv, "pip", "install", "--quiet", "--no-cache", "--python", python]
    steps = (make, [*pip, *trainer.requirements, "-e", str(record.REPOSITORY)])
    for step in steps:
        done = subprocess.run(step, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"Cannot be installed: {anonymous(why(done.stderr))}")
    mark.write_text(json.dumps(wanted), encoding="utf-8")


def anonymous(text: str) -> str:
    """A message without the paths of this machine."""
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+){2,}/?", "PATH", text)


def run(trainer: Trainer, envs: pathlib.Path, *, smoke: bool) -> dict[str, Any]:
    """The row of a trainer, by a process in its environment."""
    row = trainer.described()
    try:
        install(trainer, envs)
    except RuntimeError as error:
        return row | {"error": str(error)}
    variables = {**os.environ, **PROCESS, **trainer.variables}
    variables["PYTHONPATH"] = str(record.REPOSITORY)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        work = pathlib.Path(name)
        (work / "work").mkdir()
        result, log = work / "row.json", work / "log.txt"
        given = [trainer.name, str(result), str(work / "work")]
        with log.open("wb") as stream:
            try:
                code = subprocess.run(
                    [str(python_of(trainer, envs)), "-m", "benchmarks.trainers.worker"]
                    + given
                    + ["--smoke"] * smoke,
                    check=False,
                    cwd=record.REPOSITORY,
                    env=variables,
                    stdout=stream,
                    stderr=stream,
                    timeout=LIMIT,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"a timeout, after {LIMIT} s"
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        if result.exists():
            row |= json.loads(result.read_text(encoding="utf-8"))
        else:
            row["error"] = f"It ended with {code}."
        if "error" in row:
            print(said[-3000:])
            row["error"] = anonymous(row["error"])[:500]
    return row | {"seconds": round(time.monotonic() - start, 1)}
