"""Optax's own tests of contributed optimizers, unchanged, on both optax forms.

This file is also a script: it reads a test file of optax's wheel, replaces the list of
optimizers under test, and stands in for `optax.contrib.momo` and `momo_adam`, because
the tests hand `value=` to these names.
"""

import importlib.metadata
import pathlib
import re
import sys
import types
import unittest

import optax
import pytest
from optax import contrib

import flood_optax
from tests import processes

SOURCE = pathlib.Path(contrib.__file__).with_name("_common_test.py")
LISTS = re.compile(
    r"_ALL_OPTIMIZERS_UNDER_TEST = tuple\(.*?# pylint: enable=invalid-name", re.DOTALL
)
NAMES = """
_MAIN_OPTIMIZERS_UNDER_TEST = _ALL_OPTIMIZERS_UNDER_TEST = tuple(
    {
        'opt_name': name,
        'opt_kwargs': {'learning_rate': rate},
        'wrapper_name': None,
        'wrapper_kwargs': None,
    }
    for name, rate in (('momo', 1e-3), ('momo_adam', 1e-2))
)
"""


def flood_sgd(learning_rate: optax.ScalarOrSchedule, level: float = 0.0):
    return optax.chain(flood_optax.scale_by_flood(level), optax.sgd(learning_rate))


def flood_adam(learning_rate: optax.ScalarOrSchedule, level: float = 0.0):
    return flood_optax.flood(optax.adam(learning_rate), level, band=0.05)


def optax_tests() -> types.ModuleType:
    """The tests as a module, with our optimizers in its lists."""
    source, replaced = LISTS.subn(NAMES, SOURCE.read_text())
    if replaced != 1:
        raise SystemExit("optax's test file has another form: adapt this script")
    module = types.ModuleType("optax_common_test")
    sys.modules[module.__name__] = module
    exec(compile(source, str(SOURCE), "exec"), module.__dict__)
    return module


# optax's tests by name, and how many cases each has over the two forms
COUNTS = {
    "test_gradient_accumulation": 4,
    "test_optimizers": 8,
    "test_optimizers_accept_extra_args": 4,
    "test_optimizers_accept_learning_rate_schedule_if_type_annotated_as_such": 2,
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": 2,
    "test_preserve_dtype": 4,
    "test_state_shape_dtype_shard_stability": 8,
}
CASES = [f"{name}{i}" for name, count in COUNTS.items() for i in range(count)]


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.metadata.version("optax").startswith("0.2.8"),
    reason="optax's test file is private: its form is known for optax 0.2.8 alone.",
)
@pytest.mark.parametrize("case", CASES)
def test_optax_contrib_tests_pass_unchanged_on_both_forms(case):
    processes.assert_held(case, __file__)


def main():
    contrib.momo, contrib.momo_adam = flood_sgd, flood_adam
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(optax_tests().ContribTest)
    tests = {test.id().split(".")[2].split()[0]: test for test in suite}
    if sorted(tests) != sorted(CASES):
        raise SystemExit("optax has other tests: list them in this file")
    # debug() raises what is wrong, a skipped test included
    processes.report({name: test.debug for name, test in tests.items()})


if __name__ == "__main__":
    main()
