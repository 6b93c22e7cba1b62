"""Losses: `(outputs, batch) -> (examples,)`, one value per example.

A loss may return `(values, weights)` instead, both `(examples,)`: their mean is then weighted, over
the examples of all devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from trainer.errors import UserError
from trainer.metrics import Values, cross_entropy, mean_of_counted, mean_per_example, same_shape


def squared_error(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Squared error, averaged over all axes but the first."""
    same_shape(outputs.shape, batch["y"].shape, "the model's outputs")
    return mean_per_example((outputs - batch["y"]) ** 2)


def squared_distance_to_input(outputs: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """`sum((x - y)**2)` over the features: the placeholder loss of Flax's guide on state."""
    return jnp.sum((batch["x"] - outputs).reshape(outputs.shape[0], -1) ** 2, axis=-1)


def softmax_cross_entropy(
    outputs: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Values:
    """Cross entropy, in nats, of logits `(examples, ..., classes)` and integer labels `y`.

    It is averaged over the positions between examples and classes, if there are any. It is NaN for
    a label that is neither a class nor `ignore_index`; `trainer.step.labels` then names the label.

    Args:
        outputs: the logits.
        batch: contains the labels.
        label_smoothing: the fraction of each label that is distributed evenly over all classes
            (Szegedy et al., arXiv:1512.00567, section 7).
        ignore_index: positions with this label do not count: the loss is the mean over all others
            of the global batch. -100 is common; a class may be ignored too. None: all count.
    """
    if not 0 <= label_smoothing < 1:
        raise UserError(f"config.loss.label_smoothing={label_smoothing} is not in [0, 1)")
    losses = cross_entropy(outputs, batch["y"])
    if label_smoothing:
        # The mean over the classes of -log(softmax(outputs)).
        even = jax.nn.logsumexp(outputs, axis=-1) - jnp.mean(outputs, axis=-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    return mean_of_counted(losses, batch["y"], ignore_index)
