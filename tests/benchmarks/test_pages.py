"""What the pages show is what the results say."""

import functools
import json
import sys
import types

import pytest

from benchmarks import record, report

PAGE = "# Title\n\n<!-- table:numbers -->\n{}<!-- /table:numbers -->\n\nText.\n"


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A repository of one page and one result, and the benchmark that made it."""
    fake = types.SimpleNamespace(
        tables=lambda payload: {"numbers": f"| {payload['found'][0]:.2f} |"}
    )
    monkeypatch.setitem(sys.modules, "benchmarks.fake", fake)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "fake.json").write_text(json.dumps({"found": [1.5]}))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text(PAGE.format(""))
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    return page


def test_report_writes_the_tables_once_and_for_all(pages, capsys):
    report.main([])
    once = pages.read_text()
    assert once == PAGE.format("\n| 1.50 |\n\n")
    report.main([])
    assert pages.read_text() == once
    assert report.check() == []
    report.main(["--check"])
    assert "agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("1.50", "1.51"), "numbers differs"),
        (lambda text: text.replace("<!-- /table:numbers -->", ""), "no end marker"),
        (lambda text: text.replace("table:numbers", "table:other"), "has no result"),
        (lambda _: "# Title\n", "no page shows the table numbers"),
    ],
    ids=["planted number", "no end", "no result", "not shown"],
)
def test_report_check_finds(pages, change, message, capsys):
    report.main([])
    pages.write_text(change(pages.read_text()))
    assert any(message in line for line in report.check())
    with pytest.raises(SystemExit, match=message):
        report.main(["--check"])
    capsys.readouterr()


def test_report_reads_further_records_of_a_benchmark(pages, monkeypatch, capsys):
    results = pages.parent / "benchmarks" / "results"
    (results / "fake-other-data.json").write_text('{"found": [2.5], "of": "more"}')
    fake = types.SimpleNamespace(
        tables=lambda payload: {payload.get("of", "numbers"): f"| {payload['found']} |"}
    )
    monkeypatch.setitem(sys.modules, "benchmarks.fake", fake)
    pages.write_text(PAGE.format("") + "<!-- table:more -->\n<!-- /table:more -->\n")
    report.main([])
    assert "| [1.5] |" in pages.read_text()
    assert "| [2.5] |" in pages.read_text()
    capsys.readouterr()


def test_report_check_finds_a_result_that_changed(pages, capsys):
    report.main([])
    capsys.readouterr()
    results = pages.parent / "benchmarks" / "results"
    (results / "fake.json").write_text(json.dumps({"found": [1.25]}))
    assert report.check() == ["README.md: table numbers differs from its result"]


# The repository's own pages


@pytest.fixture
def own_tables(monkeypatch):
    """All of them, made once."""
    monkeypatch.setattr(report, "tables", TABLES)


TABLES = functools.cache(report.tables)


@pytest.mark.usefixtures("own_tables")
def test_pages_agree_with_the_results():
    assert report.check() == []


@pytest.mark.usefixtures("own_tables")
def test_a_changed_number_in_a_page_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Title\n")
    text = (record.REPOSITORY / "docs" / "quickstart.md").read_text()
    (tmp_path / "docs" / "quickstart.md").write_text(
        text.replace("| plain | - | 0.0", "| plain | - | 0.1")
    )
    wrong = report.check(tmp_path, record.RESULTS)
    assert "docs/quickstart.md: table quickstart differs from its result" in wrong
