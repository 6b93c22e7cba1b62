"""What a per-shard function does, from tracing it on shapes: nothing is compiled or run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from trainer.state import TrainState, name_leaves
from trainer.task import AXIS, Task


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


def _varies(leaf: jax.Array) -> bool:
    kind: Any = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):  # jax 0.10 and later
        return AXIS in kind.manual_axis_type.varying
    return AXIS in getattr(kind, "vma", ())
