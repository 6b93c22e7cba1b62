"""Placing arrays on the devices of a mesh and reading them back.

A host batch is a dict of arrays `(rows, ...)`, or `(steps, rows, ...)` for several steps in one
call. With several processes, each passes its own rows only (`Placement.rows`). A state is
replicated, except for the fields in `Placement.sharded`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.lift.processes import Processes
from trainer.state.leaves import name_leaves
from trainer.state.partition import partition_spec, partition_specs, state_specs
from trainer.state.train_state import TrainState
from trainer.step.task import AXIS


@dataclass(frozen=True)
class Placement(Processes):
    """Where the arrays of a run are, and in which form a lifted function takes them.

    Attributes:
        mesh: the devices, along the single axis "batch". Under vmap in one process, one device.
        kind: "vmap", "pmap" or "shard_map".
        num_shards: the number of shards of a batch, which is the size of the axis.
        sharded: the fields of a state that are sharded over the axis (`trainer.state.partition`).
    """

    kind: str
    num_shards: int
    sharded: tuple[str, ...] = ()

    @property
    def platform(self) -> str:
        """The platform of the devices: "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    def specs(self, state: TrainState, fields: Sequence[str] | None = None) -> Any:
        """The partition spec of each leaf of a state.

        Args:
            state: a state, or its global shapes.
            fields: the fields to shard; None: those of `sharded`.
        """
        fields = self.sharded if fields is None else fields
        return state_specs(state, fields, self.num_shards, AXIS)

    def specs_of(self, tree: Any) -> Any:
        """The partition spec of each leaf of a tree, with every leaf sharded that can be."""
        return partition_specs(tree, self.num_shards, AXIS)

    def rows(self, batch_size: int) -> slice | np.ndarray:
        """The rows of a global batch that this process passes, hence all that it has to read."""
        if self.num_processes == 1:
            return slice(None)
        per_device = batch_size // self.mesh.size
        rows = (self._positions[:, None] * per_device + np.arange(per_device)).ravel()
        if rows[-1] - rows[0] + 1 == len(rows):  # a slice of an array is a view, not a copy
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    def put_batch(self, batch: Mapping[str, np.ndarray], *, scan: bool = False) -> Any:
        """Moves this process's rows to its devices; each device receives only its shards.

        Args:
            batch: a host batch.
            scan: the batch has a leading axis of steps.
        """
        batch_dim = 1 if scan else 0
        if self.kind != "shard_map":
            batch = {name: self._split(array, batch_dim) for name, array in batch.items()}
        spec = partition_spec(batch_dim, AXIS)
        sharding = NamedSharding(self._local_mesh, spec)
        local = {name: _from_host(array, sharding) for name, array in batch.items()}
        if self.num_processes == 1 or self.kind == "pmap":  # pmap takes process-local arrays
            return local

        def to_global(leaf: jax.Array) -> jax.Array:
            shape = list(leaf.shape)
            shape[batch_dim] = shape[batch_dim] // self._local_mesh.size * self.mesh.size
            return _rewrap(leaf, NamedSharding(self.mesh, spec), tuple(shape))

        return jax.tree.map(to_global, local)

    def batch_shapes(self, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes that a lifted function takes for a global batch `(rows, ...)`.

        Under `pmap` too they are those of the batch of all processes, as needed for compiling ahead
        of time for devices that are not there.
        """

        def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = tuple(leaf.shape)
            if self.kind != "shard_map":
                shape = (self.num_shards, shape[0] // self.num_shards, *shape[1:])
            sharding = None if self.kind == "pmap" else self._batch_sharding(0)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

        return {name: shape_of(leaf) for name, leaf in batch.items()}

    def state_shapes(self, state: Any) -> Any:
        """The shapes that a lifted function takes for a state."""
        shardings = None if self.kind == "pmap" else self._shardings(state)
        if not self.sharded:
            shardings = jax.tree.map(lambda _: shardings, state)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )

    def put_state(self, state: Any) -> Any:
        """Moves a host state, equal in all processes, to the devices, replicated or sharded."""
        if self.num_processes == 1:
            return jax.device_put(state, self._shardings(state))
        if self.sharded:
            return jax.tree.map(_from_host, state, self._shardings(state))
        local = jax.device_put(state, NamedSharding(self._local_mesh, P()))
        return local if self.kind == "pmap" else self.to_global(local)

    def make_state(self, init: Callable[[], TrainState]) -> TrainState:
        """Initialises a state on the devices; no device ever holds all of a sharded one."""
        if not self.sharded:
            return cast(TrainState, self.put_state(init()))
        shardings = self._shardings(jax.eval_shape(init))
        return cast(TrainState, jax.jit(lambda: init(), out_shardings=shardings)())

    def put_like(self, leaf: np.ndarray, other: jax.Array) -> jax.Array:
        """Moves a host array, equal in all processes, to the devices with another's sharding."""
        return _from_host(leaf, other.sharding)

    def to_global(self, state: Any) -> Any:
        """A state as global arrays, as checkpoints need it; no data is moved.

        Under `pmap` with several processes, a state consists of process-local arrays.
        """
        if self.num_processes == 1 or self.sharded:
            return state
        return jax.tree.map(lambda leaf: _rewrap(leaf, self._replicated), state)

    def read(self, tree: Any) -> Any:
        """Replicated arrays as numpy arrays, read from one local shard without running a program.

        (`x[0]` on a replicated array dispatches a program with a collective, about 900 us on 8
        devices; this takes about 1 us per leaf.)
        """
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)

    @property
    def holds_full_state(self) -> bool:
        """Whether this process can read every leaf of a state in full from its own devices."""
        return not self.sharded or self.num_processes == 1

    def host_copy(self, state: Any) -> dict[str, np.ndarray]:
        """Copies a state to host memory; waits for the devices.

        If the state is sharded over processes (`holds_full_state` is false), all of them call this
        at the same point: the devices all-gather one leaf at a time, and only the process that
        `writes` keeps the copies.

        Returns:
            The leaves by name; no leaf in the other processes of a sharded state.
        """
        copied = {}
        for name, leaf in name_leaves(state).items():
            full = leaf if self.holds_full_state else self._all_gather(leaf)
            if self.holds_full_state or self.writes:
                copied[name] = _to_host(full)
        return copied

    def compile_replicated(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Compiles a function of global arrays, sharded in any way, to replicated outputs."""
        return jax.jit(function, out_shardings=self._replicated)

    @functools.cached_property
    def _all_gather(self) -> Callable[[jax.Array], jax.Array]:
        return self.compile_replicated(lambda leaf: leaf)

    @functools.cached_property
    def _positions(self) -> np.ndarray:
        """The positions of this process's devices along the axis, ascending."""
        here = jax.process_index()
        return np.flatnonzero([d.process_index == here for d in self.mesh.devices.flat])

    @functools.cached_property
    def _local_mesh(self) -> Mesh:
        devices = self.mesh.devices.flat[self._positions]
        return self.mesh if self.num_processes == 1 else Mesh(devices, (AXIS,))

    @property
    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    def _shardings(self, state: Any) -> Any:
        """The sharding of each leaf of a state; one for all if everything is replicated."""
        if not self.sharded:
            return self._replicated
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), self.specs(state), is_leaf=is_spec
        )

    def _batch_sharding(self, batch_dim: int) -> NamedSharding:
        return NamedSharding(self.mesh, partition_spec(batch_dim, AXIS))

    def _split(self, array: np.ndarray, batch_dim: int) -> np.ndarray:
        """`([steps,] rows, ...)` to `([steps,] shards, rows / shards, ...)`."""
        lead, rest = array.shape[:batch_dim], array.shape[batch_dim + 1 :]
        shards = self.num_shards // self.mesh.size * len(self._positions)
        return array.reshape(*lead, shards, -1, *rest)


def is_spec(leaf: Any) -> bool:
    """Whether a node of a tree is a partition spec, for `jax.tree.map(..., is_leaf=is_spec)`."""
    return isinstance(leaf, P)


def _to_host(leaf: jax.Array) -> np.ndarray:
    """Copies an array whose shards are all addressable; `np.array` would keep a second copy."""
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    copied = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        copied[shard.index] = shard.data
    return copied


def _from_host(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Moves a host array to the devices; faster than `jax.device_put`."""
    array = np.asarray(leaf)
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _rewrap(
    leaf: jax.Array, sharding: NamedSharding, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """The same buffers as this process's shards of an array with another sharding."""
    return jax.make_array_from_single_device_arrays(
        leaf.shape if shape is None else shape,
        sharding,
        [shard.data for shard in leaf.addressable_shards],
    )
