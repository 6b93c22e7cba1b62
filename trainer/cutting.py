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
from jax import lax

from trainer.state import TrainState

# What is cut, by the name in a config; an average of the params is of no use to the step itself.
FIELDS: dict[str, tuple[str, ...]] = {
    "replicated": (),
    "zero1": ("opt_state", "ema"),
    "fsdp": ("opt_state", "ema", "params"),
}

# Numbers in the smallest leaf that is cut.
_SMALLEST = 1 << 11


def cut_dimension(shape: Sequence[int], parts: int) -> int | None:
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


def cuts_of(tree: Any, parts: int) -> list[int | None]:
    """`cut_dimension` of every leaf, in the order of `jax.tree.leaves`."""
    return [cut_dimension(jnp.shape(leaf), parts) for leaf in jax.tree.leaves(tree)]


def map_cuts(
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
        cuts = cuts_of(tree, parts) if name in fields else [None] * len(leaves)
        return jax.tree.unflatten(structure, [make(cut) for cut in cuts])

    return type(state)(**{name: of_field(name, tree) for name, tree in vars(state).items()})


@dataclass(frozen=True)
class Cuts:
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


def gather(params: Any, axis: str | None, cuts: Cuts, *, flat: bool) -> Any:
    """Puts cut leaves together again, on every shard.

    Args:
        params: float leaves, of which this shard has a part.
        axis: a bound axis name.
        cuts: where they were cut.
        flat: in one collective a dtype, as `trainer.reduce.mean_over_axis` does, and why.
    """
    leaves, structure = jax.tree.flatten(params)
    if not flat:
        whole = [
            leaf if cut is None else lax.all_gather(leaf, axis, axis=cut, tiled=True)
            for leaf, cut in zip(leaves, cuts.like, strict=True)
        ]
        return jax.tree.unflatten(structure, whole)
    by_dtype: dict[Any, list[int]] = {}
    for index, cut in enumerate(cuts.like):
        if cut is not None:
            by_dtype.setdefault(leaves[index].dtype, []).append(index)
    for indices in by_dtype.values():
        own = jnp.concatenate([jnp.ravel(leaves[i]) for i in indices])
        parts = lax.all_gather(own, axis)
        offset = 0
        for i in indices:
            leaf, cut = leaves[i], cuts.like[i]
            assert cut is not None
            piece = lax.slice_in_dim(parts, offset, offset + leaf.size, axis=1)
            side_by_side = jnp.moveaxis(piece.reshape(-1, *leaf.shape), 0, cut)
            shape = [*leaf.shape]
            shape[cut] *= parts.shape[0]
            leaves[i] = side_by_side.reshape(shape)
            offset += leaf.size
    return jax.tree.unflatten(structure, leaves)


def own_part(tree: Any, axis: str | None, cuts: Cuts) -> Any:
    """This shard's part of whole leaves."""

    def part(leaf: jax.Array, cut: int | None) -> jax.Array:
        if cut is None:
            return leaf
        size = leaf.shape[cut] // cuts.parts
        return lax.dynamic_slice_in_dim(leaf, lax.axis_index(axis) * size, size, cut)

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [part(*pair) for pair in zip(leaves, cuts.grads, strict=True)]
    )


def scatter_mean(tree: Any, axis: str | None, cuts: Cuts) -> Any:
    """This shard's part of the mean of gradients over the axis; the mean, where one stays whole.

    Those by cut params are cut and summed already: that is the transpose of `gather`.
    """

    def mean(leaf: jax.Array, cut: int | None) -> jax.Array:
        if cut is None:
            return lax.pmean(leaf, axis)
        if cuts.params:
            return leaf / cuts.parts
        return lax.psum_scatter(leaf, axis, scatter_dimension=cut, tiled=True) / cuts.parts

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [mean(*pair) for pair in zip(leaves, cuts.grads, strict=True)]
    )


def norm_of_parts(tree: Any, axis: str | None, cuts: Cuts) -> jax.Array:
    """The 2-norm of all leaves together, of which each shard has its part, shape ()."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    here = sum(
        (s for s, cut in zip(squares, cuts.grads, strict=True) if cut is not None), jnp.zeros(())
    )
    whole = sum(
        (s for s, cut in zip(squares, cuts.grads, strict=True) if cut is None), jnp.zeros(())
    )
    return jnp.sqrt(lax.psum(here, axis) + whole)
