"""Models in NNX, as users write them."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx


class Counter(nnx.Variable):
    """State of a type that Flax does not define."""


class MLP(nnx.Module):
    """`trainer.models.mlp:MLP` with its layers in a list, and optional dropout."""

    def __init__(self, in_size, hidden_size, out_size, *, depth=2, dropout=0.0, rngs: nnx.Rngs):
        sizes = [in_size] + [hidden_size] * depth
        self.layers = nnx.List(
            nnx.Linear(
                a,
                b,
                rngs=rngs,
                kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model")),
            )
            for a, b in pairwise(sizes)
        )
        self.norms = nnx.List(
            nnx.BatchNorm(hidden_size, momentum=0.9, axis_name="batch", rngs=rngs)
            for _ in range(depth)
        )
        self.dropouts = nnx.List(nnx.Dropout(dropout, rngs=rngs) for _ in range(depth))
        self.head = nnx.Linear(hidden_size, out_size, rngs=rngs)
        self.calls = Counter(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer, norm, dropout in zip(self.layers, self.norms, self.dropouts, strict=True):
            x = dropout(nnx.relu(norm(layer(x))))
        self.features = nnx.Intermediate(x)  # what `sow` leaves behind
        self.calls[...] += 1
        return self.head(x)


class Growing(nnx.Module):
    """Creates a variable in its call."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.layer = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        self.mean = nnx.BatchStat(jnp.mean(x))
        return self.layer(x.reshape(len(x), -1))


class Meddling(Growing):
    """Changes a parameter in its call."""

    def __call__(self, x):
        self.layer.bias[...] = jnp.ones(10)
        return self.layer(x.reshape(len(x), -1))


class WithKeys(Growing):
    """Holds keys that are not in an `nnx.Rngs`."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.keys = nnx.Variable(jax.random.split(rngs(), 2))


def fixed():
    """A module created with its own keys."""
    return nnx.Linear(64, 10, rngs=nnx.Rngs(0))
