"""Every benchmark runs, writes a record and makes its tables."""

import json
import re
import socket
import sys

import jax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import __main__ as command, record, report

FINISHED = {
    *("choosing", "family", "fashion", "images", "language", "penalty"),
    *("strokes", "sweep", "synthetic"),
}
OWN_TESTS = {"compilers", "quickstart", "report", "trainers"}
BENCHMARKS = sorted(command.discover().keys() - OWN_TESTS - FINISHED)
# ten seconds of compilation or more; the quickstart and the others run every time
LONGEST = {
    "accelerator",
    "distributed",
    "membership",
    "overhead",
    "rivals",
    "unlearning",
}


@pytest.fixture
def flags(monkeypatch):
    """Puts XLA_FLAGS back, which some benchmarks set for the processes they are."""
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.mark.usefixtures("flags")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LONGEST else [])
        for name in BENCHMARKS
    ],
)
def test_benchmark_smoke_writes_a_record_and_its_tables(
    name, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command.main([name, "--smoke", "--out", str(tmp_path / "out")])
    capsys.readouterr()
    (path,) = (tmp_path / "out").rglob("*.json")  # a piece is in a folder
    assert path.relative_to(tmp_path / "out").with_suffix("").parts[0] == name
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
    for name in ("networks", "unlearning", "unlearning.problems"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    for name in ("networks", "unlearning"):
        monkeypatch.delattr(f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit, match=r"needs flax: .*'flood_optax\[bench\]'"):
        command.main(["unlearning", "--smoke"])


@pytest.mark.parametrize("name", sorted(FINISHED))
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
        environment = document["environment"]
        assert not environment["dirty"]
        assert environment["commit"][:10] in shown
        assert f"&& {environment['command']}\n" in shown
        for table in sys.modules[f"benchmarks.{name}"].tables(document).values():
            assert table in shown


def test_listing_names_every_benchmark(capsys):
    command.main([])
    listing = capsys.readouterr().out
    assert "quickstart" in listing
    assert "Repeats the paper's synthetic table" in listing


def test_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="No benchmark named 'quick'; there are: "):
        command.main(["quick"])
