"""Checksums and finiteness of leaves; equal on any device and in host memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(tree: Any) -> jax.Array:
    """One uint32 checksum of the bits of each leaf, shape (leaves,).

    Each 32-bit word is weighted with an odd number that depends on its position, modulo 2**32. Any
    change of a single word changes the sum, and the order of summation does not matter, so
    devices, shardings and backends agree exactly.
    """
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def finiteness(tree: Any) -> jax.Array:
    """0 for each finite leaf, 1 if it contains an infinity but no NaN, else 2; shape (leaves,)."""

    def kind(leaf: jax.Array) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.zeros((), jnp.int32)
        return jnp.max(
            jnp.where(jnp.isnan(leaf), 2, jnp.where(jnp.isfinite(leaf), 0, 1)), initial=0
        )

    return jnp.stack([kind(jnp.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def _checksum(leaf: jax.Array) -> jax.Array:
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)  # their order in memory
    if _is_narrow(leaf.dtype):
        words = leaf.astype(jnp.int32).astype(jnp.uint32)
    elif leaf.dtype.itemsize < 2:  # floats of 8 bits
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint8).astype(jnp.uint32)
    elif leaf.dtype.itemsize == 2:
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    else:  # 64-bit values gain a trailing axis of two words
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    # Raveling would all-gather a leaf that is sharded along any dimension but the first.
    place, stride = jnp.zeros((), jnp.uint32), 1
    for dimension in reversed(range(words.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension)
        place = place + np.uint32(stride % 2**32) * along
        stride *= words.shape[dimension]
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


def _is_narrow(dtype: Any) -> bool:
    """Whether the checksum is of values, not bits: for bools, and integers of a byte or less."""
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    return bool(dtype == jnp.bool_ or (is_integer and dtype.itemsize < 2))


def checksum_of(array: np.ndarray) -> int:
    """The checksum of one leaf in host memory; equal to that of `checksums`."""
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
        chunk = words[start : start + _CHUNK].astype(np.uint32)
        weights = 2 * np.arange(start, start + chunk.size, dtype=np.uint32) + np.uint32(1)
        total += int(np.sum(chunk * weights, dtype=np.uint32))
    return total % 2**32


# Words per iteration, so that no second copy of a leaf is made.
_CHUNK = 1 << 20
