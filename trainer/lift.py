"""Lifting a per-shard function over the batch axis: `vmap`, `pmap` or `shard_map`.

The only file that names `jax.pmap`, `jax.shard_map` or where arrays meet devices and processes.
The three lifts give the same numbers for the same number of shards (`tests/test_lift.py`).

State is replicated and passed as it is; the batch carries the axis. On the way in, a host batch is
a dict of arrays `(rows, ...)`, or `(steps, rows, ...)` for several steps in one call; where the
devices belong to several processes, the rows are those of this process (`Lift.rows`).

It is longer than other files because this is its purpose: a process boundary of arrays has no other
home.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.errors import ReplicasDiffer, UserError
from trainer.state import TrainState, are_finite, checksums, name_leaves
from trainer.step import AXIS, Task

# Of a state that one process gives to the others, at a time: the devices hold no more of it twice.
_BROADCAST_BYTES = 64 << 20


@dataclass(frozen=True)
class Examined:
    """What was found in a state.

    Attributes:
        checksums: of every leaf, by name.
        not_finite: the leaves with a NaN or an infinity in them.
    """

    checksums: dict[str, int]
    not_finite: list[str]


@dataclass(frozen=True)
class Lift:
    """How the batch axis is laid over devices.

    Attributes:
        kind: "vmap", "pmap" or "shard_map".
        mesh: the devices, with the one axis "batch". Under vmap in one process, a single device.
        num_shards: how many shards a batch is cut into.
    """

    kind: str
    mesh: Mesh
    num_shards: int

    @property
    def platform(self) -> str:
        """ "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def state_sharding(self) -> NamedSharding:
        """A whole copy on every device of every process."""
        return NamedSharding(self.mesh, P())

    @functools.cached_property
    def num_processes(self) -> int:
        """How many processes the devices belong to."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes what the processes share."""
        return jax.process_index() == 0

    @functools.cached_property
    def _positions(self) -> np.ndarray:
        """The places of this process's devices on the axis, ascending."""
        here = jax.process_index()
        return np.flatnonzero([d.process_index == here for d in self.mesh.devices.flat])

    @functools.cached_property
    def _local_mesh(self) -> Mesh:
        return Mesh(self.mesh.devices.flat[self._positions], (AXIS,))

    def rows(self, batch_size: int) -> slice | np.ndarray:
        """Which rows of a global batch this process feeds, and the only ones it needs to read."""
        if self.num_processes == 1:
            return slice(None)
        per_device = batch_size // self.mesh.size
        rows = (self._positions[:, None] * per_device + np.arange(per_device)).ravel()
        if rows[-1] - rows[0] + 1 == len(rows):  # side by side: a view of an array, not a copy
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return rows

    @property
    def process(self) -> int:
        """This process's rank."""
        return jax.process_index()

    def gather(self, numbers: Any) -> list[Any]:
        """What each process gives, in order of rank, to agree on what only files can tell.

        All processes must call it at the same point.

        Args:
            numbers: an int, or an array of the same shape in all processes; of 32 bits.
        """
        if self.num_processes == 1:
            return np.array(numbers)[None].tolist()
        return multihost_utils.process_allgather(np.array(numbers)).tolist()

    def tell(self, text: str, source: int = 0) -> str:
        """The text of one process, in all of them; called by all at the same point."""
        if self.num_processes == 1:
            return text
        data = np.frombuffer(text.encode(), np.uint8)
        size = self.gather(data.size)[source]
        padded = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)  # compiles seldom
        if self.process == source:
            padded[:size] = data
        return _broadcast(padded, self.process == source)[:size].tobytes().decode()

    def spread(
        self, leaves: Mapping[str, np.ndarray] | None, like: Mapping[str, Any], source: int
    ) -> dict[str, np.ndarray]:
        """Named arrays of one process, bit for bit in all of them; called by all at the same point.

        Args:
            leaves: the arrays, where this is the process that has them.
            like: their shapes and dtypes, the same in all processes.
            source: the process that has them.
        """
        here = self.process == source
        if self.num_processes == 1:
            assert leaves is not None
            return dict(leaves)
        sizes = {
            name: int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
            for name, leaf in like.items()
        }
        total = sum(sizes.values())
        data = np.zeros(-(-total // 4) * 4, np.uint8)
        places, start = {}, 0
        for name, size in sizes.items():
            places[name] = slice(start, start + size)
            if here:
                assert leaves is not None
                flat = np.ascontiguousarray(leaves[name]).reshape(-1)
                data[places[name]] = flat.view(np.uint8)
            start += size
        for start in range(0, data.size, _BROADCAST_BYTES):
            part = slice(start, start + _BROADCAST_BYTES)
            data[part] = _broadcast(data[part], here)
        return {
            name: data[places[name]].copy().view(jnp.dtype(leaf.dtype)).reshape(leaf.shape)
            for name, leaf in like.items()
        }

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
                in_shardings=(self.state_sharding, self._batch_sharding(batch_dim)),
                out_shardings=self.state_sharding,
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
        # check_vma=False: under its default, gradients of replicated params are summed over the
        # axis by autodiff, and the step's own mean would then make them num_shards times too large.
        mapped = jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(P(), self._batch_spec(batch_dim)),
            out_specs=P(),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated)

    def put_batch(self, batch: Mapping[str, np.ndarray], *, scan: bool = False) -> Any:
        """Moves this process's rows to its devices, each getting its shards only."""
        batch_dim = 1 if scan else 0
        if self.kind != "shard_map":
            batch = {name: self._split(array, batch_dim) for name, array in batch.items()}
        if self.num_processes == 1:
            return jax.device_put(dict(batch), self._batch_sharding(batch_dim))
        spec = self._batch_spec(batch_dim)
        local = jax.device_put(dict(batch), NamedSharding(self._local_mesh, spec))
        if self.kind == "pmap":  # takes what is local to its process
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
        sharding = None if self.kind == "pmap" else self.state_sharding
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
        )

    def put_state(self, state: Any) -> Any:
        """Replicates a state, the same in all processes, onto the devices."""
        if self.num_processes == 1:
            return jax.device_put(state, self.state_sharding)
        local = jax.device_put(state, NamedSharding(self._local_mesh, P()))
        return local if self.kind == "pmap" else self.to_global(local)

    def to_global(self, state: Any) -> Any:
        """A state as arrays over all devices, as checkpoints need it; no data is moved.

        Under `pmap` in several processes a state is local to each of them.
        """
        if self.num_processes == 1:
            return state
        return jax.tree.map(lambda leaf: _rewrap(leaf, self.state_sharding), state)

    def from_global(self, state: Any) -> Any:
        """The inverse of `to_global`."""
        if self.kind != "pmap" or self.num_processes == 1:
            return state
        local = NamedSharding(self._local_mesh, P())
        return jax.tree.map(lambda leaf: _rewrap(leaf, local), state)

    def read(self, tree: Any) -> Any:
        """Replicated device arrays as numpy, from one local copy: no program is run.

        (`x[0]` on a replicated array dispatches a program with a collective, ~900 us on 8 devices;
        this is ~1 us a leaf.)
        """
        return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)

    def host_copy(self, state: Any) -> dict[str, np.ndarray]:
        """The leaves of a state by name, in memory of their own; waits for the devices."""
        return {
            name: np.array(leaf.addressable_data(0)) for name, leaf in name_leaves(state).items()
        }

    @functools.cached_property
    def _examine(self) -> Callable[[Any], Any]:
        mapped = jax.shard_map(
            lambda tree: (jax.lax.all_gather(checksums(tree), AXIS), are_finite(tree)),
            mesh=self.mesh,
            in_specs=P(),
            out_specs=P(),
            check_vma=False,
        )
        return jax.jit(mapped)

    def examine(self, state: Any) -> Examined:
        """Looks at every leaf, after checking that all devices hold the same bits.

        `jax` cannot tell: an output declared replicated whose shards differ raises nothing and
        says `is_fully_replicated`.

        Raises:
            ReplicasDiffer: naming the first leaf whose copies differ, and the devices.
        """
        copies, finite = self.read(self._examine(self.to_global(state)))
        names = list(name_leaves(state))
        differing = np.flatnonzero((copies != copies[0]).any(axis=0))
        if differing.size:
            first = differing[0]
            devices = [
                str(self.mesh.devices.flat[place])
                for place in np.flatnonzero(copies[:, first] != copies[0, first])
            ]
            raise ReplicasDiffer(
                f"{names[first]} differs between devices ({differing.size} of {len(names)} leaves "
                f"do): {', '.join(devices[:4])}{', ...' if devices[4:] else ''} against "
                f"{self.mesh.devices.flat[0]}\n  HINT: a value of the model's state depends on "
                'the shard; reduce it in the model with lax.pmean(value, "batch")'
            )
        return Examined(
            dict(zip(names, copies[0].tolist(), strict=True)),
            [name for name, good in zip(names, finite, strict=True) if not good],
        )

    def _batch_spec(self, batch_dim: int) -> P:
        return P(*([None] * batch_dim), AXIS)

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


def make_lift(name: str, mesh: Mesh | None = None) -> Lift:
    """The lift a config names.

    Args:
        name: "pmap", "shard_map", "vmap", or "vmap:N" to simulate N shards on one device.
        mesh: the devices; all of them where None.
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
        return Lift(kind, mesh, mesh.size)
    num_shards = int(shards) if shards else mesh.size
    if len({device.process_index for device in mesh.devices.flat}) > 1:
        if num_shards % mesh.size:
            raise UserError(
                f"config.lift={name!r}: {num_shards} shards cannot be spread evenly over "
                f"{mesh.size} devices of several processes",
                f"simulate a multiple of {mesh.size}, or use one process",
            )
        return Lift(kind, mesh, num_shards)
    one = Mesh(np.array(mesh.devices.flat[:1]), (AXIS,))
    return Lift(kind, one, num_shards)


def has_convolution(function: Callable[[Any, Any], Any], state: Any, batch: Any) -> bool:
    """Whether a per-shard function contains a convolution, from tracing it on abstract values.

    Args:
        function: written for one shard, as for `Lift.__call__`.
        state: a state, or its shapes.
        batch: shapes of one shard of a batch, with a leading axis of size 1.
    """
    mapped = jax.vmap(function, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    return "conv_general_dilated" in str(jax.make_jaxpr(mapped)(state, batch))


def unsynced_state(task: Task, state: TrainState, batch: Any, num_shards: int) -> list[str]:
    """Names of model state that each shard would compute from its own examples only.

    Found by tracing the model under `shard_map(check_vma=True)`, which follows what varies over the
    axis; nothing is run or compiled.

    Args:
        task: whose model is traced.
        state: a state, or its shapes.
        batch: a host batch, of which only shapes matter.
        num_shards: of the axis.
    """
    found: list[str] = []

    def forward(state: TrainState, batch: Any) -> jax.Array:
        rng = jax.random.wrap_key_data(state.rng)
        _, model_state = task.apply(state.params, state.model_state, batch, train=True, rng=rng)
        found.extend(name for name, leaf in name_leaves(model_state).items() if _varies(leaf))
        return jnp.zeros(())

    mesh = AbstractMesh((num_shards,), (AXIS,), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        forward, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=True
    )
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, dict(batch)))
    jax.eval_shape(mapped, *shapes)
    return found


def _broadcast(data: np.ndarray, is_source: bool) -> np.ndarray:
    """Bytes of one process, in all of them; a multiple of four.

    It is a sum over the processes, so of integers: a sum of floats would lose a -0.0.
    """
    words = multihost_utils.broadcast_one_to_all(data.view(np.uint32), is_source)
    return np.array(words, np.uint32).view(np.uint8)


def _rewrap(
    leaf: jax.Array, sharding: NamedSharding, shape: tuple[int, ...] | None = None
) -> jax.Array:
    """The same buffers under another sharding, whose part of this process they are."""
    return jax.make_array_from_single_device_arrays(
        leaf.shape if shape is None else shape,
        sharding,
        [shard.data for shard in leaf.addressable_shards],
    )


def _varies(leaf: jax.Array) -> bool:
    kind: Any = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):  # jax 0.10 and later
        return AXIS in kind.manual_axis_type.varying
    return AXIS in getattr(kind, "vma", ())


def _scan(function: Callable[[Any, Any], Any], unroll: bool, state: Any, batches: Any) -> Any:
    return jax.lax.scan(function, state, batches, unroll=True if unroll else 1)
