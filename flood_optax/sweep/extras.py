"""What optional packages add; each is asked for by name when it is missing."""

import contextlib
import importlib
from collections.abc import Callable, Generator
from typing import Any


def optional(module: str, call: str) -> Any:
    """Imports an optional package, or says which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"`{call}` needs {package}: pip install 'flood_optax[bench]'."
        ) from error


@contextlib.contextmanager
def progress_bar(
    call: str, *, shown: bool, total: int | None, done: int = 0, unit: str
) -> Generator[Callable[[int], Any]]:
    """Shows a tqdm bar; gives the function that advances it."""
    if not shown:
        yield lambda number: None
        return
    tqdm = optional("tqdm", call).tqdm
    with tqdm(total=total, initial=done, unit=unit) as bar:
        yield bar.update
