"""Partitioning of a training state over the batch axis: which leaves are sharded, and where.

Either the optimizer's state and the average of the params are sharded ("zero1", stage 1 of
Rajbhandari et al., "ZeRO", arXiv:1910.02054), or the params too ("fsdp", its stage 3). A leaf is
sharded along one of its dimensions, so an optimizer still sees matrices as matrices. Small leaves
stay replicated: what they cost is latency, not memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from trainer.state.train_state import TrainState

# The sharded fields of a state for each value of `config.state_sharding`. The average of the params
# always comes along: no step reads it.
SHARDED_FIELDS: dict[str, tuple[str, ...]] = {
    "replicated": (),
    "zero1": ("opt_state", "ema"),
    "fsdp": ("opt_state", "ema", "params"),
}

# A leaf with fewer elements is replicated.
_MIN_SIZE = 1 << 11


def shard_dimension(shape: Sequence[int], num_shards: int) -> int | None:
    """The dimension along which a leaf is sharded; None if it is replicated.

    Among the dimensions that `num_shards` divides, it is the first whose shards need the least
    padding in a TPU's memory, where the last dimension is padded to 128 elements and the one before
    it to 8.
    """
    if num_shards == 1 or math.prod(shape) < _MIN_SIZE:
        return None

    def padding(index: int) -> float:
        size = shape[index] // num_shards
        tile = {1: 128, 2: 8}.get(len(shape) - index, 1)
        return math.ceil(size / tile) * tile / size

    dimensions = [index for index, length in enumerate(shape) if length % num_shards == 0]
    return min(dimensions, key=padding, default=None)


def shard_dimensions(tree: Any, num_shards: int) -> tuple[int | None, ...]:
    """`shard_dimension` of every leaf, in the order of `jax.tree.leaves`."""
    return tuple(shard_dimension(jnp.shape(leaf), num_shards) for leaf in jax.tree.leaves(tree))


def partition_spec(dimension: int | None, axis: str) -> PartitionSpec:
    """The spec of an array that is sharded over `axis` along one dimension; None: replicated."""
    return PartitionSpec() if dimension is None else PartitionSpec(*([None] * dimension), axis)


def partition_specs(tree: Any, num_shards: int, axis: str) -> Any:
    """A spec for each leaf of a tree, with every leaf sharded that can be.

    Args:
        tree: arrays, or their shapes.
        num_shards: the size of the axis; 1 replicates every leaf.
        axis: its name.
    """
    specs = [partition_spec(dim, axis) for dim in shard_dimensions(tree, num_shards)]
    return jax.tree.unflatten(jax.tree.structure(tree), specs)


def state_specs(state: TrainState, fields: Sequence[str], num_shards: int, axis: str) -> Any:
    """A spec for each leaf of a state.

    Args:
        state: a state, or its shapes.
        fields: the fields to shard; all others are replicated.
        num_shards: the size of the axis.
        axis: its name.
    """
    return type(state)(
        **{
            name: partition_specs(field, num_shards if name in fields else 1, axis)
            for name, field in vars(state).items()
        }
    )


@dataclass(frozen=True)
class ParamSharding:
    """How a step's params and gradients are sharded.

    Attributes:
        num_shards: the size of the axis.
        param_dimensions: the dimension along which each leaf of the params is sharded (None:
            replicated), in the order of `jax.tree.leaves`.
        grad_dimensions: the same for the gradients, which frozen params have none of.
        shards_params: whether the step receives sharded params; the gradients it returns are
            sharded in any case.
    """

    num_shards: int
    param_dimensions: tuple[int | None, ...]
    grad_dimensions: tuple[int | None, ...]
    shards_params: bool
