"""Checksums and finiteness of leaves, on devices and in host memory, with equal results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> jax.Array:
    """One uint32 a leaf, shape (leaves,), of the bits of the leaf.

    Each 32-bit word is weighted by an odd number that depends on its place, modulo 2**32, so any
    change of a single word changes the sum, and the order of summation does not matter: devices,
    layouts and backends agree exactly.
    """
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def are_finite(tree: Any) -> jax.Array:
    """Whether each leaf is free of NaN and infinity, shape (leaves,)."""

    def is_finite(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.array(True)
        return jnp.all(jnp.isfinite(leaf))

    return jnp.stack([is_finite(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def _checksum(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)  # as they lie in memory
    if _is_narrow(leaf.dtype):
        words = leaf.astype(jnp.int32).astype(jnp.uint32)
    elif leaf.dtype.itemsize < 2:  # floats of 8 bits
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint8).astype(jnp.uint32)
    elif leaf.dtype.itemsize == 2:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    else:  # 64-bit values gain a trailing axis of two words
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    # Not raveled: a leaf that is cut along another than its first dimension would be put together.
    place, stride = jnp.zeros((), jnp.uint32), 1
    for dimension in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
        place = place + np.uint32(stride % 2**32) * along
        stride *= words.shape[dimension]
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _is_narrow(dtype: Any) -> bool:
    """Whether values are weighed, not bits: of flags, and of integers of a byte or less."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return bool(dtype == jnp.bool_ or (is_integer and dtype.itemsize < 2))


def checksum_of(array: np.ndarray) -> int:
    """The checksum of one leaf in the memory of the host; equal to that of `checksums`."""
    if _is_narrow(array.dtype):
        words = array.astype(np.int32).ravel().view(np.uint32)
    elif array.dtype.itemsize < 2:
        words = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    elif array.dtype.itemsize == 2:
        words = np.ascontiguousarray(array).reshape(-1).view(np.uint16)
    else:
        words = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    total = 0
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK].astype(np.uint32)
        weights = 2 * np.arange(start, start + part.size, dtype=np.uint32) + np.uint32(1)
        total += int(np.sum(part * weights, dtype=np.uint32))
    return total % 2**32


# Words that are weighed at a time, so that no second copy of a leaf is made.
_CHUNK = 1 << 20
