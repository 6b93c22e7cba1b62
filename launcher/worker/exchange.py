"""All-reduce between two CPU processes as an all-to-all: they swap values, and both add them.

gloo's all-reduce takes two to four times as long as an all-to-all for the few hundred floats of a
BatchNorm (`benchmarks/collectives.py`). For two processes of one device each, the all-to-all moves
as many bytes and gives the same bits; a step of a ResNet-8 with synchronised BatchNorm takes two
thirds of the time (`docs/benchmarks.md`). The model still calls `lax.pmean`: only its lowering to
XLA changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jax.interpreters import mlir


def use_where_it_pays() -> None:
    """Calls `use` if the job is two CPU processes of one device each."""
    if jax.default_backend() == "cpu" and jax.process_count() == jax.device_count() == 2:
        use()


def use() -> None:
    """Lowers sums over named axes to an all-to-all, in all CPU programs compiled later.

    For a job of two devices, in which every sum is over one device or both.
    """
    rule = mlir.lower_fun(_sum, multiple_results=False)
    mlir.register_lowering(primitives.psum_p, rule, platform="cpu")


def _sum(
    x: jax.Array,
    *,
    axes: Sequence[str | int],
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> jax.Array:
    """Implements the primitive of `lax.psum`: a sum over dimensions of `x`, and over devices."""
    x = jnp.sum(x, tuple(axis for axis in axes if isinstance(axis, int)), dtype=x.dtype)
    names = tuple(axis for axis in axes if not isinstance(axis, int))
    groups_of_one = axis_index_groups is not None and len(axis_index_groups) == 2
    if not names or lax.axis_size(names) == 1 or groups_of_one:
        return x
    # Both terms come out of the collective, in the same order on both devices. A device that added
    # to its own `x` could fuse the computation of `x` into the sum, with other roundings than in
    # what it has sent (a * b + c without rounding a * b), and the replicas would diverge.
    swapped: jax.Array = lax.all_to_all(jnp.stack([x, x]), names, 0, 0)
    first, second = swapped
    total: jax.Array = first + second
    return total
