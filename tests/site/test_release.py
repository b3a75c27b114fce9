"""What a release says of itself agrees: version, floors, changelog, API index."""

import importlib
import inspect
import pathlib
import re
import tomllib

import pytest

import flood_optax

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INDEX = (ROOT / "docs" / "api" / "index.md").read_text()
MODULES = ("objective", "shapes", "levels", "sweep", "penalty", "sharpness", "flax")


def test_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    (cited,) = re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    assert flood_optax.__version__ == PROJECT["version"] == cited


def test_install_page_names_the_floors_of_the_package():
    page = (ROOT / "docs" / "install.md").read_text()
    floors = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", page, re.MULTILINE))
    needed = [PROJECT["requires-python"].replace(">=", "Python>=")]
    assert floors == dict(x.split(">=") for x in needed + PROJECT["dependencies"])
    for extra in re.findall(r"flood_optax\[(\w+)\]", page):
        assert extra in PROJECT["optional-dependencies"]


def test_changelog_has_the_version_or_says_unreleased():
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(
        r"^## \[([^\]]+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE
    )
    assert heads, "no section"
    versions = [head for head, _ in heads]
    assert versions[0] == "Unreleased" or PROJECT["version"] == versions[0]
    assert all(date for head, date in heads if head != "Unreleased")


def listed():
    """The names under the autosummaries of the API index."""
    return re.findall(r"^   (?!:)([\w.]+)$", INDEX, re.MULTILINE)


def lookup(name):
    module, _, attribute = name.rpartition(".")
    package = ".".join(["flood_optax", *filter(None, [module])])
    return getattr(importlib.import_module(package), attribute)


def public():
    """Each public object once, by the names under which it can be imported."""
    found = {}
    for name in ("", *MODULES):
        module = importlib.import_module(f"flood_optax.{name}".rstrip("."))
        for attribute in getattr(module, "__all__", ()):
            if not inspect.ismodule(value := getattr(module, attribute)):
                found.setdefault(id(value), []).append(f"{name}.{attribute}".strip("."))
    return found


def test_every_public_name_has_a_line_in_the_api_index():
    lines = set(listed())
    missing = [names for names in public().values() if not lines.intersection(names)]
    assert not missing, "add a line to docs/api/index.md"


@pytest.mark.parametrize("name", listed())
def test_every_line_of_the_api_index_is_a_public_name(name):
    assert lookup(name) is not None
    assert len(lookup(name).__doc__ or "") > 40


def test_no_public_name_has_two_lines():
    objects = [id(lookup(name)) for name in listed()]
    assert len(objects) == len(set(objects)) > 30
