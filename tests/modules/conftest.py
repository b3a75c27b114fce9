"""What tests of sweeps watch: progress bars, chunks that are kept, programs."""

import logging
import types

import jax
import pytest

from flood_optax.sweep import journal


@pytest.fixture
def bars(monkeypatch):
    """Of tqdm: `updates`, as (n, total), and `closed`, as (initial, n, total)."""
    tqdm = pytest.importorskip("tqdm")
    seen = types.SimpleNamespace(updates=[], closed=[])

    class Bar(tqdm.tqdm):
        def update(self, n=1):
            seen.updates.append((n, self.total))
            return super().update(n)

        def close(self):
            seen.closed.append((self.initial, self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return seen


@pytest.fixture
def computed(monkeypatch):
    """The numbers of runs that are appended, chunk by chunk."""
    chunks, add = [], journal.Journal.add

    def spied(self, runs, rows):
        chunks.append(len(runs))
        add(self, runs, rows)

    monkeypatch.setattr(journal.Journal, "add", spied)
    return chunks


@pytest.fixture
def compiled(caplog):
    """How many programs have been compiled, of those with a word in their name."""
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda word="": sum(
            "Finished XLA compilation" in m and word in m for m in caplog.messages
        )
