"""Metrics: `(outputs, batch) -> (examples,)`, one value an example, like losses."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def mean_per_example(values: jax.Array) -> jax.Array:
    """Averages `(examples, ...)` to `(examples,)`."""
    return jnp.mean(values.reshape(values.shape[0], -1), axis=-1)


def accuracy(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """1.0 where the largest of `(examples, ..., classes)` is the label, averaged over positions."""
    return mean_per_example((jnp.argmax(outputs, axis=-1) == batch["y"]).astype(jnp.float32))
