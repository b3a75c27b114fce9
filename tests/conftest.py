"""Fixtures shared by the tests."""

from collections.abc import Iterator

import jax
import pytest

# scripts, which tests start in processes of their own
collect_ignore = ["contract/precision_matrix.py", "contract/optax_conformance.py"]


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit types."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)
