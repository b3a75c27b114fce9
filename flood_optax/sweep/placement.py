"""Where the runs of a sweep are computed: one by one, together, or over devices."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flood_optax.checks import check_one_of, check_that
from flood_optax.sweep.cores import number_of_cores, over_cores
from flood_optax.sweep.inputs import Array
from flood_optax.sweep.traced import Traced

Strategy = Literal["vmap", "map", "shard"]
Rows = dict[str, Array]


class Runs(NamedTuple):
    """The runs to do, of the grid of all levels and keys.

    Attributes:
      numbers: which of the grid, level by level: level times keys, plus key.
      levels: of the grid.
      words: the numbers of the keys of the grid.
    """

    numbers: Array
    levels: Array
    words: Array

    def of(self, numbers: Array) -> tuple[Array, Array]:
        """The level and the key's numbers of each."""
        level, key = np.divmod(numbers, len(self.words))
        return self.levels[level], self.words[key]


# Of a traced training, the runs, the size of a chunk (None is the default) and whether
# somebody waits for chunks: the numbers and the rows of one chunk after another.
Trainer = Callable[[Traced, Runs, int | None, bool], Iterator[tuple[Array, Rows]]]


def one_by_one(
    traced: Traced, runs: Runs, chunk_size: int | None, watched: bool
) -> Iterator[tuple[Array, Rows]]:
    """Trains one run after another, on a CPU as many at a time as it has cores.

    On a CPU a loop around the program is faster than one in it: XLA runs a training
    loop within another loop slower by up to a tenth.
    """
    number = len(runs.numbers)
    size = chunk_size or max(parts(number, 100 if watched else 1), number_of_cores())
    for some in np.array_split(runs.numbers, parts(number, size)):
        arguments = list(zip(*runs.of(some), strict=True))
        yield some, _joined(np.stack, over_cores(traced.function, arguments, dict))


def together(
    traced: Traced, runs: Runs, chunk_size: int | None, watched: bool
) -> Iterator[tuple[Array, Rows]]:
    """Trains a chunk of runs at once."""
    program = vmapped(traced)
    for table in tables(runs, chunk_size, watched=watched):
        levels, words = runs.of(table)
        yield _once(table, jax.device_get(program(levels, words[:, 0])))


def over_devices(
    traced: Traced,
    runs: Runs,
    chunk_size: int | None,
    watched: bool,
    *,
    mesh: Mesh,
) -> Iterator[tuple[Array, Rows]]:
    """Trains a share of the runs on each device: on a CPU one by one, else together."""
    program = sharded(traced, mesh)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def put(rows: Array) -> jax.Array:  # every process has all, and gives its part
        return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

    if on_cpu(mesh):
        number = len(runs.numbers)
        chunk = chunk_size or parts(number, mesh.size * (10 if watched else 1))
        chunks = [
            [table[:, None] for table in in_equal(some, mesh.size)]
            for some in np.array_split(runs.numbers, parts(number, chunk * mesh.size))
        ]
    else:
        chunks = [
            [t] for t in tables(runs, chunk_size, watched=watched, devices=mesh.size)
        ]
    for calls in chunks:
        given = [(levels, words[:, 0]) for levels, words in map(runs.of, calls)]
        rows = [program(put(levels), put(words)) for levels, words in given]
        yield _once(np.concatenate(calls), _joined(np.concatenate, _fetched(rows)))


def on_cpu(mesh: Mesh) -> bool:
    """Whether a device gains nothing by runs that are trained together."""
    return mesh.devices.flat[0].platform == "cpu"


def vmapped(traced: Traced) -> Any:
    """The program of levels [keys, levels] and the numbers of keys [keys, words]."""
    return jax.jit(_nested(traced))


def _nested(traced: Traced) -> Callable[[Any, Any], Any]:
    # Levels are batched within keys: what depends on the key alone, such as its batches
    # and where it starts, is computed once for all of them.
    of_key = jax.vmap(traced.call, in_axes=(0, None))

    def of_keys(levels: jax.Array, words: jax.Array) -> Any:
        if len(words) > 1:
            return jax.vmap(of_key)(levels, words)
        # A batch of one key costs more than none.
        return jax.tree.map(lambda x: x[None], of_key(levels[0], words[0]))

    return of_keys


def sharded(traced: Traced, mesh: Mesh) -> Any:
    """The program of `vmapped` on each device, of one run on each if that is a CPU."""
    arrays = [x for x in traced.jaxpr.consts if isinstance(x, jax.Array)]
    spread = max((len(x.devices()) for x in arrays), default=1)
    rule = "be given a train whose arrays are on one device, as each run is"
    remedy = " Let it use a copy on the host: `np.asarray(array)`."
    got = f"one that uses an array on {spread}"
    check_that(spread == 1, 'sweep.run(strategy="shard")', rule, got, remedy)

    def alone(levels: jax.Array, words: jax.Array) -> Any:
        rows = traced.call(levels[0, 0], words[0])
        return jax.tree.map(lambda x: x[None, None], rows)

    program = alone if on_cpu(mesh) else _nested(traced)
    spec = PartitionSpec(mesh.axis_names)
    # Runs do not talk to one another, and what varies over the mesh is all.
    return jax.jit(
        jax.shard_map(
            program, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    )


def tables(
    runs: Runs, chunk_size: int | None, *, watched: bool, devices: int = 1
) -> list[Array]:
    """The runs in tables of one shape, [keys, levels], that are trained at once.

    A row has levels of one key. Its last run is repeated where a row is not full, and
    the last row where a table is not.
    """
    share = parts(len(runs.numbers), devices)
    chunk = min(chunk_size or parts(share, 10 if watched else 1), share)
    keys = runs.numbers % len(runs.words)
    of_key = [runs.numbers[keys == key] for key in np.unique(keys)]
    width = equal_size(max(map(len, of_key)), chunk)
    rows = [row for numbers in of_key for row in in_equal(numbers, width)]
    # Whoever waits for nothing, and limits nothing, gets all in one call.
    most = max(chunk // width, 1) if chunk_size or watched else len(rows)
    height = equal_size(parts(len(rows), devices), most)
    return [np.stack([*part]) for part in in_equal(np.array(rows), height * devices)]


def in_equal(rows: Array, size: int) -> list[Array]:
    """Chunks of ``size``, the last one filled up by repeating the last row."""
    filled = np.arange(parts(len(rows), size) * size).clip(max=len(rows) - 1)
    return [*rows[filled].reshape(-1, size, *rows.shape[1:])]


def equal_size(number: int, most: int) -> int:
    """The size of as few equal parts as can be, of ``most`` things at most."""
    return parts(number, parts(number, most))


def parts(number: int, size: int) -> int:
    """How many parts of a size hold a number of things."""
    return math.ceil(number / size)


def _once(table: Array, rows: Rows) -> tuple[Array, Rows]:
    """The runs of a table and their rows [keys, levels, ...], none of them twice."""
    numbers, first = np.unique(table, return_index=True)
    return numbers, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[first], rows)


def _fetched(calls: list[dict[str, jax.Array]]) -> list[Rows]:
    """The rows of all devices of all processes, in every process."""
    if all(value.is_fully_addressable for value in jax.tree.leaves(calls)):
        return jax.device_get(calls)
    from jax.experimental import multihost_utils  # noqa: PLC0415, slow to import

    return multihost_utils.process_allgather(calls, tiled=True)


def _joined(join: Callable[..., Array], calls: Iterable[Rows]) -> Rows:
    return jax.tree.map(lambda *rows: join(rows), *calls)


def no_mesh() -> contextlib.AbstractContextManager[Any]:
    """For runs of one device each, which have a part in no mesh that is set."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def placement(
    strategy: Any, mesh: Mesh | None
) -> tuple[Trainer, Callable[[], contextlib.AbstractContextManager[Any]]]:
    """How to train, and in what context to trace and train.

    Without a strategy it is the fastest that trains no run twice.
    """
    if strategy is None:
        alone = "map" if jax.default_backend() == "cpu" else "vmap"
        strategy = "shard" if jax.process_count() > 1 else alone
    check_one_of("sweep.run(strategy=...)", strategy, ("vmap", "map", "shard"))
    if strategy == "shard":
        mesh = mesh or Mesh(np.array(jax.devices()), ("runs",))
        return functools.partial(over_devices, mesh=mesh), no_mesh
    got, rule = f"a mesh with strategy={strategy!r}", 'come with strategy="shard"'
    check_that(mesh is None, "sweep.run(mesh=...)", rule, got)
    return together if strategy == "vmap" else one_by_one, contextlib.nullcontext
