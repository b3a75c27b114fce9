"""The proposal to Optax, in a copy of Optax: its own tests, and the numbers of ours.

The copy is of the installed Optax, or of the checkout that `OPTAX_SOURCE` names, which
has the sharding tests too. This file is also the script that runs in the copy.
"""

import doctest
import functools
import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import processes
from tests.claims.test_docs import blocks

ROOT = pathlib.Path(__file__).parents[2]
PROPOSAL = ROOT / "proposals" / "optax_contrib"
PATCH = PROPOSAL / "optax.patch"
CHECKOUT = os.environ.get("OPTAX_SOURCE")
COUNTS = {"_common_test": 16, "_sharding_test": 1, "_flood_test": 11}
MARKS = (
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("git") is None, reason="`git apply` is missing."),
    pytest.mark.skipif(
        not CHECKOUT and not importlib.metadata.version("optax").startswith("0.2.8"),
        reason="The patch is for optax 0.2.8, or a checkout that OPTAX_SOURCE names.",
    ),
)


def in_a_copy(test):
    return functools.reduce(lambda marked, mark: mark(marked), MARKS, test)


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """The root of a copy of Optax with the proposal in it."""
    root = tmp_path_factory.mktemp("optax")
    package = pathlib.Path(optax.__file__).parent
    if CHECKOUT:
        package = pathlib.Path(CHECKOUT) / "optax"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, root / "optax", ignore=skip)
    named = re.findall(r"^\+\+\+ b/(\S+)$", PATCH.read_text(), re.MULTILINE)
    there = [f"--include={name}" for name in named if (root / name).exists()]
    # the copy is no part of a repository that it may lie in
    apart = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    subprocess.run(
        ["git", "apply", *there, str(PATCH)], cwd=root, env=apart, check=True
    )
    for name in ("_flood.py", "_flood_test.py"):
        shutil.copy(PROPOSAL / name, root / "optax" / "contrib" / name)
    return root


def run(patched, check):
    """What the check, a test file of Optax or a function here, prints in the copy."""
    path = os.pathsep.join([str(patched), str(ROOT)])
    started = processes.start(__file__, check, filters=(), PYTHONPATH=path)
    code, out, errors = processes.end(started)
    assert code == 0, errors[-3000:]
    return out


@in_a_copy
@pytest.mark.parametrize("name", COUNTS)
def test_optax_tests_pass_on_the_proposal(name, patched):
    if not (patched / "optax" / "contrib" / f"{name}.py").exists():
        pytest.skip("Optax's wheel has no sharding tests: name a checkout.")
    assert run(patched, name) == f"{COUNTS[name]} run, 0 skipped\n"


@in_a_copy
def test_proposal_takes_the_steps_of_our_transformation_and_its_example_runs(patched):
    assert run(patched, "steps") == "the same steps, 12 of 20 below\n"
    assert run(patched, "example") == "10 tried, 0 failed\n"


def test_proposal_has_the_form_that_optax_asks_for():
    text = (PROPOSAL / "_flood.py").read_text()
    assert text.count("\n") <= 150
    assert "axis_name" not in text
    assert "      *,\n      value: jax.typing.ArrayLike,\n" in text
    for path in PROPOSAL.glob("*.py"):
        lines = path.read_text().splitlines()
        assert max(map(len, lines)) <= 80
        assert re.fullmatch(
            r"# Copyright 20\d\d DeepMind .* Rights Reserved.", lines[0]
        )
        indents = {len(line) - len(line.lstrip()) for line in lines if line.strip()}
        assert 2 in indents
        assert all(indent % 2 == 0 for indent in indents)
    # no more of Optax than a line above and below each change
    context = 0
    for line in PATCH.read_text().splitlines():
        context = context + 1 if line.startswith(" ") else 0
        assert context <= 2


@pytest.mark.slow
def test_numbers_of_the_issue_are_those_of_its_program(capsys):
    text = (PROPOSAL / "multi_steps_issue.md").read_text()
    for code in blocks(text):
        exec(compile(code, "multi_steps_issue.md", "exec"), {})
    printed = np.array(re.findall(r"-?\d+\.\d+", capsys.readouterr().out), float)
    table = text[text.index("|---") :]
    written = np.array(re.findall(r"-?\d+\.\d{3}", table), float)
    assert printed.size == 18
    np.testing.assert_allclose(written, printed, atol=5.1e-4)


# ---- in the copy ----


def steps():
    """An uneven loss, a level met from both sides, and Adam behind it."""
    import flood_optax  # noqa: PLC0415

    def loss_fn(w):
        return jnp.mean(jnp.exp(w) - w - 1.0)

    ends = []
    for flood in (optax.contrib.scale_by_flood(0.3), flood_optax.scale_by_flood(0.3)):
        optimizer = optax.chain(flood, optax.adam(0.2))
        w = jnp.array([1.5, -0.7, 0.4])
        state, path = optimizer.init(w), []
        for _ in range(20):
            value, grads = jax.value_and_grad(loss_fn)(w)
            updates, state = optimizer.update(grads, state, w, value=value)
            w = optax.apply_updates(w, updates)
            path.append(w)
        ends.append(
            (np.stack(path), [int(n) for n in state[0] if n.dtype == jnp.int32])
        )
    (theirs, counts), (ours, own_counts) = ends
    np.testing.assert_array_equal(theirs, ours)
    assert counts == own_counts
    print(f"the same steps, {counts[1]} of {counts[0]} below")  # noqa: T201


def example():
    result = doctest.testmod(importlib.import_module("optax.contrib._flood"))
    print(f"{result.attempted} tried, {result.failed} failed")  # noqa: T201


def optax_tests(name):
    """The cases of this transformation, skipped ones counted."""
    module = importlib.import_module(f"optax.contrib.{name}")
    assert str(ROOT) not in str(module.__file__)
    cases, found = [], unittest.defaultTestLoader.loadTestsFromModule(module)
    for suite in found:
        cases += [t for t in suite if "flood" in t.id().lower()]
    result = unittest.TextTestRunner(verbosity=0).run(unittest.TestSuite(cases))
    assert result.wasSuccessful()
    print(f"{result.testsRun} run, {len(result.skipped)} skipped")  # noqa: T201


if __name__ == "__main__":
    checks = {"steps": steps, "example": example}
    checks.get(sys.argv[1], functools.partial(optax_tests, sys.argv[1]))()
