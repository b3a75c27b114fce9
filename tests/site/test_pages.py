"""What Markdown makes of the sources, here and where a host shows the files."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMENT_THEN_TEXT = re.compile(r"^ {0,3}<!--.*-->.*\S.*$", re.MULTILINE)


def broken_paragraphs(text):
    """Lines that begin with a comment: a block of HTML, which ends the paragraph."""
    return [
        line
        for line in COMMENT_THEN_TEXT.findall(text)
        if not re.fullmatch(r" *<!--[^>]*--> *", line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_marker_of_a_number_breaks_its_paragraph(page):
    assert broken_paragraphs(page.read_text(encoding="utf-8")) == []


def test_a_broken_paragraph_is_found():
    bad = "It gains\n  <!-- figure:a/b .1f -->2.0<!-- /figure --> points\n"
    assert len(broken_paragraphs(bad)) == 1
    assert not broken_paragraphs("<!-- table:a -->\n\nIt is <!-- figure:a .1f -->2\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_of_the_repository_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|benchmarks|docs|flood_optax)/[\w./-]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
