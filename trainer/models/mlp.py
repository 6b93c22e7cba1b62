"""The MLP of Flax's guide on managing parameters and state, and one without normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax


class MLP(nn.Module):
    """`depth` times Dense, BatchNorm, relu, then Dense; statistics over the axis "batch"."""

    hidden_size: int
    out_size: int
    depth: int = 2
    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`(examples, ...)` to `(examples, out_size)`; trailing axes are flattened."""
        x = x.reshape(x.shape[0], -1)
        for _ in range(self.depth):
            x = nn.Dense(self.hidden_size)(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                axis_name=self.axis_name,
            )(x)
            x = nn.relu(x)
        return nn.Dense(self.out_size)(x)


class PlainMLP(nn.Module):
    """Dense, relu and dropout, without any state."""

    hidden_sizes: Sequence[int]
    out_size: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """`(examples, ...)` to `(examples, out_size)`; trailing axes are flattened."""
        x = x.reshape(x.shape[0], -1)
        for size in self.hidden_sizes:
            x = nn.relu(nn.Dense(size)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.out_size)(x)
