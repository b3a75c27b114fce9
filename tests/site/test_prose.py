"""The prose of the pages follows CONTRIBUTING.md, as far as a machine can tell."""

import pytest

from tests import prose

LONG = "It falls " + "and falls " * 12 + "at last."
FAULTS = {
    "a long sentence": (f"Short. {LONG} Short.", "28 words"),
    "a long item of a list": (f"* Short.\n* {LONG}\n", "28 words"),
    "a change of sign": ("Below b the gradient turns.", "sign or the direction"),
    "a figure of speech": ("It was a disaster.", "no figure of speech"),
    "two words for one": ("Know the rate of wrong labels.", "share of wrong labels"),
    "a riddle": ("Use it as it stands.", "normal word order"),
    "American": ("Regularization helps.", "British"),
    "a claim that holds 0": (
        f"It gains {prose.MINUS}0.5 ± 0.6 points.",
        "not told apart",
    ),
    "a hyphen for a minus": ("It is -3 points.", f"the minus is {prose.MINUS}"),
    "a per cent sign": ("Of 20% wrong labels.", "a space before %"),
    "a term from nowhere": ("Give it a band.", "'band' is neither explained nor"),
}
GOOD = (
    *(
        "Every share is 20 % in turn.",
        "It gains 1.5 ± 0.6 points.",
        f"It is {prose.MINUS}3 points.",
    ),
    *("Give it a *band*, b ± d. A band is wide.", "Give it [a band](averaging.md)."),
    f"    {LONG}\n",
    f"```python\n{LONG}\n```\n",
    f"| {LONG} |\n",
    f"<!-- table:a -->\n\n{LONG}\n\n<!-- /table:a -->\n",
    "One [sentence of](a/very/long/address.md) few words, `code = of + many(words)`.",
    "The band. See the [words](will-it-help.md#glossary).",
)


@pytest.mark.parametrize(("text", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found_on_its_line(text, fault):
    ((line, found),) = prose.faults(f"# Title\n\nShort.\n\n{text}\n")
    assert fault in found
    assert line == 5 + (text.startswith("*"))


@pytest.mark.parametrize("text", GOOD)
def test_what_follows_the_rules_passes(text):
    assert list(prose.faults(f"# Title\n\n{text}\n")) == []


def test_pages_follow_the_rules():
    assert prose.wrong() == []


def test_a_page_that_fails_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\nSurely.\n")
    assert prose.wrong([str(page)]) == [
        f"{page}:3: 'Surely': the interval leaves out 0"
    ]


def test_the_front_page_and_the_evidence_are_checked():
    checked = {page.relative_to(prose.ROOT).as_posix() for page in prose.pages()}
    assert checked >= {"README.md", "docs/traps.md", "docs/evidence/rivals.md"}
