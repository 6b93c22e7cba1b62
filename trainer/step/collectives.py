"""Collectives of the step over the batch axis, as few of them as the backend likes.

On CPU every leaf of a `pmean` is a collective of its own, with a rendezvous of all devices each, so
one flat buffer is far cheaper. TPU and GPU compilers combine all-reduces by themselves, and there
the copies into a flat buffer would only cost memory traffic.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from trainer.state.partition import ParamSharding


def mean_over_axis(tree: Any, axis: str | None, *, flat: bool) -> Any:
    """Replaces every inexact leaf by its mean over `axis`; other leaves are left alone.

    Args:
        tree: any pytree of arrays.
        axis: a bound axis name, or None for "there is no axis": the tree is returned as it is.
        flat: ravel the leaves together: one buffer, and so one collective, a dtype.
    """
    if axis is None:
        return tree
    leaves, treedef = jax.tree.flatten(tree)
    by_dtype: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            by_dtype.setdefault(jnp.result_type(leaf), []).append(index)
    for indices in by_dtype.values():
        if flat:
            buffer = lax.pmean(jnp.concatenate([jnp.ravel(leaves[i]) for i in indices]), axis)
            offset = 0
            for i in indices:
                shape, size = jnp.shape(leaves[i]), jnp.size(leaves[i])
                leaves[i] = lax.slice(buffer, (offset,), (offset + size,)).reshape(shape)
                offset += size
        else:
            for i, mean in zip(indices, lax.pmean([leaves[i] for i in indices], axis), strict=True):
                leaves[i] = mean
    return jax.tree.unflatten(treedef, leaves)


def global_norm(tree: Any, *, flat: bool) -> jax.Array:
    """The 2-norm of all leaves together, shape ().

    Args:
        tree: float leaves.
        flat: as one buffer. After a flat mean the compiler sees through the slices and reduces the
            mean's own buffer, one kernel instead of one a leaf.
    """
    if flat:
        return jnp.linalg.norm(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)]))
    return optax.tree.norm(tree)


def gather(params: Any, axis: str | None, cuts: ParamSharding, *, flat: bool) -> Any:
    """Puts cut leaves together again, on every shard.

    Args:
        params: float leaves, of which this shard has a part.
        axis: a bound axis name.
        cuts: where they were cut.
        flat: in one collective a dtype, as `trainer.step.collectives.mean_over_axis` does, and why.
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


def own_shard(tree: Any, axis: str | None, cuts: ParamSharding) -> Any:
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


def reduce_scatter_mean(tree: Any, axis: str | None, cuts: ParamSharding) -> Any:
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


def norm_of_shards(tree: Any, axis: str | None, cuts: ParamSharding) -> jax.Array:
    """The 2-norm of all leaves together, of which each shard has its part, shape ()."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    here = sum(
        (s for s, cut in zip(squares, cuts.grads, strict=True) if cut is not None), jnp.zeros(())
    )
    whole = sum(
        (s for s, cut in zip(squares, cuts.grads, strict=True) if cut is None), jnp.zeros(())
    )
    return jnp.sqrt(lax.psum(here, axis) + whole)
