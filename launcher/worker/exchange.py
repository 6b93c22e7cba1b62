"""Sums of two CPU processes by exchange: each sends the other its values, and both add the two.

jax's sums between CPU processes go by gloo's all-reduce, which for the few hundred floats of a
BatchNorm takes two to four times as long as an exchange (`benchmarks/collectives.py`). For two
processes of one device each an exchange moves as many bytes and gives the same bits; a ResNet-8
with synchronised BatchNorm takes two thirds of the time (`docs/benchmarks.md`). The model calls
`lax.pmean` as ever: what changes is what XLA is given for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jax.interpreters import mlir


def use_where_it_pays() -> None:
    """From here on, where jax sees two CPU processes of one device each, sums are exchanges."""
    if jax.default_backend() == "cpu" and jax.process_count() == jax.device_count() == 2:
        use()


def use() -> None:
    """Sums over named axes are exchanges, in all that is compiled for the CPU from here on.

    For two devices: no sum can be over more than both, which is why there is no other case.
    """
    rule = mlir.lower_fun(_sum, multiple_results=False)
    mlir.register_lowering(primitives.psum_p, rule, platform="cpu")


def _sum(
    x: jax.Array,
    *,
    axes: Sequence[str | int],
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> jax.Array:
    """What `lax.psum` binds: a sum over dimensions of `x`, and over devices."""
    x = jnp.sum(x, tuple(axis for axis in axes if isinstance(axis, int)), dtype=x.dtype)
    names = tuple(axis for axis in axes if not isinstance(axis, int))
    each_by_itself = axis_index_groups is not None and len(axis_index_groups) == 2
    if not names or lax.axis_size(names) == 1 or each_by_itself:
        return x
    # Both terms come out of the collective, in the same order on both devices. A device that adds
    # to its own `x` may compute it anew in the kernel of the sum, with other roundings than those
    # of what it has sent (a * b + c without rounding a * b), and the replicas drift apart.
    first, second = lax.all_to_all(jnp.stack([x, x]), names, 0, 0)
    return first + second
