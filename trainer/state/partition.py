"""A state that is cut over the batch axis: which leaves, where, and how they are put together.

The optimizer's state alone ("zero1", after stage 1 of Rajbhandari et al., "ZeRO",
arXiv:1910.02054), or the params too ("fsdp", its stage 3). A leaf is cut along one dimension, so
that it keeps its meaning for the optimizer; small ones stay whole, as what they cost is latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from trainer.state.train_state import TrainState

# What is cut, by the name in a config; an average of the params is of no use to the step itself.
FIELDS: dict[str, tuple[str, ...]] = {
    "replicated": (),
    "zero1": ("opt_state", "ema"),
    "fsdp": ("opt_state", "ema", "params"),
}

# Numbers in the smallest leaf that is cut.
_SMALLEST = 1 << 11


def shard_dimension(shape: Sequence[int], parts: int) -> int | None:
    """Along which dimension a leaf is cut; None if it stays whole.

    The first that `parts` divides and whose parts fill the tiles of a TPU's memory best, where the
    last dimension is padded to 128 numbers and the one before to 8.
    """
    if parts == 1 or math.prod(shape) < _SMALLEST:
        return None

    def padding(index: int) -> float:
        part = shape[index] // parts
        tile = {1: 128, 2: 8}.get(len(shape) - index, 1)
        return math.ceil(part / tile) * tile / part

    dimensions = [index for index, length in enumerate(shape) if length % parts == 0]
    return min(dimensions, key=padding, default=None)


def shard_dimensions(tree: Any, parts: int) -> list[int | None]:
    """`shard_dimension` of every leaf, in the order of `jax.tree.leaves`."""
    return [shard_dimension(jnp.shape(leaf), parts) for leaf in jax.tree.leaves(tree)]


def map_shard_dimensions(
    state: TrainState, fields: Sequence[str], parts: int, make: Callable[[int | None], Any]
) -> Any:
    """The structure of a state, with `make(dimension)` in place of each leaf; None: it is whole.

    Args:
        state: a state or its shapes.
        fields: which of its fields are cut.
        parts: shards.
        make: what stands for a leaf.
    """

    def of_field(name: str, tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        cuts = shard_dimensions(tree, parts) if name in fields else [None] * len(leaves)
        return jax.tree.unflatten(structure, [make(cut) for cut in cuts])

    return type(state)(**{name: of_field(name, tree) for name, tree in vars(state).items()})


@dataclass(frozen=True)
class ParamSharding:
    """How the params and the gradients of a step are cut.

    Attributes:
        parts: shards of the axis.
        like: the dimension that each leaf of the params is cut along, in the order of
            `jax.tree.leaves`.
        grads: the same of the gradients, which only some of the params may have.
        params: whether the params come in cut; their gradients leave so in any case.
    """

    parts: int
    like: tuple[int | None, ...]
    grads: tuple[int | None, ...]
    params: bool
