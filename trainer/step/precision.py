"""Computing in 16 bits, while parameters, statistics, losses and the optimizer keep 32.

Micikevicius et al., "Mixed Precision Training" (arXiv:1710.03740). The model is not told: it is
given its parameters and its floating-point inputs in 16 bits, and Flax's layers compute in what
they are given. Batch normalisation takes its means in float32 all the same. A model that names a
dtype of its own keeps it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# By the name in a config.
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}

# Of a loss scale (section 3.2 of the paper): at first, how far it may fall and rise, and how many
# good steps in a row double it.
_FIRST, _LOWEST, _HIGHEST, _PATIENCE = 2.0**15, 1.0, 2.0**24, 2000


def to_dtype(tree: Any, dtype: Any) -> Any:
    """Casts float32 leaves to `dtype`; all others are left alone. None: nothing is cast."""
    return _cast(tree, jnp.float32, dtype) if dtype is not None else tree


def to_float32(tree: Any, dtype: Any) -> Any:
    """The way back, for what a model puts out."""
    return _cast(tree, dtype, jnp.float32) if dtype is not None else tree


def _cast(tree: Any, given: Any, wanted: Any) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.astype(wanted) if getattr(leaf, "dtype", None) == given else leaf

    return jax.tree.map(cast, tree)


@struct.dataclass
class LossScale:
    """What the loss is multiplied by, so that small gradients are not 0 in float16.

    Attributes:
        scale: float32, shape ().
        good_steps: since it last changed, int32, shape ().
    """

    scale: jax.Array
    good_steps: jax.Array

    @classmethod
    def initial(cls) -> LossScale:
        """The one to begin with."""
        return cls(jnp.asarray(_FIRST, jnp.float32), jnp.zeros((), jnp.int32))

    def updated(self, finite: jax.Array) -> LossScale:
        """The next one: halved where a gradient overflowed, doubled after long without."""
        grows = finite & (self.good_steps + 1 >= _PATIENCE)
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(
            scale=jnp.clip(self.scale * factor, _LOWEST, _HIGHEST),
            good_steps=jnp.where(finite & ~grows, self.good_steps + 1, 0),
        )

    @property
    def is_lowest(self) -> jax.Array:
        """Whether an overflow is not the scale's doing."""
        return self.scale <= _LOWEST
