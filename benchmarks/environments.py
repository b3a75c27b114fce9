"""Python with other packages, in environments that uv makes and keeps."""

import hashlib
import pathlib
import shutil
import sys
from collections.abc import Iterable, Sequence


def command(requirements: Sequence[str], python: str = "") -> list[str]:
    """What starts Python, of this version or another, with the requirements.

    Raises:
      RuntimeError: if there is no uv.
    """
    beside = pathlib.Path(sys.executable).parent  # where pip puts it
    uv = shutil.which("uv") or shutil.which("uv", path=beside)
    if not uv:
        raise RuntimeError("uv is not installed: `pip install uv`.")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    wanted = sys.executable if python in ("", here) else python
    packages = (f"--with={requirement}" for requirement in requirements)
    start = [uv, "run", "--no-project", "--quiet", "--python", wanted]
    return [*start, *packages, "python"]


def why(said: str) -> str:
    """The first error of an installer and its cause, without what comes before."""
    lines = [line.strip() for line in said.splitlines()] or ["no output"]
    errors = (number for number, line in enumerate(lines) if "error" in line.lower())
    first = next(errors, len(lines) - 1)
    return " ".join(lines[first : first + 2])


def digest(about: str, sources: Iterable[pathlib.Path]) -> str:
    """Of what a row depends on: a row with another one is made again."""
    made = hashlib.sha256(about.encode())
    for source in sources:
        made.update(source.read_bytes())
    return made.hexdigest()[:16]
