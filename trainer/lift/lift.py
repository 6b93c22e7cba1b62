"""Lifting a per-shard function over the batch axis with `vmap`, `pmap` or `shard_map`.

All three lifts give the same numbers for the same number of shards (`tests/lift/test_lift.py`). The
state is replicated, unless some of its fields are sharded (`Lift.sharded`); the batch carries the
axis.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer.errors import UserError
from trainer.lift.lost_nan import warn_if_nan_is_lost
from trainer.lift.placement import Placement, is_spec
from trainer.state.partition import SHARDED_FIELDS, partition_spec
from trainer.state.train_state import TrainState
from trainer.step.task import AXIS
from trainer.xla_flags import keep_nan


@dataclass(frozen=True)
class Lift(Placement):
    """What the batch axis is: an axis of `vmap`, of `pmap`, or a mesh axis under `shard_map`."""

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
            unroll: unroll that scan. XLA:CPU runs convolutions inside loops 15-20x slower.
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
            # The compiler partitions the vmapped axis itself, following the given shardings.
            return jax.jit(
                mapped,
                donate_argnums=donated,
                in_shardings=(self._replicated, self._batch_sharding(batch_dim)),
                out_shardings=self._replicated,
            )
        if self.kind == "pmap":
            return cast(
                Callable[[Any, Any], Any],
                jax.pmap(
                    function,
                    axis_name=AXIS,
                    in_axes=(None, batch_dim),
                    out_axes=None,
                    donate_argnums=donated,
                    devices=list(self.mesh.devices.flat),
                ),
            )
        mapped = self.shard_map(function, (P(), partition_spec(batch_dim, AXIS)), P())
        return jax.jit(mapped, donate_argnums=donated)

    def shard_map(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """Turns a per-shard function into one of global arrays, to be called under `jax.jit`."""
        # check_vma=False: under its default, autodiff sums gradients of replicated params over the
        # axis, and the step's own mean would make them num_shards times too large.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def constrain(self, state: Any, specs: Any) -> Any:
        """Constrains the sharding of each leaf (`with_sharding_constraint`)."""

        def constrain_leaf(spec: P, leaf: Any) -> jax.Array:
            sharding = NamedSharding(self.mesh, spec)
            return cast(jax.Array, jax.lax.with_sharding_constraint(leaf, sharding))

        return jax.tree.map(constrain_leaf, specs, state, is_leaf=is_spec)

    def compile(
        self,
        function: Callable[[Any, Any], Any],
        state: TrainState,
        *,
        scan: bool = False,
        unroll: bool = False,
    ) -> Callable[[Any, Any], Any]:
        """Compiles `function(state, batch) -> (state, metrics)` of global arrays.

        Args:
            function: may call functions made by `shard_map`; the state is donated.
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

    def check_divides(self, global_batch_size: int, accum_steps: int = 1) -> None:
        """Raises a UserError unless all shards, and their microbatches, are of equal size."""
        divisor = self.num_shards * accum_steps
        if global_batch_size % divisor:
            below = global_batch_size // divisor * divisor
            sizes = " or ".join(str(n) for n in (below, below + divisor) if n)
            over = "shards" if self.kind == "vmap" else "devices"
            times = (
                f" x {accum_steps} microbatches (config.grad_accum_steps)"
                if accum_steps > 1
                else ""
            )
            raise UserError(
                f"config.global_batch_size={global_batch_size} does not divide by "
                f"{self.num_shards} {over}{times}",
                f"the nearest sizes that do: {sizes}",
            )


def make_lift(name: str, mesh: Mesh | None = None, state_sharding: str = "replicated") -> Lift:
    """The lift that a config names.

    Args:
        name: "pmap", "shard_map", "vmap", or "vmap:N" to simulate N shards on one device.
        mesh: the devices; None: all of them.
        state_sharding: "replicated"; under "shard_map" also "zero1" or "fsdp".

    Raises:
        UserError: the mesh has other axes, or N does not suit its devices.
    """
    if mesh is None:
        keep_nan(os.environ)  # in a notebook; the launcher has done so
        mesh = Mesh(np.array(jax.devices()), (AXIS,))
    if mesh.axis_names != (AXIS,):
        raise UserError(
            f"the mesh has the axes {mesh.axis_names}; podlift needs exactly one, named {AXIS!r}",
            'jax.sharding.Mesh(numpy.array(jax.devices()), ("batch",))',
        )
    warn_if_nan_is_lost(mesh.devices.flat[0].platform)
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
    return Lift(Mesh(np.array(mesh.devices.flat[:1]), (AXIS,)), kind, num_shards)


def abstract_shard_map(
    function: Callable[[Any, Any], Any], num_shards: int
) -> Callable[[Any, Any], Any]:
    """A per-shard function `(state, batch) -> replicated outputs`, to be traced on shapes only.

    While tracing it, jax tracks which values vary over the axis (`check_vma=True`).
    """
    mesh = AbstractMesh((num_shards,), (AXIS,), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        function, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=True
    )


def _scan(function: Callable[[Any, Any], Any], unroll: bool, state: Any, batches: Any) -> Any:
    return jax.lax.scan(function, state, batches, unroll=True if unroll else 1)
