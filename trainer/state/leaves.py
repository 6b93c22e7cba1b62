"""Leaves of a tree by name, such as "params/Dense_0/kernel"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util


def name_leaves(tree: Any) -> dict[str, Any]:
    """`{"params/Dense_0/kernel": leaf, ...}` in the order of `jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def from_flat(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Named leaves as nested dicts, whatever nodes they come from; the form of a checkpoint."""
    return cast(dict[str, Any], traverse_util.unflatten_dict(dict(leaves), sep="/"))


def with_leaves(template: Any, leaves: Mapping[str, Any]) -> Any:
    """The inverse of `name_leaves`: named leaves in the structure of `template`."""
    return jax.tree.unflatten(
        jax.tree.structure(template), [leaves[name] for name in name_leaves(template)]
    )


def fill_in(tree: Any, subset: Any) -> Any:
    """`tree` with those leaves replaced that `subset` has, by name."""
    return with_leaves(tree, name_leaves(tree) | name_leaves(subset))


def is_narrow_float(dtype: Any) -> bool:
    """Whether a dtype is a float of less than 32 bits, such as bfloat16."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize < 4


def widen(tree: Any) -> Any:
    """Casts floats of less than 32 bits to float32; other leaves are unchanged.

    In bfloat16 a sum stands still once its terms are 256 times smaller than it, and an average
    once `1 - decay` is below 1/256.
    """

    def to_float32(leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        return leaf.astype(jnp.float32) if dtype is not None and is_narrow_float(dtype) else leaf

    return jax.tree.map(to_float32, tree)


def count_params(params: Any) -> int:
    """The number of parameters: elements of all leaves."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(params))
