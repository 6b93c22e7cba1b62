"""Metrics: `(outputs, batch) -> (examples,)`, one value an example, like losses."""

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
    """Raises a UserError where arithmetic would broadcast one shape to the other, silently."""
    if shape != labels:
        raise UserError(
            f"{what} have shape {shape} and the labels batch['y'] {labels} (on one shard)",
            "give them the same shape: here the first would be spread over the second",
        )


def accuracy(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """1.0 where the largest of `(examples, ..., classes)` is the label, averaged over positions."""
    same_shape(outputs.shape[:-1], batch["y"].shape, "the logits, without classes,")
    return mean_per_example((jnp.argmax(outputs, axis=-1) == batch["y"]).astype(jnp.float32))


def bits(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Cross entropy, in bits, of logits `(examples, ..., symbols)`, averaged over positions.

    Of a model of text that is bits a character, or a token: the nats of the loss over ln(2).
    """
    same_shape(outputs.shape[:-1], batch["y"].shape, "the logits, without symbols,")
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["y"].astype(jnp.int32))
    return mean_per_example(nats) / jnp.log(2.0)
