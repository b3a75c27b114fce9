"""What a release says of itself agrees: version, floors, changelog, API index."""

import importlib
import importlib.util
import inspect
import pathlib
import re
import tomllib

import pytest

import flood_optax

ROOT = pathlib.Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
INDEX = (ROOT / "docs" / "api" / "index.md").read_text()
MODULES = ("objective", "shapes", "levels", "sweep", "penalty", "sharpness", "flax")


def test_version_is_the_same_everywhere():
    citation = (ROOT / "CITATION.cff").read_text()
    (cited,) = re.findall(r"^version: (.+)$", citation, re.MULTILINE)
    assert flood_optax.__version__ == PROJECT["version"] == cited
    assert f'repository-code: "{PROJECT["urls"]["Source"]}"' in citation


def test_readme_of_the_package_links_to_files_of_the_tag():
    """By the rules of pyproject.toml; `.ci/package` looks at the built one."""
    text, source = (ROOT / "README.md").read_text(), PROJECT["urls"]["Source"]
    relative = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    readme = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for each in readme["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    raw = source.replace("//github.com", "//raw.githubusercontent.com") + "/v"
    blob = f"{source}/blob/v"
    files = re.findall(rf"\]\((?:{raw}|{blob})\$HFPR_VERSION/([^)#]+)", text)
    assert files == relative
    assert len(files) > 9
    assert not re.search(r"\]\((?!https?:|#)", text)
    assert re.findall(r"!\[[^\]]*\]\((.*?/v)\$", text) == [raw]


def test_install_page_names_the_floors_of_the_package():
    page = (ROOT / "docs" / "install.md").read_text()
    floors = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|$", page, re.MULTILINE))
    needed = [PROJECT["requires-python"].replace(">=", "Python>=")]
    assert floors == dict(x.split(">=") for x in needed + PROJECT["dependencies"])
    extras = re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", page)
    assert len(extras) == 4
    for extra in extras:
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


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SETUP = re.compile(r"pip install (uv|build (pypiserver )?uv|-e '\.\[dev\]')")
SCRIPT = re.compile(r"(?:python )?(\.ci/[\w.]+)\b|\.venv/bin/python -m pytest")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_of_workflow_are_pinned_by_commit(path):
    uses = re.findall(r"uses: (.+)$", path.read_text(), re.MULTILINE)
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+(\.\d+)+", action), (
            action
        )


def test_one_action_has_one_pin():
    text = "".join(path.read_text() for path in WORKFLOWS)
    pins = set(re.findall(r"uses: (\S+)@(\S+)", text))
    assert len(pins) == len({action for action, _ in pins})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_scripts_and_holds_no_logic(path):
    """What cannot run here must be nothing but calls of what can."""
    commands = re.findall(r"- run: (.+)$", path.read_text(), re.MULTILINE)
    assert commands
    assert path.read_text().count("run:") == len(commands), "a block of shell"
    for command in commands:
        if not SETUP.fullmatch(command):
            call = SCRIPT.match(command)
            assert call, command
            assert not call[1] or (ROOT / call[1]).is_file(), command


def test_scripts_of_the_workflows_are_run_here_too():
    """Those of the release are run by `.ci/rehearse`, which reads the workflow."""
    own = (ROOT / ".ci" / "run").read_text()
    text = "".join(path.read_text() for path in WORKFLOWS if path.stem != "release")
    scripts = set(re.findall(r"\.ci/[\w.]+", text))
    assert ".ci/rehearse" in scripts
    for script in scripts:
        assert script in own, script


def test_check_before_the_upload_is_that_of_the_upload():
    """A new version of the action asks for a look at what it uploads with."""
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    (version,) = re.findall(r"gh-action-pypi-publish@\w+ # (\S+)", workflow)
    pins = (ROOT / ".ci" / "upload.txt").read_text()
    assert f"gh-action-pypi-publish {version} " in pins
    assert dict(re.findall(r"^(\w+)==([\d.]+)$", pins, re.MULTILINE)).keys() == {
        "packaging",
        "twine",
    }


def test_pythons_of_the_classifiers_are_those_of_the_workflow():
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    tried = set(re.findall(r'"(3\.\d+)"', text))
    prefix = "Programming Language :: Python :: "
    names = [line for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert {name.removeprefix(prefix) for name in names} == tried


RELEASE = {
    "pyproject.toml": '[project]\nversion = "0.2.0"\n'
    '[project.urls]\nSource = "https://github.com/a/b"\n',
    "flood_optax/__init__.py": '__version__ = "0.2.0"\n',
    "CITATION.cff": 'title: x\nversion: 0.2.0\ndate-released: "2030-01-31"\n',
    "CHANGELOG.md": "# Changelog\n\n## [0.2.0] - 2030-01-31\n",
}


@pytest.mark.parametrize(
    ("tag", "file", "text", "fault"),
    [
        ("v0.2.0", None, "", None),
        ("0.2.0", None, "", "the tag 0.2.0 is not v0.2.0"),
        ("v0.2.1", None, "", "the tag v0.2.1 is not v0.2.0"),
        ("v0.2.0", "flood_optax/__init__.py", '__version__ = "0.1.0"\n', "__version__"),
        (
            "v0.2.0",
            "CITATION.cff",
            'version: x\nversion: 0.2.0rc1\ndate-released: "2030-01-31"\n',
            "CITATION.cff differs",
        ),
        (
            "v0.2.0",
            "CITATION.cff",
            "x\nversion: 0.2.0\n",
            "CITATION.cff has another date",
        ),
        ("v0.2.0", "CHANGELOG.md", "## [Unreleased]\n\n- 0.2.0\n", "no dated section"),
        ("v0.2.0", "CHANGELOG.md", "## [0.2.0]\n", "no dated section"),
    ],
)
def test_release_is_refused_unless_tag_and_texts_agree(
    tmp_path, tag, file, text, fault
):
    for name, content in RELEASE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text if name == file else content)
    path = ROOT / ".ci" / "release.py"
    spec = importlib.util.spec_from_file_location("release", path)
    release = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release)
    found = release.faults(tag, tmp_path, "a/b")
    assert (fault in found[0] and len(found) == 1) if fault else found == []
    elsewhere = release.faults(tag, tmp_path, "a/c")
    assert elsewhere == [*found, "https://github.com/a/b is not a/c"]
