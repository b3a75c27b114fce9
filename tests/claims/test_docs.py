"""Every Python block of the README and of docs/ runs, in order, page by page."""

import pathlib
import re
import textwrap

import pytest

from tests.marks import slow_but

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)(#[^)]*)?\)")


def blocks(text):
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        yield "\n" * line + textwrap.dedent(match.group(1))


# their blocks train or compile for five seconds or more; the others run every time
SLOW = (
    "averaging.md",
    "choosing-b.md",
    "family.md",
    "quickstart.md",
    "theory.md",
    "traps.md",
    "trainers.md",
    "unlearning.md",
)


@pytest.mark.parametrize(
    "page",
    slow_but([page for page in PAGES if page.name not in SLOW], PAGES),
    ids=lambda page: page.name,
)
def test_code_blocks_of_page_run(page, capsys):
    namespace = {"__name__": "__main__"}
    for code in blocks(page.read_text()):
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_page_lead_somewhere(page):
    for target, _ in LINK.findall(page.read_text()):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), target


def test_readme_is_short_and_has_its_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    assert "pip install -e '.[bench]' && python -m benchmarks quickstart" in text
    assert "pip install -e '.[test]' && python -m pytest" in text
    assert list(blocks(text)), "no code to run"


def test_a_broken_block_is_found():
    (code,) = blocks('text\n```python\nassert 1 == 2, "broken"\n```\n')
    with pytest.raises(AssertionError, match="broken"):
        exec(compile(code, "page", "exec"), {})
