"""Checks by pyright and mypy, both strict, that they accept what is right and no more.

`python -m tests.typing` runs both over right.py, in which they may find nothing, and
over wrong.py, in which they must find each line marked `# wrong:` and no other.
"""

import json
import pathlib
import re
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
FILES = [FOLDER / "right.py", FOLDER / "wrong.py"]
Line = tuple[str, int]


def marked() -> set[Line]:
    return {
        (path.name, number)
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if "# wrong:" in line
    }


def found_by_pyright() -> dict[Line, str]:
    command = ["pyright", "--project", FOLDER / "pyrightconfig.json", "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        (pathlib.Path(said["file"]).name, said["range"]["start"]["line"] + 1): said[
            "message"
        ]
        for said in json.loads(done.stdout)["generalDiagnostics"]
    }


def found_by_mypy() -> dict[Line, str]:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    # optax says no types that mypy would take
    command += ["--disable-error-code=import-untyped", "--follow-imports=silent"]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run(
        [*command, *map(str, FILES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = re.findall(r"^(.*?):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    if done.returncode > 1 or (done.returncode and not errors):
        raise RuntimeError(done.stdout + done.stderr)
    return {(pathlib.Path(path).name, int(n)): said for path, n, said in errors}


def main() -> int:
    wanted, bad = marked(), 0
    for checker, found in (("pyright", found_by_pyright()), ("mypy", found_by_mypy())):
        for name, line in sorted(wanted - found.keys()):
            sys.stdout.write(f"{checker} finds nothing in {name}:{line}\n")
        for (name, line), said in sorted(found.items()):
            if (name, line) not in wanted:
                sys.stdout.write(f"{checker} in {name}:{line}: {said}\n")
        bad += wanted != found.keys()
    return bad


if __name__ == "__main__":
    sys.exit(main())
