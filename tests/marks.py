"""Which cases of a test run every time, and which with the slow ones."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def slow_but(always: Container[Any], every: Iterable[Any]) -> list[Any]:
    """Every case for `parametrize`; those that do not run `always` are slow."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else [case]),
            marks=[] if case in always else pytest.mark.slow,
        )
        for case in every
    ]
