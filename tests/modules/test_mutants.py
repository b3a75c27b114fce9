"""The list of breaks keeps up with the library; running them is another matter."""

import pathlib

import pytest

from tests.mutants import breaks

ROOT = pathlib.Path(__file__).parents[2]


def test_every_break_still_changes_one_place_and_names_its_tests():
    for mutant in breaks.BREAKS:
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert breaks.applied(mutant, text) != text
        files, _, _ = mutant.tests.partition(" -k ")
        assert all((ROOT / name).is_file() for name in files.split())


def test_break_that_no_longer_applies_is_an_error():
    mutant = breaks.Break("bend.py", "x = 1", "x = 2", "")
    with pytest.raises(ValueError, match="holds 2 times, not once"):
        breaks.applied(mutant, "x = 1\nx = 1\n")
