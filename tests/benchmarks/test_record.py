"""A record says under which circumstances it was made, and names no machine."""

import json
import math
import subprocess

import optax
import pytest

from benchmarks import __main__ as command, record


def git(repository, *args):
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    subprocess.run(
        ("git", *who, "-C", str(repository), *args), check=True, capture_output=True
    )


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A clean git repository that takes the place of ours."""
    repository = tmp_path / "checkout"
    repository.mkdir()
    (repository / "code.py").write_text("x = 1\n")
    git(repository, "init", "--quiet")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "x")
    monkeypatch.setattr(record, "REPOSITORY", repository)
    return repository


def test_record_of_a_clean_tree_holds_commit_and_versions(checkout):
    results = checkout / "benchmarks" / "results"
    record.write("one", {"rows": [1]}, results)
    record.write("two", {"rows": [2]}, results)  # the first does not make it dirty
    written = record.read("two", results)
    head = (checkout / ".git" / "HEAD").read_text().split()[-1]
    commit = (checkout / ".git" / head).read_text().strip()
    assert written["environment"]["commit"] == commit
    assert written["environment"]["dirty"] is False
    assert written["environment"]["optax"] == optax.__version__
    assert written["rows"] == [2]


@pytest.mark.parametrize("change", ["modified", "untracked", "staged"])
def test_record_of_a_dirty_tree_is_refused_as_a_result(checkout, change):
    name = "code.py" if change == "modified" else "new.py"
    (checkout / name).write_text("x = 2\n")
    if change == "staged":
        git(checkout, "add", ".")
    results = checkout / "benchmarks" / "results"
    with pytest.raises(RuntimeError, match=r"needs a clean tree.*commit them first"):
        record.write("one", {}, results)
    with pytest.raises(RuntimeError, match="needs a clean tree"):  # before it runs
        command.main(["synthetic", "--smoke", "--out", str(results)])
    assert not results.exists()
    outside = record.write("one", {}, checkout.parent / "out")
    assert json.loads(outside.read_text())["environment"]["dirty"] is True


def test_record_without_git_is_refused_as_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(RuntimeError, match="needs a git checkout"):
        record.write("one", {}, tmp_path / "benchmarks" / "results")


def test_record_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write("one", {"loss": math.nan}, tmp_path)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["x/__main__.py", "a", "--out", "/x/y", "--n", "3"], "a --n 3"),
        (["x/__main__.py", "a", "--out=/x/y", "b"], "a b"),
        (["x/__main__.py", "a", "/home/me/file"], "a PATH"),
    ],
)
def test_command_keeps_no_path(argv, expected):
    assert record.command(argv) == f"python -m benchmarks {expected}"


def test_command_is_none_where_the_benchmark_is_called_from_python():
    assert record.command(["/usr/bin/pytest", "-x"]) is None
