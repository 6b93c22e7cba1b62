"""Metrics: `(outputs, batch) -> (examples,)`, one value per example, like losses."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from trainer.errors import UserError


def mean_per_example(values: jax.Array) -> jax.Array:
    """Averages `(examples, ...)` to `(examples,)`."""
    return jnp.mean(values.reshape(values.shape[0], -1), axis=-1)


def same_shape(shape: tuple[int, ...], labels: tuple[int, ...], what: str) -> None:
    """Raises a UserError unless the shapes are equal: arithmetic would silently broadcast them."""
    if shape != labels:
        raise UserError(
            f"{what} have shape {shape} and the labels batch['y'] {labels} (on one shard)",
            "give them the same shape: arithmetic would broadcast one to the other",
        )


def accuracy(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """1.0 where the largest of the logits `(examples, ..., classes)` is the label, else 0.0.

    It is averaged over the positions between examples and classes, if there are any.
    """
    same_shape(outputs.shape[:-1], batch["y"].shape, "the logits, without the axis of classes,")
    return mean_per_example((jnp.argmax(outputs, axis=-1) == batch["y"]).astype(jnp.float32))


def bits(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Cross entropy, in bits, of logits `(examples, ..., symbols)`, averaged over positions.

    For a model of text these are bits per character or token: the loss in nats, divided by ln(2).
    """
    same_shape(outputs.shape[:-1], batch["y"].shape, "the logits, without the axis of symbols,")
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"].astype(jnp.int32))
    return mean_per_example(nats) / jnp.log(2.0)
