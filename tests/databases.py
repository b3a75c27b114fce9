"""A PostgreSQL server of a test's own, by an ordinary user, behind a socket of Unix."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Generator

import pytest


def programs() -> pathlib.Path | None:
    """The folder of the server's programs, the newest of those that Debian keeps."""
    found = [*pathlib.Path("/usr/lib/postgresql").glob("*/bin")]
    if found:
        return max(found, key=lambda path: float(path.parent.name))
    on_path = shutil.which("initdb")
    return pathlib.Path(on_path).resolve().parent if on_path else None


@contextlib.contextmanager
def postgresql() -> Generator[str]:
    """The address of an empty database, in the form of SQLAlchemy."""
    pytest.importorskip("psycopg", reason="PostgreSQL needs its driver, psycopg.")
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed.")
    # the server refuses to be run by root, and a socket's path must be short
    user = "nobody" if os.geteuid() == 0 else None
    home = pathlib.Path(tempfile.mkdtemp(prefix="pg"))
    if user:
        shutil.chown(home, user)

    def run(program: str, *arguments: str) -> None:
        command = [folder / program, "--pgdata", home / "data", *arguments]
        # no pipes, which the server would inherit and hold open
        with (home / "output").open("a") as output:
            subprocess.run(
                command, check=True, user=user, cwd=home, stdout=output, stderr=output
            )

    try:
        run("initdb", "--username=flood", "--auth=trust", "--no-sync")
        options = f"-c listen_addresses= -c unix_socket_directories={home} -c fsync=off"
        log = str(home / "log")
        run("pg_ctl", "start", "--wait", "--log", log, "--options", options)
        try:
            yield f"postgresql+psycopg://flood@/postgres?host={home}"
        finally:
            run("pg_ctl", "stop", "--mode=immediate")
    finally:
        shutil.rmtree(home)
