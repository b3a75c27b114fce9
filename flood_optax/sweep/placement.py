"""Where and how the runs of a sweep are computed."""

import contextlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flood_optax.checks import one_of
from flood_optax.sweep.cores import number_of_cores, over_cores
from flood_optax.sweep.traced import Traced

Array = npt.NDArray[Any]
Strategy = Literal["vmap", "map", "shard"]


class Placement(NamedTuple):
    """Where and how the runs are computed.

    Attributes:
      one_by_one: whether a call runs one on a device (on a CPU as many calls at once as
        there are cores), or all of it together.
      mesh: the devices, where there are several.
    """

    one_by_one: bool
    mesh: Mesh | None

    @property
    def devices(self) -> int:
        """The number of devices, that divides the runs of a call."""
        return 1 if self.mesh is None else self.mesh.size

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Where there is a mesh, no other: a run, of one device, has a part in none."""
        no_mesh = Mesh(np.empty((), object), ())
        return jax.set_mesh(no_mesh) if self.mesh else contextlib.nullcontext()

    def chunk(self, number: int, chunk_size: int | None, *, watched: bool) -> int:
        """The runs between two synchronisations, a multiple of the devices."""
        chunks, least = 10, 1
        if self.one_by_one and self.mesh is None:
            chunks, least = 100, number_of_cores()
        if not watched:
            chunks = 1
        size = chunk_size or max(-(-number // (chunks * self.devices)), least)
        return min(size, -(-number // self.devices)) * self.devices

    def program(self, traced: Traced) -> Callable[[Any, Any], Any]:
        """The program of a call: of one run for each device, or of many together.

        On a CPU a loop around the program is faster than one in it: XLA runs a training
        loop within another loop slower by up to a tenth.
        """
        if self.one_by_one and self.mesh is None:
            return traced.function
        arrays = [x for x in traced.jaxpr.consts if isinstance(x, jax.Array)]
        spread = max((len(x.devices()) for x in arrays), default=1)
        if self.mesh is not None and spread > 1:
            raise ValueError(
                '`sweep.run(strategy="shard")` trains each run on one device, got a '
                f"train that uses an array on {spread}. Let it use a copy on the host: "
                "`np.asarray(array)`."
            )

        def one(levels: jax.Array, words: jax.Array) -> Any:
            return jax.tree.map(lambda x: x[None], traced.call(levels[0], words[0]))

        program = one if self.one_by_one else jax.vmap(traced.call)
        if self.mesh is None:
            return jax.jit(program)
        # Runs do not talk to one another, and what varies over the mesh is all.
        spec = PartitionSpec(self.mesh.axis_names)
        return jax.jit(
            jax.shard_map(
                program, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
            )
        )

    def train(
        self, program: Callable[..., Any], levels: Array, words: Array, chunk: int
    ) -> dict[str, Array]:
        """The rows of at most a chunk of runs."""
        if self.one_by_one and self.mesh is None:
            runs = list(zip(levels, words, strict=True))
            return _joined(np.stack, [*over_cores(program, runs, dict)])
        width = self.devices if self.one_by_one else chunk
        # The last call is filled up by repeating a run.
        runs = np.arange(-(-len(levels) // width) * width).clip(max=len(levels) - 1)
        calls = [
            program(self._put(levels[some]), self._put(words[some]))
            for some in runs.reshape(-1, width)
        ]
        joined = _joined(np.concatenate, self._fetch(calls))
        return {name: rows[: len(levels)] for name, rows in joined.items()}

    def _put(self, rows: Array) -> jax.Array:
        """The rows on the devices; every process holds them all and gives its part."""
        if self.mesh is None:
            return jax.device_put(rows)
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

    def _fetch(self, rows: list[dict[str, jax.Array]]) -> list[dict[str, Array]]:
        """The rows of all devices of all processes, in every process."""
        if all(value.is_fully_addressable for value in jax.tree.leaves(rows)):
            return jax.device_get(rows)
        return multihost_utils.process_allgather(rows, tiled=True)


def _joined(join: Callable[..., Array], parts: list[dict[str, Array]]) -> Any:
    return {name: join([rows[name] for rows in parts]) for name in parts[0]}


def placement(strategy: Any, mesh: Mesh | None) -> Placement:
    """The placement that was asked for, or the fastest that trains no run twice."""
    if strategy is None:
        alone = "map" if jax.default_backend() == "cpu" else "vmap"
        strategy = "shard" if jax.process_count() > 1 else alone
    one_of("sweep.run(strategy=...)", strategy, ("vmap", "map", "shard"))
    if strategy != "shard":
        if mesh is not None:
            raise ValueError(
                '`sweep.run(mesh=...)` needs strategy="shard", got a mesh with '
                f"strategy={strategy!r}."
            )
        return Placement(strategy == "map", None)
    mesh = mesh or Mesh(np.array(jax.devices()), ("runs",))
    return Placement(mesh.devices.flat[0].platform == "cpu", mesh)
