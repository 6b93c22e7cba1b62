"""Collectives of a step over the batch axis, per leaf or in one flat buffer.

On CPU each leaf of a `pmean` is a collective of its own, in which all devices wait for one another,
so one flat buffer is far cheaper. The compilers for TPU and GPU combine all-reduces by themselves;
there, a flat buffer only adds copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax

from trainer.state.leaves import is_narrow_float, widen
from trainer.state.partition import ParamSharding


def mean_over_axis(tree: Any, axis: str | None, *, flat: bool) -> Any:
    """Replaces every inexact leaf with its mean over `axis`; other leaves are unchanged.

    The mean of leaves with less than 32 bits is computed in float32.

    Args:
        tree: any pytree of arrays.
        axis: a bound axis name; None returns the tree unchanged.
        flat: ravel the leaves into one buffer per dtype, hence one collective per dtype.
    """
    if axis is None:
        return tree
    leaves, treedef = jax.tree.flatten(widen(tree))
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
    return jax.tree.map(_narrow_like, tree, jax.tree.unflatten(treedef, leaves))


def _narrow_like(before: Any, after: Any) -> Any:
    """Casts a leaf back to the dtype that it had before `widen`."""
    dtype = jnp.result_type(before)
    return after.astype(dtype) if is_narrow_float(dtype) else after


def global_norm(tree: Any, *, flat: bool) -> jax.Array:
    """The 2-norm of all leaves together, shape ().

    Args:
        tree: float leaves.
        flat: compute it on one buffer. After a flat mean the compiler sees through the slices and
            reduces that buffer, with one kernel instead of one per leaf.
    """
    tree = widen(tree)  # in 16 bits, squares overflow or lose digits
    if flat:
        buffer = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        return cast(jax.Array, jnp.linalg.norm(buffer))
    return cast(jax.Array, optax.tree.norm(tree))


def all_gather(params: Any, axis: str | None, sharding: ParamSharding, *, flat: bool) -> Any:
    """All-gathers the sharded leaves, so that every shard has them in full.

    Args:
        params: float leaves, sharded as `sharding.param_dimensions` says.
        axis: a bound axis name.
        sharding: the sharding of the params.
        flat: one collective per dtype, for the reason given in the docstring of this module.
    """
    leaves, structure = jax.tree.flatten(params)
    if not flat:
        gathered = [
            leaf if dim is None else _all_gather(leaf, axis, dim)
            for leaf, dim in zip(leaves, sharding.param_dimensions, strict=True)
        ]
        return jax.tree.unflatten(structure, gathered)
    by_dtype: dict[Any, list[int]] = {}
    for index, dim in enumerate(sharding.param_dimensions):
        if dim is not None:
            by_dtype.setdefault(leaves[index].dtype, []).append(index)
    for indices in by_dtype.values():
        local = jnp.concatenate([jnp.ravel(leaves[i]) for i in indices])
        shards = lax.all_gather(local, axis)
        offset = 0
        for i in indices:
            leaf, dim = leaves[i], sharding.param_dimensions[i]
            assert dim is not None
            stacked = lax.slice_in_dim(shards, offset, offset + leaf.size, axis=1)
            adjacent = jnp.moveaxis(stacked.reshape(-1, *leaf.shape), 0, dim)
            shape = [*leaf.shape]
            shape[dim] *= shards.shape[0]
            leaves[i] = adjacent.reshape(shape)
            offset += leaf.size
    return jax.tree.unflatten(structure, leaves)


def _all_gather(leaf: jax.Array, axis: str | None, dim: int) -> jax.Array:
    gather = functools.partial(lax.all_gather, axis_name=axis, axis=dim, tiled=True)
    if not is_narrow_float(leaf.dtype):
        return cast(jax.Array, gather(leaf))

    def sum_and_scatter(_: Any, cotangent: jax.Array) -> tuple[jax.Array]:
        # The transpose of `gather` would add up the gradients of all shards in 16 bits.
        wide = cotangent.astype(jnp.float32)
        total = lax.psum_scatter(wide, axis, scatter_dimension=dim, tiled=True)
        return (total.astype(cotangent.dtype),)

    gather_in_16_bits = jax.custom_vjp(gather)
    gather_in_16_bits.defvjp(lambda leaf: (gather(leaf), None), sum_and_scatter)
    return cast(jax.Array, gather_in_16_bits(leaf))


def slice_shard(grads: Any, axis: str | None, sharding: ParamSharding) -> Any:
    """This shard's slice of replicated gradients."""

    def slice_leaf(leaf: jax.Array, dim: int | None) -> jax.Array:
        if dim is None:
            return leaf
        size = leaf.shape[dim] // sharding.num_shards
        return lax.dynamic_slice_in_dim(leaf, lax.axis_index(axis) * size, size, dim)

    return _map_grads(slice_leaf, grads, sharding)


def reduce_scatter_mean(grads: Any, axis: str | None, sharding: ParamSharding) -> Any:
    """The mean of the gradients over the axis: this shard's slice, or all of a replicated leaf.

    Gradients with respect to sharded params arrive summed and scattered, because reduce-scatter is
    the transpose of `all_gather`; only the division is left to do.
    """

    def mean(leaf: jax.Array, dim: int | None) -> jax.Array:
        if dim is None:
            return cast(jax.Array, lax.pmean(leaf, axis))
        if not sharding.shards_params:
            leaf = lax.psum_scatter(leaf, axis, scatter_dimension=dim, tiled=True)
        return leaf / sharding.num_shards

    return _map_grads(mean, grads, sharding)


def sharded_norm(grads: Any, axis: str | None, sharding: ParamSharding) -> jax.Array:
    """The 2-norm of all leaves of sharded gradients together, shape ()."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(widen(grads))]
    pairs = list(zip(squares, sharding.grad_dimensions, strict=True))
    sharded = sum((square for square, dim in pairs if dim is not None), jnp.zeros(()))
    replicated = sum((square for square, dim in pairs if dim is None), jnp.zeros(()))
    return jnp.sqrt(lax.psum(sharded, axis) + replicated)


def _map_grads(
    function: Callable[[jax.Array, int | None], jax.Array], grads: Any, sharding: ParamSharding
) -> Any:
    """Applies a function of a leaf and the dimension along which it is sharded."""
    leaves, structure = jax.tree.flatten(grads)
    pairs = zip(leaves, sharding.grad_dimensions, strict=True)
    return jax.tree.unflatten(structure, [function(*pair) for pair in pairs])
