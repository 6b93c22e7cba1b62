"""Losses: `(outputs, batch) -> (examples,)`, one value an example."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from trainer.metrics import mean_per_example, same_shape


def squared_error(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Squared error, averaged over the axes behind the examples."""
    same_shape(outputs.shape, batch["y"].shape, "the model's outputs")
    return mean_per_example((outputs - batch["y"]) ** 2)


def squared_distance_to_input(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """`sum((x - y)**2)` over the features: the placeholder loss of Flax's guide on state."""
    return jnp.sum((batch["x"] - outputs).reshape(outputs.shape[0], -1) ** 2, axis=-1)


def softmax_cross_entropy(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Cross entropy, in nats, of logits `(examples, ..., classes)` and integer labels `y`."""
    same_shape(outputs.shape[:-1], batch["y"].shape, "the logits, without classes,")
    return mean_per_example(
        optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"].astype(jnp.int32))
    )
