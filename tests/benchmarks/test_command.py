"""Every benchmark runs, writes a record and makes its tables."""

import json
import re
import socket
import sys

import jax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import __main__ as command, record, report, synthetic

OWN_TESTS = {"compilers", "language", "quickstart", "report", "trainers"}
BENCHMARKS = sorted(command.discover().keys() - OWN_TESTS)
# ten seconds of compilation or more; the quickstart and the others run every time
LONGEST = {
    "accelerator",
    "choosing",
    "family",
    "fashion",
    "images",
    "overhead",
    "penalty",
    "rivals",
    "strokes",
    "sweep",
    "synthetic",
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
    text = (tmp_path / "out" / f"{name}.json").read_text()
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
    for name in ("networks", "synthetic", "synthetic.training"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}")
    monkeypatch.delattr("benchmarks.networks")
    monkeypatch.delattr("benchmarks.synthetic")
    with pytest.raises(SystemExit, match=r"needs flax: .*'flood_optax\[bench\]'"):
        command.main(["synthetic", "--smoke"])


def test_listing_names_every_benchmark(capsys):
    command.main([])
    listing = capsys.readouterr().out
    assert "quickstart" in listing
    assert synthetic.__doc__.partition("\n")[0] in listing


def test_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="No benchmark named 'quick'; there are: "):
        command.main(["quick"])
