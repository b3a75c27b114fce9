"""Many levels and seeds in one compiled program.

`run` trains every level with every key: one trace, one compilation. `forked` trains
every level on one sequence of batches and shares what is the same in all.
"""

from flood_optax.sweep.grid import run
from flood_optax.sweep.result import Choice, Result
from flood_optax.sweep.trunk import forked

__all__ = ["Choice", "Result", "forked", "run"]
