"""Runs optax's own tests of contributed optimizers, unchanged, on both optax forms.

A script of its own process: it reads a test file of optax's wheel, replaces the list of
optimizers under test, and stands in for `optax.contrib.momo` and `momo_adam`, because
the tests hand `value=` to these names.
"""

import pathlib
import re
import sys
import types

import optax
from absl.testing import absltest
from optax import contrib

import flood_optax

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
    return flood_optax.flood(optax.adam(learning_rate), level)


def optax_tests() -> types.ModuleType:
    """The tests as a module, with our optimizers in its lists."""
    source, replaced = LISTS.subn(NAMES, SOURCE.read_text())
    if replaced != 1:
        raise SystemExit("optax's test file has another form: adapt this script")
    module = types.ModuleType("optax_common_test")
    sys.modules[module.__name__] = module
    exec(compile(source, str(SOURCE), "exec"), module.__dict__)
    return module


if __name__ == "__main__":
    contrib.momo, contrib.momo_adam = flood_sgd, flood_adam
    ContribTest = optax_tests().ContribTest
    absltest.main()
