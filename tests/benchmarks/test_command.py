"""Every benchmark runs, writes a record and makes its tables."""

import json
import re
import socket
import sys

import jax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import __main__ as command, record, report
from tests.marks import slow_but

OWN_TESTS = {"compilers", "quickstart", "report", "trainers"}
MEASURED = {"accelerator", "distributed", "overhead"}  # slow: they compile for long
LARGE = {"choosing", "rivals", "unlearning"}  # whose tables take seconds
FINISHED = command.discover().keys() - OWN_TESTS - MEASURED


@pytest.fixture
def flags(monkeypatch):
    """Puts XLA_FLAGS back, which some benchmarks set for the processes they are."""
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.mark.usefixtures("flags")
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MEASURED))
def test_benchmark_smoke_writes_a_record_and_its_tables(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command.main([name, "--smoke", "--out", str(tmp_path / "out")])
    capsys.readouterr()
    path = tmp_path / "out" / f"{name}.json"
    text = path.read_text()
    payload = json.loads(text)
    assert payload["environment"]["jax"] == jax.__version__
    for private in (str(record.REPOSITORY), str(tmp_path), socket.gethostname()):
        # as a word: a host may be called "vm", which stands in "vmap"
        assert not re.search(rf"(?<!\w){re.escape(private)}(?!\w)", text)
    made = report.tables(tmp_path / "out")
    assert made
    for table in made.values():
        assert table.startswith("|")


def test_missing_package_is_a_message_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.setitem(sys.modules, "flax.linen", None)
    for name in ("networks", "overhead"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
        monkeypatch.delattr(f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit, match=r"needs flax: .*'flood_optax\[bench\]'"):
        command.main(["overhead", "--smoke"])


@pytest.mark.parametrize("name", slow_but(FINISHED - LARGE, sorted(FINISHED)))
def test_finished_study_shows_its_tables_and_where_its_code_is(name, capsys):
    command.main([name])
    shown = capsys.readouterr().out
    documents = [
        one
        for _, study, one in report.records(record.RESULTS)
        if study.__name__ == f"benchmarks.{name}"
    ]
    assert documents
    for document in documents:
        for piece in document.get("pieces", [document]):
            environment = piece["environment"]
            commit = environment["commit"][:10]
            assert not environment["dirty"]
            assert shown.count(f"git worktree add ../{name}") == shown.count(
                "    cd .."
            )
            assert f"-{commit} {commit}\n" in shown
            assert f"\n    {environment['command']}\n" in shown
        for table in sys.modules[f"benchmarks.{name}"].tables(document).values():
            assert table in shown


def test_listing_names_every_benchmark(capsys):
    command.main([])
    listing = capsys.readouterr().out
    recorded = {study.__name__ for _, study, _ in report.records(record.RESULTS)}
    assert recorded == {
        f"benchmarks.{name}"
        for name in command.discover().keys() - {"accelerator", "report"}
    }
    assert "quickstart" in listing
    assert "Repeats the paper's synthetic table" in listing


def test_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="No benchmark named 'quick'; there are: "):
        command.main(["quick"])
