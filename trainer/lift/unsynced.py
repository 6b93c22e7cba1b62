"""Finds model state that is not synchronised over the axis, before any step runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from trainer.lift.lift import abstract_shard_map
from trainer.state.leaves import name_leaves
from trainer.state.train_state import TrainState
from trainer.step.task import AXIS, Task


def unsynced_state(task: Task, state: TrainState, batch: Any, num_shards: int) -> list[str]:
    """Names of model state that each shard computes from its own examples only.

    Its value then depends on the number of shards. It is found by tracing the model under
    `trainer.lift.lift.abstract_shard_map`; nothing is compiled or run.

    Args:
        task: the model belongs to it.
        state: a state, or its shapes.
        batch: a host batch, of which only shapes matter.
        num_shards: the size of the axis.
    """
    found: list[str] = []

    def forward(state: TrainState, batch: Any) -> jax.Array:
        rng = jax.random.wrap_key_data(state.rng)
        _, model_state = task.apply(state.params, state.model_state, batch, train=True, rng=rng)
        found.extend(name for name, leaf in name_leaves(model_state).items() if _varies(leaf))
        return jnp.zeros(())

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (state, dict(batch)))
    jax.eval_shape(abstract_shard_map(forward, num_shards), *shapes)
    return found


def _varies(leaf: jax.Array) -> bool:
    """Whether a traced value varies over the axis."""
    kind: Any = jax.typeof(leaf)
    if hasattr(kind, "manual_axis_type"):  # jax 0.10 and later
        return AXIS in kind.manual_axis_type.varying
    return AXIS in getattr(kind, "vma", ())
