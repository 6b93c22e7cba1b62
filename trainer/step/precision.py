"""Mixed precision: the model computes in 16 bits; params, statistics, losses and optimizer keep 32.

Micikevicius et al., "Mixed Precision Training" (arXiv:1710.03740). The model needs no change: it
receives its params and floating-point inputs in 16 bits, and Flax's layers compute in the dtype of
their inputs. Batch normalisation still computes its means in float32. A model that sets a dtype
itself keeps it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# By the value of `config.precision`.
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}

# The loss scale (section 3.2 of the paper): initial value, lower and upper bound, and the number of
# finite steps in a row after which it doubles.
_INITIAL, _LOWEST, _HIGHEST, _PATIENCE = 2.0**15, 1.0, 2.0**24, 2000


def to_dtype(tree: Any, dtype: Any) -> Any:
    """Casts float32 leaves to `dtype`; other leaves, and all if it is None, are unchanged."""
    return _cast(tree, jnp.float32, dtype) if dtype is not None else tree


def to_float32(tree: Any, dtype: Any) -> Any:
    """The inverse cast, for the outputs of a model."""
    return _cast(tree, dtype, jnp.float32) if dtype is not None else tree


def _cast(tree: Any, given: Any, wanted: Any) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.astype(wanted) if getattr(leaf, "dtype", None) == given else leaf

    return jax.tree.map(cast, tree)


@struct.dataclass
class LossScale:
    """A dynamic factor of the loss, without which small gradients would be 0 in float16.

    Attributes:
        scale: the factor, float32, shape ().
        good_steps: finite steps since it last changed, int32, shape ().
    """

    scale: jax.Array
    good_steps: jax.Array

    @classmethod
    def initial(cls) -> LossScale:
        """The loss scale of a fresh run."""
        return cls(jnp.asarray(_INITIAL, jnp.float32), jnp.zeros((), jnp.int32))

    def updated(self, finite: jax.Array) -> LossScale:
        """The next loss scale: halved after an overflow, doubled after 2000 steps without one."""
        grows = finite & (self.good_steps + 1 >= _PATIENCE)
        factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return LossScale(
            scale=jnp.clip(self.scale * factor, _LOWEST, _HIGHEST),
            good_steps=jnp.where(finite & ~grows, self.good_steps + 1, 0),
        )

    @property
    def is_lowest(self) -> jax.Array:
        """Whether the scale cannot fall any further, so an overflow has another cause."""
        return self.scale <= _LOWEST
