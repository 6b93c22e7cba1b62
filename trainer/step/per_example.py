"""Values per example: calling losses and metrics, weights and masks, and sums over a shard."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainer.errors import UserError
from trainer.state.leaves import widen
from trainer.step.task import Batch, PerExample, Task


class PerExampleValues(NamedTuple):
    """What a loss or metric gives for the examples of a shard; float32 (float64 stays float64).

    Attributes:
        values: one per example, `(examples,)`.
        weights: their weights in a mean, `(examples,)`; None: all are 1.
    """

    values: jax.Array
    weights: jax.Array | None


def per_example(function: PerExample, outputs: Any, batch: Batch, where: str) -> PerExampleValues:
    """Calls a loss or a metric and checks that it returns one value per example.

    The weights are its own, if it returns any, times the mask of the batch, if that has one.

    Args:
        function: the loss or metric.
        outputs: of the model; the function receives them in at least 32 bits.
        batch: one shard.
        where: the config key that names the function, for the error message.

    Raises:
        UserError: it returns another shape.
    """
    found = function(widen(outputs), batch)
    values, weights = found if isinstance(found, tuple) else (found, None)
    examples = batch["x"].shape[0]
    for name, array in (("", values), (" as weights", weights)):
        if array is not None and jnp.shape(array) != (examples,):
            raise UserError(
                f"{where} returned shape {jnp.shape(array)}{name} for {examples} examples a shard",
                f"return one value per example, shape ({examples},): take the mean over other axes",
            )
    values = values.astype(jnp.float32) if values.dtype != jnp.float64 else values
    mask = mask_of(batch)
    if weights is not None:
        mask = weights.astype(jnp.float32) * (1.0 if mask is None else mask)
    return PerExampleValues(values, mask)


def mask_of(batch: Batch) -> jax.Array | None:
    """The mask of a batch, `(examples,)` float32; None if it has none."""
    mask = batch.get("mask")
    if mask is None:
        return None
    examples = batch["x"].shape[0]
    if mask.shape != (examples,):
        raise UserError(f"the data's mask has shape {mask.shape} for {examples} examples a shard")
    return mask.astype(jnp.float32)  # the mean over the axis leaves integers out


def blend(first: PerExampleValues, second: PerExampleValues, ratio: jax.Array) -> PerExampleValues:
    """The losses with either of two labels as one: `ratio` is the weight of the first."""
    if first.weights is None or second.weights is None:
        return PerExampleValues(ratio * first.values + (1 - ratio) * second.values, None)
    shares = ratio * first.weights, (1 - ratio) * second.weights
    weights = shares[0] + shares[1]
    total = shares[0] * first.values + shares[1] * second.values
    return PerExampleValues(total / jnp.where(weights > 0, weights, 1.0), weights)


def sum_and_count(found: PerExampleValues) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the values, and the sum of the weights. A weight of 0 hides a NaN."""
    values, weights = found
    if weights is None:
        return jnp.sum(values), jnp.asarray(values.size, jnp.float32)
    return jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights)


def metric_sums(task: Task, outputs: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The sum and count of each metric of a task, over one shard."""
    return {
        name: sum_and_count(per_example(metric, outputs, batch, f"config.metrics.{name}"))
        for name, metric in task.metrics.items()
    }
