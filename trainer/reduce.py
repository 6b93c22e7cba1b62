"""The mean of a tree over the batch axis, in as few collectives as the backend likes.

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
