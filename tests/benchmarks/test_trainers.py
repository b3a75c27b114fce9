"""`python -m benchmarks trainers`: what it records, and what it makes of failures.

The trainers themselves are not installed: their modules are read, not run.
"""

import dataclasses
import json
import pathlib
import sys

import jax
import pytest

pytest.importorskip("sklearn", reason="the benchmarks need the extra `bench`")

from benchmarks import __main__ as benchmarks, environments as uv, report
from benchmarks.trainers import environments, page, rows, summary

KNOWN = environments.trainers()


def test_every_trainer_has_its_place_in_the_table():
    modules = {
        path.stem
        for path in environments.HERE.glob("*.py")
        if "REQUIREMENTS = " in path.read_text(encoding="utf-8")
    }
    assert list(KNOWN) == list(environments.ORDER)
    assert modules == KNOWN.keys()


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_trainer_pins_its_versions_and_has_a_recipe_on_the_page(name):
    trainer = KNOWN[name]
    assert trainer.requirements
    for requirement in trainer.requirements:
        assert trainer.absent or "==" in requirement, requirement
    code = page.blocks(trainer.section)
    assert code
    for block in code:
        compile(block, "page", "exec")
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 10, block


def test_every_recipe_that_the_suite_cannot_run_is_run_by_a_trainer():
    text = page.PAGE.read_text(encoding="utf-8")
    sections = {trainer.section for trainer in KNOWN.values()}
    for part in text.split("\n## ")[1:]:
        if "\n```py\n" in part:
            assert part.partition("\n")[0] in sections


def test_recipe_sees_what_all_share_and_what_it_is_given():
    found = rows.Run("Recipes", pathlib.Path(), smoke=True).recipe(given=3)
    assert found["given"] == 3
    assert found["scale_by_flood"]
    with pytest.raises(LookupError, match="no section 'Nowhere'"):
        page.blocks("Nowhere")


LOSSES = [0.3] * 30 + [0.19, 0.22] * 10


def test_row_tells_what_the_run_gave():
    made = rows.Row(
        form="loss form",
        line="`flooded(loss_fn, b)`",
        logs="the raw loss",
        level=0.2,
        losses=LOSSES,
        value="yes",
        evaluation=[0.4, 0.1],
        evaluation_raw=[0.4, 0.1 + 1e-7],
    ).checked()
    assert made["last"] == pytest.approx(0.205)
    assert made["below"] == 0.5
    assert made["steps"] == 50
    assert made["evaluation_off"] == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [0.1] * 40}, "the level is 0.2"),
        ({"losses": [0.201] * 40}, "share of 0.0 of them is below"),
        ({"evaluation": [0.4, 0.3]}, "differs by 0.19"),
        ({"evaluation_raw": [0.4, 0.3]}, "0.3, is not below the level"),
    ],
    ids=["not flooded", "above the level", "flooded evaluation", "nothing shown"],
)
def test_row_of_a_run_that_does_not_show_it_is_refused(change, message):
    row = rows.Row(
        form="loss form",
        line="`flooded(loss_fn, b)`",
        logs="the raw loss",
        level=0.2,
        losses=LOSSES,
        value="yes",
        evaluation=[0.4, 0.1],
        evaluation_raw=[0.4, 0.1],
    )
    with pytest.raises(AssertionError, match=message):
        dataclasses.replace(row, **change).checked()


@pytest.fixture
def here(monkeypatch):
    """Trainers that are run by the Python that runs the tests, without uv."""
    monkeypatch.setattr(uv, "command", lambda *_: [sys.executable])


def test_trainers_that_cannot_run_keep_rows_that_say_why(here, monkeypatch, tmp_path):
    def command(requirements, _):
        """What uv does with a package that is in no registry."""
        if requirements != ("absent==0",):
            return [sys.executable]
        said = "error: No solution found\n  cause: no such release | none\n"
        return [sys.executable, "-c", f"raise SystemExit({said!r})"]

    monkeypatch.setattr(uv, "command", command)
    made = {
        name: dataclasses.replace(
            KNOWN["equinox"],
            name=name,
            requirements=(f"{name}==0",),
            absent="A script." * (name == "none"),
        )
        for name in ("absent", "nowhere", "none")
    }
    monkeypatch.setattr(environments, "trainers", lambda: made)
    monkeypatch.setattr(environments, "fingerprint", lambda *_, **__: "same")
    command_line = ["trainers", "--smoke", "--out", str(tmp_path)]
    benchmarks.main(command_line)
    rows = json.loads((tmp_path / "trainers.json").read_text())["rows"]
    absent, failing, none = (row["error"] for row in rows)
    assert absent == "error: No solution found cause: no such release | none"
    assert failing.startswith("ModuleNotFoundError: No module named")
    assert none == "A script."
    table = report.tables(tmp_path)["trainers"]
    assert "not run: error: No solution found cause: no such release / none" in table
    assert "not run: ModuleNotFoundError" in table


def test_environment_is_what_uv_makes_of_the_requirements(monkeypatch):
    monkeypatch.setattr(uv.shutil, "which", lambda *_, **__: "uv")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python, wanted in ((here, sys.executable), ("3.99", "3.99")):
        first, *words = uv.command(("a==1", "b"), python)
        assert (first, words[-1]) == ("uv", "python")
        assert {"--with=a==1", "--with=b"} < set(words)
        assert words[words.index("--python") + 1] == wanted
    monkeypatch.setattr(uv.shutil, "which", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="uv is not installed: `pip install uv`"):
        uv.command(())


# those that the tests have installed: the one real run of each
INSTALLED = (
    *("equinox", "gan", "haiku", "keras", "linen", "muon", "nnx", "numpyro"),
    *("optimistix", "schedule_free", "sums"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTALLED)
def test_trainer_that_the_tests_have_floods_by_its_recipe(
    name, here, monkeypatch, tmp_path, capsys
):
    """The whole way: a process of its own, the page's recipe, the checked row."""
    benchmarks.main(["trainers", name, "--smoke", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "trainers.json").read_text())["rows"]
    assert "error" not in row, row["error"]
    assert row["versions"]["jax"] == jax.__version__
    capsys.readouterr()

    # the row is kept, and made again once what it depends on has changed
    monkeypatch.setattr(environments, "run", lambda *_, **__: pytest.fail("again"))
    benchmarks.main(["trainers", name, "--smoke", "--out", str(tmp_path)])
    with pytest.raises(pytest.fail.Exception, match="again"):
        benchmarks.main(["trainers", name, "--out", str(tmp_path)])


def test_messages_lose_the_paths_of_the_machine():
    assert environments.anonymous("no file /a/b/c.py here") == "no file PATH here"
    assert environments.anonymous("either/or, and/or") == "either/or, and/or"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "WARNING: slow\nERROR: no such release\nnotice: none\nWARNING: old",
            "ERROR: no such release notice: none",
        ),
        (
            "error: Nothing\n  cause: a is not there, b.\n",
            "error: Nothing cause: a is not there, b.",
        ),
        ("", "no output"),
        ("one\ntwo", "two"),
    ],
)
def test_refusal_of_an_installer_is_its_first_error_and_the_cause(said, expected):
    assert uv.why(said) == expected


def test_rows_become_tables():
    trainer = KNOWN["equinox"]
    row = rows.Row(
        form="loss form",
        line="`flooded(loss_fn, b)`",
        logs="the raw loss",
        level=0.2,
        losses=LOSSES,
        value="yes",
        evaluates_flooded=True,
        accumulates="each micro-batch",
        resume=0.0,
        wrong=[rows.Wrong("`flooded`", "raw loss {last:.2f}", {"last": 0.123})],
    ).checked()
    made = {"trainer": "one", **trainer.described(), **row, "seconds": 1.0}
    made |= {"date": "2026-12-01", "versions": {"python": "3.13.0", "equinox": "1.2"}}
    tables = summary.tables([made])
    link = "[Equinox](#equinox) 1.2"
    assert (
        f"| {link} | loss form | `flooded(loss_fn, b)` | the raw loss |"
        in (tables["trainers"])
    )
    assert "| yes | **yes** | **each micro-batch** |" in tables["trainers-does"]
    assert "| 0.2 | 0.205 | 50% | - | - | - | 0 |" in tables["trainers-runs"]
    assert "| `flooded` | raw loss 0.12 |" in tables["trainers-wrong"]
    assert "](../trainers.md#" in tables["trainers-wrong"]
    installed = " ".join(trainer.requirements)
    head = f"| `pip install {installed}`, Python 3.13.0, 2026-12-01 |"
    assert head in tables["trainers-runs"]
    failed = {"trainer": "two", **trainer.described(), "error": "why", "date": ""}
    assert "not run: why" in summary.tables([failed])["trainers"]
