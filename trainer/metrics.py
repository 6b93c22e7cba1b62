"""Metrics: `(outputs, batch) -> (examples,)`, one value per example, like losses.

Those with labels to ignore return `(values, weights)`, both `(examples,)`: the share of an
example's positions that count is its weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from trainer.errors import UserError

# `(examples,)`, or a pair of such: values and their weights in a mean.
Values = jax.Array | tuple[jax.Array, jax.Array]


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


def accuracy(
    outputs: jax.Array, batch: Mapping[str, jax.Array], *, ignore_index: int | None = None
) -> Values:
    """1.0 where the largest of the logits `(examples, ..., classes)` is the label, else 0.0.

    It is averaged over the positions between examples and classes, if there are any.

    Args:
        outputs: the logits.
        batch: contains the labels.
        ignore_index: as for `trainer.losses.softmax_cross_entropy`, whose value it has by default.
    """
    same_shape(outputs.shape[:-1], batch["y"].shape, "the logits, without the axis of classes,")
    hits = (jnp.argmax(outputs, axis=-1) == batch["y"]).astype(jnp.float32)
    return mean_of_counted(hits, batch["y"], ignore_index)


def bits(
    outputs: jax.Array, batch: Mapping[str, jax.Array], *, ignore_index: int | None = None
) -> Values:
    """Cross entropy, in bits, of logits `(examples, ..., symbols)`, averaged over positions.

    For a model of text these are bits per character or token: the loss in nats, divided by ln(2).

    Args:
        outputs: the logits.
        batch: contains the labels.
        ignore_index: as for `trainer.losses.softmax_cross_entropy`, whose value it has by default.
    """
    nats = cross_entropy(outputs, batch["y"])
    return mean_of_counted(nats / jnp.log(2.0), batch["y"], ignore_index)


def cross_entropy(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy, in nats, of logits `(..., classes)` and labels `(...)`.

    It is NaN for a label that is not a class: as an index, -1 would be the last class.
    """
    same_shape(outputs.shape[:-1], labels.shape, "the logits, without the axis of classes,")
    index = labels.astype(jnp.int32)
    is_class = (index >= 0) & (index < outputs.shape[-1])
    if jnp.issubdtype(labels.dtype, jnp.floating) or labels.dtype.itemsize > 4:
        is_class &= index == labels  # the cast has changed it
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(is_class, index, 0))
    return jnp.where(is_class, nats, jnp.nan)


def mean_of_counted(values: jax.Array, labels: jax.Array, ignore_index: int | None) -> Values:
    """Averages `(examples, ...)` to `(examples,)`, without positions whose label is to be ignored.

    Args:
        values: one for each label.
        labels: in the shape of `values`.
        ignore_index: the label to ignore; None: all labels count.

    Returns:
        The means `(examples,)`; with an `ignore_index` also the share of each example that counts.
    """
    if ignore_index is None:
        return mean_per_example(values)
    counted = labels.astype(jnp.int32) != ignore_index
    shares = mean_per_example(counted.astype(values.dtype))
    total = mean_per_example(jnp.where(counted, values, 0.0))
    return total / jnp.where(shares > 0, shares, 1.0), shares
