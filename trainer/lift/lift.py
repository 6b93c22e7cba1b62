"""Lifting a per-shard function over the batch axis: `vmap`, `pmap` or `shard_map`.

The only file that runs `jax.pmap` or `jax.shard_map` and knows where arrays meet devices.
The three lifts give the same numbers for the same number of shards (`tests/lift/test_lift.py`).

State is replicated and passed as it is, unless it is cut over the axis (`Lift.sharded`); the batch
carries the axis. On the way in, a host batch is a dict of arrays `(rows, ...)`, or
`(steps, rows, ...)` for several steps in one call; where the devices belong to several processes,
the rows are those of this process (`Lift.rows`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.errors import UserError
from trainer.lift.processes import Processes
from trainer.state.leaves import name_leaves
from trainer.state.partition import (
    SHARDED_FIELDS,
    partition_spec,
    partition_specs,
    state_specs,
)
from trainer.state.train_state import TrainState
from trainer.step.task import AXIS


@dataclass(frozen=True)
class Lift(Processes):
    """How the batch axis is laid over devices.

    Attributes:
        mesh: the devices, with the one axis "batch". Under vmap in one process, a single device.
        kind: "vmap", "pmap" or "shard_map".
        num_shards: how many shards a batch is cut into.
        sharded: the fields of a state that are cut over the axis (`trainer.state.partition`).
    """

    kind: str
    num_shards: int
    sharded: tuple[str, ...] = ()

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def _replicated(self) -> NamedSharding:
        """A whole copy on every device of every process."""
        return NamedSharding(self.mesh, P())

    def specs(self, state: TrainState, fields: Sequence[str] | None = None) -> Any:
        """The partition spec of each leaf of a state.

        Args:
            state: a state, or its global shapes.
            fields: the fields to shard; None: those of this lift.
        """
        fields = self.sharded if fields is None else fields
        return state_specs(state, fields, self.num_shards, AXIS)

    def specs_of(self, tree: Any) -> Any:
        """The partition spec of each leaf of a tree, with every leaf sharded that can be."""
        return partition_specs(tree, self.num_shards, AXIS)

    def _shardings(self, state: Any) -> Any:
        """The same, on the devices; anything but a state that is cut is replicated."""
        if not self.sharded:
            return self._replicated
        return jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), self.specs(state), is_leaf=_is_spec
        )

    @functools.cached_property
    def _positions(self) -> np.ndarray:
        """The places of this process's devices on the axis, ascending."""
        here = jax.process_index()
        return np.flatnonzero([d.process_index == here for d in self.mesh.devices.flat])

    @functools.cached_property
    def _local_mesh(self) -> Mesh:
        devices = self.mesh.devices.flat[self._positions]
        return self.mesh if self.num_processes == 1 else Mesh(devices, (AXIS,))

    def rows(self, batch_size: int) -> slice | np.ndarray:
        """Which rows of a global batch this process feeds, and the only ones it needs to read."""
        if self.num_processes == 1:
            return slice(None)
        per_device = batch_size // self.mesh.size
        rows = (self._positions[:, None] * per_device + np.arange(per_device)).ravel()
        if rows[-1] - rows[0] + 1 == len(rows):  # side by side: a view of an array, not a copy
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    def __call__(
        self,
        function: Callable[[Any, Any], Any],
        *,
        scan: bool = False,
        unroll: bool = False,
        donate: bool = True,
    ) -> Callable[[Any, Any], Any]:
        """Compiles `function(state, batch) -> replicated outputs` over the axis.

        Args:
            function: written for one shard; uses the axis name "batch".
            scan: `function` returns (state, metrics) and runs once for each leading entry of the
                batch, in one dispatch; metrics gain a leading axis (steps,).
            unroll: with `scan`, unroll it. XLA:CPU runs convolutions inside loops 15-20x slower.
            donate: let the outputs reuse the memory of the state passed in.
        """
        batch_dim = 0
        if scan:
            function = functools.partial(_scan, function, unroll)
            batch_dim = 1
        donated = (0,) if donate else ()
        if self.kind == "vmap":
            mapped = jax.vmap(function, axis_name=AXIS, in_axes=(None, batch_dim), out_axes=None)
            if self.num_processes == 1:
                return jax.jit(mapped, donate_argnums=donated)
            # The compiler cuts the vmapped axis itself, along the shardings of its arguments.
            return jax.jit(
                mapped,
                donate_argnums=donated,
                in_shardings=(self._replicated, self._batch_sharding(batch_dim)),
                out_shardings=self._replicated,
            )
        if self.kind == "pmap":
            return jax.pmap(
                function,
                axis_name=AXIS,
                in_axes=(None, batch_dim),
                out_axes=None,
                donate_argnums=donated,
                devices=list(self.mesh.devices.flat),
            )
        mapped = self.shard_map(function, (P(), self._batch_spec(batch_dim)), P())
        return jax.jit(mapped, donate_argnums=donated)

    def shard_map(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """A per-shard function as one of whole arrays, to be compiled."""
        # check_vma=False: under its default, gradients of replicated params are summed over the
        # axis by autodiff, and the step's own mean would then make them num_shards times too large.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def constrain(self, state: Any, specs: Any) -> Any:
        """Tells the compiler how a state is to lie over the axis from here on."""

        def place(spec: P, leaf: Any) -> jax.Array:
            return jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))

        return jax.tree.map(place, specs, state, is_leaf=_is_spec)

    def compile(
        self,
        function: Callable[[Any, Any], Any],
        state: TrainState,
        *,
        scan: bool = False,
        unroll: bool = False,
    ) -> Callable[[Any, Any], Any]:
        """Compiles `function(state, batch) -> (state, metrics)` of whole arrays.

        Args:
            function: may call what `shard_map` gives; the state's memory is used again.
            state: a state, or its shapes.
            scan: as for `Lift.__call__`.
            unroll: as for `Lift.__call__`.
        """
        if scan:
            function = functools.partial(_scan, function, unroll)
        return jax.jit(
            function,
            donate_argnums=(0,),
            out_shardings=(self._shardings(state), self._replicated),
        )

    def put_batch(self, batch: Mapping[str, np.ndarray], *, scan: bool = False) -> Any:
        """Moves this process's rows to its devices, each getting its shards only."""
        batch_dim = 1 if scan else 0
        if self.kind != "shard_map":
            batch = {name: self._split(array, batch_dim) for name, array in batch.items()}
        spec = self._batch_spec(batch_dim)
        sharding = NamedSharding(self._local_mesh, spec)
        local = {name: _from_host(array, sharding) for name, array in batch.items()}
        if self.num_processes == 1 or self.kind == "pmap":  # which takes what is in its process
            return local

        def join(leaf: jax.Array) -> jax.Array:
            shape = list(leaf.shape)
            shape[batch_dim] = shape[batch_dim] // self._local_mesh.size * self.mesh.size
            return _rewrap(leaf, NamedSharding(self.mesh, spec), tuple(shape))

        return jax.tree.map(join, local)

    def batch_shapes(self, batch: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
        """What the lifted function takes for a batch `(rows, ...)` of the whole job, as shapes.

        Under `pmap` that is the batch of all processes, where the devices are a compiler's.
        """

        def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = tuple(leaf.shape)
            if self.kind != "shard_map":
                shape = (self.num_shards, shape[0] // self.num_shards, *shape[1:])
            sharding = None if self.kind == "pmap" else self._batch_sharding(0)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

        return {name: shape_of(leaf) for name, leaf in batch.items()}

    def state_shapes(self, state: Any) -> Any:
        """The same for a state."""
        shardings = None if self.kind == "pmap" else self._shardings(state)
        if not self.sharded:
            shardings = jax.tree.map(lambda _: shardings, state)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            shardings,
        )

    def put_state(self, state: Any) -> Any:
        """Moves a state, the same in all processes, onto the devices: replicated, or cut."""
        if self.num_processes == 1:
            return jax.device_put(state, self._shardings(state))
        if self.sharded:
            return jax.tree.map(_from_host, state, self._shardings(state))
        local = jax.device_put(state, NamedSharding(self._local_mesh, P()))
        return local if self.kind == "pmap" else self.to_global(local)

    def make_state(self, init: Callable[[], TrainState]) -> TrainState:
        """A new state, on the devices; one that is cut is never whole on one of them."""
        if not self.sharded:
            return cast(TrainState, self.put_state(init()))
        shardings = self._shardings(jax.eval_shape(init))
        return cast(TrainState, jax.jit(lambda: init(), out_shardings=shardings)())

    def put_like(self, leaf: np.ndarray, there: jax.Array) -> jax.Array:
        """Moves an array, the same in all processes, to where another of its shape lies."""
        return _from_host(leaf, there.sharding)

    def to_global(self, state: Any) -> Any:
        """A state as arrays over all devices, as checkpoints need it; no data is moved.

        Under `pmap` in several processes a state is local to each of them.
        """
        if self.num_processes == 1 or self.sharded:
            return state
        return jax.tree.map(lambda leaf: _rewrap(leaf, self._replicated), state)

    def read(self, tree: Any) -> Any:
        """Replicated device arrays as numpy, from one local copy: no program is run.

        (`x[0]` on a replicated array dispatches a program with a collective, ~900 us on 8 devices;
        this is ~1 us a leaf.)
        """
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)

    @property
    def holds_full_state(self) -> bool:
        """Whether this process alone can read every leaf of a state."""
        return not self.sharded or self.num_processes == 1

    def host_copy(self, state: Any) -> dict[str, np.ndarray]:
        """The leaves of a state by name, in memory of their own; waits for the devices.

        Where a state is cut over processes (`holds_full_state`), all of them call this at the same
        point; one leaf at a time is put together on the devices, and only the process that `writes`
        is given the leaves.
        """
        copied = {}
        for name, leaf in name_leaves(state).items():
            whole = leaf if self.holds_full_state else self._all_gather(leaf)
            if self.holds_full_state or self.writes:
                copied[name] = _to_host(whole)
        return copied

    @functools.cached_property
    def _all_gather(self) -> Callable[[jax.Array], jax.Array]:
        return self.compile_replicated(lambda leaf: leaf)

    def compile_replicated(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Compiles a function of arrays over all devices, however they lie, to replicated ones."""
        return jax.jit(function, out_shardings=self._replicated)

    def _batch_spec(self, batch_dim: int) -> P:
        return partition_spec(batch_dim, AXIS)

    def _batch_sharding(self, batch_dim: int) -> NamedSharding:
        return NamedSharding(self.mesh, self._batch_spec(batch_dim))

    def _split(self, array: np.ndarray, batch_dim: int) -> np.ndarray:
        """`(rows, ...)` to `(shards, rows / shards, ...)`, behind any steps axis."""
        lead, rest = array.shape[:batch_dim], array.shape[batch_dim + 1 :]
        shards = self.num_shards // self.mesh.size * len(self._positions)
        return array.reshape(*lead, shards, -1, *rest)

    def check_divides(self, global_batch_size: int, parts: int = 1) -> None:
        """Raises a UserError unless every shard, or part of one, gets the same number of rows."""
        pieces = self.num_shards * parts
        if global_batch_size % pieces:
            below = global_batch_size // pieces * pieces
            sizes = " or ".join(str(n) for n in (below, below + pieces) if n)
            over = "shards" if self.kind == "vmap" else "devices"
            times = f" x {parts} parts (config.grad_accum_steps)" if parts > 1 else ""
            raise UserError(
                f"config.global_batch_size={global_batch_size} does not divide by "
                f"{self.num_shards} {over}{times}",
                f"the nearest sizes that do: {sizes}",
            )


def make_lift(name: str, mesh: Mesh | None = None, state_sharding: str = "replicated") -> Lift:
    """The lift a config names.

    Args:
        name: "pmap", "shard_map", "vmap", or "vmap:N" to simulate N shards on one device.
        mesh: the devices; all of them where None.
        state_sharding: "replicated"; under "shard_map" also "zero1" or "fsdp".
    """
    if mesh is None:
        mesh = Mesh(np.array(jax.devices()), (AXIS,))
    if mesh.axis_names != (AXIS,):
        raise UserError(
            f"the mesh has the axes {mesh.axis_names}; podlift needs exactly one, named {AXIS!r}",
            'jax.sharding.Mesh(numpy.array(jax.devices()), ("batch",))',
        )
    kind, _, shards = name.partition(":")
    if kind != "vmap":
        return Lift(mesh, kind, mesh.size, SHARDED_FIELDS[state_sharding])
    num_shards = int(shards) if shards else mesh.size
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        if num_shards % mesh.size:
            raise UserError(
                f"config.lift={name!r}: {num_shards} shards cannot be spread evenly over "
                f"{mesh.size} devices of several processes",
                f"simulate a multiple of {mesh.size}, or use one process",
            )
        return Lift(mesh, kind, num_shards)
    one = Mesh(np.array(mesh.devices.flat[:1]), (AXIS,))
    return Lift(one, kind, num_shards)


def abstract_shard_map(
    function: Callable[[Any, Any], Any], num_shards: int
) -> Callable[[Any, Any], Any]:
    """A per-shard function `(state, batch) -> replicated outputs`, to be traced on shapes only.

    In it jax follows which values vary over the axis (`check_vma=True`).
    """
    mesh = AbstractMesh((num_shards,), (AXIS,), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=True
    )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)


def _to_host(leaf: jax.Array) -> np.ndarray:
    """A copy of an array all of which is here; `np.array` of a cut one would leave a second."""
    if leaf.is_fully_replicated:
        return np.array(leaf.addressable_data(0))
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def _from_host(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array whose shards of this process are parts of what it has; quicker than device_put."""
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)


def _rewrap(
    leaf: jax.Array, sharding: NamedSharding, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """The same buffers under another sharding, whose part of this process they are."""
    return jax.make_array_from_single_device_arrays(
        leaf.shape if shape is None else shape,
        sharding,
        [shard.data for shard in leaf.addressable_shards],
    )


def _scan(function: Callable[[Any, Any], Any], unroll: bool, state: Any, batches: Any) -> Any:
    return jax.lax.scan(function, state, batches, unroll=True if unroll else 1)
