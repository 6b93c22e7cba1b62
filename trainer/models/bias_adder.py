"""`BiasAdderWithRunningMean`, the first model of Flax's guide on managing parameters and state."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


class BiasAdderWithRunningMean(nn.Module):
    """Adds a trained bias to a running mean of its inputs.

    The mean names no axis, so each shard updates it with the mean of its own examples. With several
    devices it is still right, because the update step averages float state over the shards.

    The running mean keeps its shape. In the guide it grows from `(features,)` to `(1, features)` at
    its first update, which recompiles the step and breaks checkpoints.
    """

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        """`(examples, features)` to the same shape."""
        is_initialized = self.has_variable("batch_stats", "mean")
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[1:])
        if is_initialized and train:
            mean.value = self.momentum * mean.value + (1.0 - self.momentum) * jnp.mean(x, axis=0)
        return jnp.broadcast_to(mean.value + bias, x.shape)
