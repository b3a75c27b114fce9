"""Many levels and seeds in one compiled program.

`run` trains every level with every key: one trace, one compilation. `forked` trains
every level on one sequence of batches and shares what is the same in all.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flood_optax import journal
from flood_optax.extras import optional, progress_bar
from flood_optax.fork import forked
from flood_optax.results import Choice, Result
from flood_optax.traced import checked_keys, checked_levels, checked_metrics, trace

__all__ = ["Choice", "Result", "forked", "run"]

Array = npt.NDArray[Any]
Strategy = Literal["vmap", "map", "shard"]


def run(
    train: Callable[[jax.Array, jax.Array], Mapping[str, Any]],
    levels: Any,
    keys: Any,
    *,
    strategy: Strategy = "vmap",
    progress: bool = False,
    chunk_size: int | None = None,
    path: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
) -> Result:
    """Trains at every level with every key, in one compiled program.

    ``train`` is traced once and the program compiled once, whatever the numbers of
    levels and keys. The strategies agree to rounding; they differ in speed and memory:

    * "vmap" trains the runs of a chunk together: for accelerators.
    * "map" trains one after another (`jax.lax.map`): for one processor, or where
      memory is short. Its memory does not grow with the number of levels.
    * "shard" spreads the runs over all devices of ``mesh`` and, after
      `jax.distributed.initialize`, over the processes; every process calls `run`
      alike and gets the whole result. CPU devices map their share, others vmap it.

    Runs are split into chunks of equal size, one call of the program each; the last is
    filled up by repeating a run, so the number of devices need not divide that of
    runs. Progress and files cost one synchronisation a chunk, nothing inside it.

    Args:
      train: (level, key) -> dict of metrics, arrays of real numbers whose shapes do not
        depend on the numbers given. Level is a scalar, float32 (float64 if given so
        and 64-bit types are enabled); key is one of ``keys``. Must be traceable.
      levels: distinct numbers, shape [levels]; -inf is no flooding.
      keys: distinct keys, shape [keys] as `jax.random.split` of a `jax.random.key`
        gives, or raw ones of shape [keys, words].
      strategy: "vmap", "map" or "shard".
      progress: whether to show a tqdm bar that advances with every chunk.
      chunk_size: runs per chunk and device. By default all, and with ``progress`` or
        ``path`` a tenth of them ("map": a hundredth).
      path: a file to keep the results in as they come. If the process is killed, the
        same call again computes only what is missing and returns the same result (a
        changed strategy or chunk_size: to rounding). A file of another sweep is
        refused, also if ``train`` or its data changed. Of many processes, the first
        reads and writes it.
      mesh: for "shard", the devices; by default all there are.

    Returns:
      A `Result` whose metrics are NumPy arrays of shape [levels, keys, ...].

    Raises:
      TypeError: if ``train`` does not return a dict of real arrays, or ``levels`` or
        ``keys`` are of a wrong type.
      ValueError: if ``levels`` or ``keys`` are empty, of a wrong shape or not distinct,
        a level is NaN or +inf, the strategy is unknown, ``mesh`` comes without "shard",
        ``chunk_size`` is not positive, or the file is of another sweep or damaged.
      ImportError: if ``progress`` is asked for and tqdm is not installed.

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
    if strategy not in ("vmap", "map", "shard"):
        raise ValueError(
            f'`sweep.run(strategy=...)` must be "vmap", "map" or "shard", '
            f"got {strategy!r}."
        )
    if mesh is not None and strategy != "shard":
        raise ValueError(
            '`sweep.run(mesh=...)` needs strategy="shard", got a mesh with '
            f"strategy={strategy!r}."
        )
    _check_chunk_size(chunk_size)
    given, used = checked_levels(levels, "sweep.run(levels)")
    seeds = checked_keys(keys, "sweep.run(keys)")
    if progress:
        optional("tqdm", "sweep.run(progress=True)")
    level = jax.ShapeDtypeStruct((), used.dtype)
    traced = trace(_checked_train(train), "sweep.run(train)", level, seeds.like)

    number = len(used) * len(seeds.data)
    done = np.zeros(number, bool)
    metrics = {
        name: np.zeros((number, *like.shape), like.dtype)
        for name, like in traced.shape.items()
    }
    writes = path is not None and jax.process_index() == 0
    file = pathlib.Path(path or os.devnull)
    if path is not None:
        header = {
            "levels": [repr(float(level)) for level in used],
            "keys": [seeds.impl, seeds.data.tolist()],
            "metrics": {
                n: [str(v.dtype), list(v.shape[1:])] for n, v in metrics.items()
            },
            "train": traced.fingerprint(),
        }
        content = _from_first_process(journal.read(file) if writes else b"")
        good = journal.restore(content, header, file, done, metrics)
        if writes:
            journal.start(file, header, good)

    place = _Placement(strategy, mesh)
    watched = progress or path is not None
    size = place.chunk(number, chunk_size, watched=watched)
    missing = np.flatnonzero(~done)
    program = None
    with progress_bar(
        "sweep.run(progress=True)",
        shown=progress and jax.process_index() == 0,
        total=number,
        done=number - len(missing),
        unit="run",
    ) as advance:
        for begin in range(0, len(missing), size):
            runs = missing[begin : begin + size]
            padded = np.append(runs, np.repeat(runs[-1], size - len(runs)))
            chunk = (
                place.put(used[padded // len(seeds.data)]),
                place.put(seeds.data[padded % len(seeds.data)]),
            )
            program = program or place.compile(
                lambda level, data: traced.call(level, seeds.unwrap(data)), chunk
            )
            rows = {n: x[: len(runs)] for n, x in place.fetch(program(*chunk)).items()}
            for name, value in rows.items():
                metrics[name][runs] = value
            if writes:
                journal.append(file, runs, rows)
            advance(len(runs))

    grid = (len(used), len(seeds.data))
    shaped = {
        name: value.reshape(*grid, *value.shape[1:]) for name, value in metrics.items()
    }
    return Result(given, shaped, ("level", "key"), seeds.data)


class _Placement:
    """Where and how the runs of a chunk are computed."""

    def __init__(self, strategy: Strategy, mesh: Mesh | None) -> None:
        self.one_by_one = strategy == "map"
        self.mesh = mesh
        self.sharding = None
        if strategy == "shard":
            self.mesh = self.mesh or Mesh(np.array(cast(Any, jax.devices())), ("runs",))
            self.spec = PartitionSpec(self.mesh.axis_names)
            self.sharding = NamedSharding(self.mesh, self.spec)
            self.one_by_one = self.mesh.devices.flat[0].platform == "cpu"

    def chunk(self, number: int, chunk_size: int | None, *, watched: bool) -> int:
        """The runs of one call, a multiple of the number of devices."""
        devices = 1 if self.mesh is None else self.mesh.size
        calls = 1 if not watched else 100 if devices == 1 and self.one_by_one else 10
        size = chunk_size or -(-number // (calls * devices))
        return min(size, -(-number // devices)) * devices

    def put(self, rows: Array) -> jax.Array:
        """The rows on the devices; every process holds them all and gives its part."""
        if self.sharding is None:
            return jax.device_put(rows)
        return jax.make_array_from_callback(
            rows.shape, self.sharding, lambda index: rows[index]
        )

    def compile(
        self,
        one: Callable[[jax.Array, jax.Array], Any],
        arguments: tuple[jax.Array, ...],
    ) -> jax.stages.Compiled:
        """Compiles the program of a chunk from that of a run."""

        def mapped(*runs: jax.Array) -> Any:
            def each(run: tuple[jax.Array, jax.Array]) -> Any:
                return one(*run)

            return cast(Any, lax.map)(each, runs)

        program = mapped if self.one_by_one else jax.vmap(one)
        if self.mesh is not None:
            # Runs do not talk to one another, and what varies over the mesh is all.
            program = jax.shard_map(
                program,
                mesh=self.mesh,
                in_specs=self.spec,
                out_specs=self.spec,
                check_vma=False,
            )
        return jax.jit(program).lower(*arguments).compile()

    def fetch(self, rows: dict[str, jax.Array]) -> dict[str, Array]:
        """The rows of all devices of all processes, in every process."""
        if all(value.is_fully_addressable for value in rows.values()):
            return jax.device_get(rows)
        return multihost_utils.process_allgather(rows, tiled=True)


def _from_first_process(content: bytes) -> bytes:
    """What the first process read, in all of them."""
    if jax.process_count() == 1:
        return content
    length = multihost_utils.broadcast_one_to_all(np.int32(len(content)))
    padded = np.zeros(int(length), np.uint8)
    if jax.process_index() == 0:
        padded[:] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def _checked_train(train: Callable[..., Any]) -> Callable[..., dict[str, jax.Array]]:
    def checked(level: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        return checked_metrics(train(level, key), "sweep.run(train)")

    return checked


def _check_chunk_size(chunk_size: Any) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer):
        raise TypeError(
            f"`sweep.run(chunk_size=...)` must be an int, got {chunk_size!r}."
        )
    if chunk_size < 1:
        raise ValueError(
            f"`sweep.run(chunk_size=...)` must be positive, got {chunk_size}."
        )
