"""Every level with every key: the grid of a sweep."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from flood_optax.checks import as_integer
from flood_optax.sweep.extras import optional, progress_bar
from flood_optax.sweep.inputs import (
    as_keys,
    as_levels,
    as_metrics,
    called,
)
from flood_optax.sweep.journal import Journal
from flood_optax.sweep.placement import Runs, Strategy, placement
from flood_optax.sweep.result import Result
from flood_optax.sweep.traced import fingerprint, trace


def run(
    train: Callable[[jax.Array, jax.Array], Mapping[str, Any]],
    levels: Any,
    keys: Any,
    *,
    strategy: Strategy | None = None,
    progress: bool = False,
    chunk_size: int | None = None,
    path: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
) -> Result:
    """Trains at every level with every key, in one compiled program.

    ``train`` is traced once and the program compiled once, whatever the numbers of
    levels and keys. The strategies agree to rounding; they differ in speed and memory:

    * "vmap" trains the runs of a chunk together, and computes once for all levels what
      depends on the key alone: for accelerators.
    * "map" trains one after another, on a CPU one on each core: for CPUs, or where
      memory is short: how many levels there are makes no difference to what it holds.
      With ``chunk_size=1`` it trains one at a time.
    * "shard" spreads the runs over all devices of ``mesh`` and, after
      `jax.distributed.initialize`, over the processes; every process calls `run`
      alike and gets the whole result. CPU devices map their share, others vmap it.

    Chunks are equal, and the number of devices need not divide that of runs: a call is
    filled up by repeating a run. Progress and files cost one synchronisation a chunk,
    nothing inside it.

    Args:
      train: (level, key) -> dict of metrics, arrays of real numbers whose shapes do not
        depend on the numbers given. Level is a scalar, float32 (float64 if given so
        and 64-bit types are enabled); key is one of ``keys``. Must be traceable.
      levels: distinct numbers, shape [levels]; -inf is no flooding.
      keys: distinct keys, shape [keys] as `jax.random.split` of a `jax.random.key`
        gives, or raw ones of shape [keys, words].
      strategy: "vmap", "map" or "shard"; None is "shard" where there are several
        processes, else "map" on a CPU, else "vmap".
      progress: whether to show a tqdm bar that advances with every chunk.
      chunk_size: runs per chunk and device, at most. By default all, and with
        ``progress`` or ``path`` a tenth of them ("map": a hundredth, but one for each
        core at least).
      path: a file to keep the runs in as they come, each by its level and key. If the
        process is killed, the same call again computes only what is missing and returns
        the same result (a changed strategy or chunk_size: to rounding). So does a call
        with other levels or keys, in any order: it adds to the file what that has not.
        A file of another training is refused, also if an array that ``train`` uses, the
        version of JAX or a setting that changes its numbers is another; so is a
        ``train`` with a callback into Python, of which that cannot be told. Of many
        processes, the first reads and writes it.
      mesh: for "shard", the devices; by default all there are.

    Returns:
      A `Result` whose metrics are NumPy arrays of shape [levels, keys, ...].

    Raises:
      ValueError: if the file is of another training; for wrong arguments.
      OSError: if the file cannot be written, as on a full disk. It keeps what it has;
        the same call again runs the chunk that did not fit, and what is missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flood_optax import flooded, sweep
      >>> def loss_fn(w):
      ...     return jnp.exp(w) - w - 1.0  # least, 0, at w = 0
      >>> def train(level, key):
      ...     optimizer = optax.sgd(0.1)
      ...     w = jax.random.uniform(key, minval=1.0, maxval=2.0)
      ...     def step(carry, _):
      ...         w, state = carry
      ...         grad = jax.grad(flooded(loss_fn, level))(w)
      ...         updates, state = optimizer.update(grad, state, w)
      ...         w = optax.apply_updates(w, updates)
      ...         return (w, state), loss_fn(w)
      ...     _, losses = jax.lax.scan(step, (w, optimizer.init(w)), length=100)
      ...     return {"curve": losses, "regret": abs(losses[-1] - 0.3)}
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> result = sweep.run(train, [0.0, 0.3, 0.6], keys, strategy="map")
      >>> print(result.metrics["curve"].shape, result.best("regret", mode="min"))
      (3, 2, 100) [0.3 0.3]
    """
    train_runs, context = placement(strategy, mesh)
    if chunk_size is not None:
        as_integer("sweep.run(chunk_size=...)", chunk_size, least=1)
    given, used = as_levels(levels, "sweep.run(levels)")
    seeds = as_keys(keys, "sweep.run(keys)")
    if progress:
        optional("tqdm", "sweep.run(progress=True)")

    def one(level: jax.Array, words: jax.Array) -> dict[str, jax.Array]:
        return as_metrics(train(level, seeds.unwrap(words)), "sweep.run(train)")

    with called("sweep.run(train)", train, "level", "key"), context():
        traced = trace(
            one,
            "sweep.run(train)",
            jax.ShapeDtypeStruct((), used.dtype),
            jax.ShapeDtypeStruct(seeds.data.shape[1:], seeds.data.dtype),
        )

    def header() -> dict[str, Any]:
        digest, hidden = fingerprint(traced.jaxpr)
        if hidden - {"debug_callback"}:  # which returns nothing
            raise ValueError(
                "`sweep.run(path=...)` must see all that is swept, to tell its file "
                f"from another's, but {', '.join(sorted(hidden))} hides a function of "
                "Python. Compute it in JAX, or leave path out."
            )
        return {
            "key": seeds.impl,
            "metrics": {n: [str(x.dtype), [*x.shape]] for n, x in traced.shape.items()},
            "train": digest,
        }

    words = seeds.data.tolist()
    names = [(repr(float(level)), *word) for level in used for word in words]
    journal = Journal(path, traced.shape, names, header)
    runs = Runs(journal.missing, used, seeds.data)
    watched = progress or path is not None
    bar = progress_bar(
        "sweep.run(progress=True)",
        shown=progress and jax.process_index() == 0,
        total=len(names),
        done=len(names) - len(runs.numbers),
        unit="run",
    )
    with context(), bar as advance:
        if len(runs.numbers):
            for done, rows in train_runs(traced, runs, chunk_size, watched):
                journal.add(done, rows)
                advance(len(done))

    grid = (len(used), len(words))
    metrics = {n: x.reshape(*grid, *x.shape[1:]) for n, x in journal.metrics.items()}
    return Result(given, metrics, ("level", "key"), seeds.data)
