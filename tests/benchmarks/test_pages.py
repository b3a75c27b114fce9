"""What the pages show is what the results say: tables, and numbers in running text."""

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


# Numbers in running text

TEXT = (
    "It falls to <!-- figure:fake/a-row/loss .2f -->{}<!-- /figure -->, by\n"
    "<!-- figure:fake/a-row/steps -->{}<!-- /figure --> steps (<!--\n"
    "figure:fake/b/loss\n"
    "+.0% -->{}<!-- /figure -->).\n"
)
ROWS = [
    {"name": "a row", "loss": 0.506, "steps": 12, "held": True, "all": [1.0]},
    {"name": "b", "loss": -0.2, "steps": 7, "held": None, "all": []},
]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A repository of one page and one record, whose benchmark names no number."""
    fake = types.SimpleNamespace(tables=lambda _: {})
    monkeypatch.setitem(sys.modules, "benchmarks.fake", fake)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "fake.json").write_text(json.dumps({"rows": ROWS}))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(TEXT.format("", "", ""))
    (tmp_path / "README.md").write_text("# Title\n")
    monkeypatch.setattr(record, "REPOSITORY", tmp_path)
    return page


def test_report_writes_numbers_into_running_text_once_and_for_all(page, capsys):
    report.main([])
    once = page.read_text()
    assert once == TEXT.format("0.51", "12", "-20%")
    report.main([])
    assert page.read_text() == once
    report.main(["--check"])
    assert "agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("0.51", "0.50"), "figure fake/a-row/loss is 0.51, the page shows '0.50'"),
        (("b/loss\n", "b/lost\n"), "figure fake/b/lost has no result; close: .*b/loss"),
        (("12<!-- /figure -->", "12"), "figure fake/a-row/steps has no end marker"),
    ],
    ids=["planted number", "misspelt", "left open"],
)
def test_report_check_finds_in_running_text(page, change, message, capsys):
    report.main([])
    page.write_text(page.read_text().replace(*change))
    with pytest.raises(SystemExit, match=rf"docs/page.md: {message}"):
        report.main(["--check"])
    capsys.readouterr()


def test_report_check_finds_a_number_whose_result_changed(page, capsys):
    report.main([])
    capsys.readouterr()
    (page.parents[1] / "benchmarks" / "results" / "fake.json").write_text(
        json.dumps({"rows": [ROWS[0] | {"steps": 13}, ROWS[1]]})
    )
    assert report.check() == [
        "docs/page.md: figure fake/a-row/steps is 13, the page shows '12'"
    ]


@pytest.mark.usefixtures("page")
def test_report_lists_the_names_that_hold_every_word(capsys):
    report.main(["--names", "loss", "row"])
    assert capsys.readouterr().out == "fake/a-row/loss  0.506\n"


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Two rows make the number a/x"):
        report.named([{"name": "a", "x": 1}, {"name": "a", "x": 2}])


# The repository's own pages


def test_pages_agree_with_the_results():
    assert report.check() == []


def test_a_changed_number_in_a_page_is_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("# Title\n")
    text = (record.REPOSITORY / "docs" / "quickstart.md").read_text()
    (tmp_path / "docs" / "quickstart.md").write_text(
        text.replace("| plain | - | 0.0", "| plain | - | 0.1")
    )
    wrong = report.check(tmp_path, record.RESULTS)
    assert "docs/quickstart.md: table quickstart differs from its result" in wrong
