"""The command: see the docstring of the package."""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile

from tests.mutants.breaks import BREAKS, Break, applied

ROOT = pathlib.Path(__file__).parents[2]


def copy_of_the_tree(target: pathlib.Path) -> pathlib.Path:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, found.stdout.split("\0")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def outcome(mutant: Break, tree: pathlib.Path, seconds: float, marks: str) -> str:
    """`seen`, `SURVIVED`, or why the tests did not run."""
    path = tree / mutant.file
    original = path.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-m", marks]
    # one cache for all copies, so that only what the break changes is compiled anew
    cache = str(ROOT / ".jax_cache" / "mutants")
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, **os.environ}
    environment["PYTHONPATH"] = str(tree)
    try:
        path.write_text(applied(mutant, original), encoding="utf-8")
        run = subprocess.run(
            [*command, *mutant.tests.split()],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "seen (no end)"
    finally:
        path.write_text(original, encoding="utf-8")
    words = {0: "SURVIVED", 1: "seen"}
    return words.get(run.returncode, f"NOT RUN: {run.stdout[-300:]}{run.stderr[-300:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="the end of a file's path")
    parser.add_argument("--changed", help="a commit: files changed since then")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=600, help="for one break")
    parser.add_argument("--quick", action="store_true", help="without the slow tests")
    args = parser.parse_args()
    chosen = [mutant for mutant in BREAKS if mutant.file.endswith(args.only)]
    if args.changed:
        diff = ["git", "diff", "--name-only", args.changed]
        since = subprocess.run(diff, cwd=ROOT, check=True, capture_output=True)
        changed = set(since.stdout.decode().split())
        chosen = [mutant for mutant in chosen if mutant.file in changed]
    survived = 0
    with tempfile.TemporaryDirectory() as scratch:
        trees: queue.Queue[pathlib.Path] = queue.Queue()
        for number in range(args.workers):
            trees.put(copy_of_the_tree(pathlib.Path(scratch, str(number))))

        def run(mutant: Break) -> str:
            tree = trees.get()
            try:
                return outcome(mutant, tree, args.seconds, "not slow" * args.quick)
            finally:
                trees.put(tree)

        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            for mutant, result in zip(chosen, pool.map(run, chosen), strict=True):
                survived += not result.startswith("seen")
                print(f"{result}: {mutant.file}: {mutant.after.strip()}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} breaks were seen")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
