"""Values per example: calling losses and metrics, masks, and sums over the examples of a shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.errors import UserError
from trainer.state.leaves import widen
from trainer.step.task import Batch, PerExample, Task


def per_example(function: PerExample, outputs: Any, batch: Batch, where: str) -> jax.Array:
    """Calls a loss or a metric and checks that it returns one value per example.

    Args:
        function: the loss or metric.
        outputs: of the model; the function receives them in at least 32 bits.
        batch: one shard.
        where: the config key that names the function, for the error message.

    Returns:
        The values, `(examples,)`, float32 (float64 stays float64).

    Raises:
        UserError: it returns another shape.
    """
    values = function(widen(outputs), batch)
    examples = batch["x"].shape[0]
    if jnp.shape(values) != (examples,):
        raise UserError(
            f"{where} returned shape {jnp.shape(values)} for {examples} examples a shard",
            f"return one value per example, shape ({examples},): take the mean over other axes",
        )
    return values.astype(jnp.float32) if values.dtype != jnp.float64 else values


def mask_of(batch: Batch) -> jax.Array | None:
    """The mask of a batch, `(examples,)` float32; None if it has none.

    Raises:
        UserError: it has another shape.
    """
    mask = batch.get("mask")
    if mask is None:
        return None
    examples = batch["x"].shape[0]
    if mask.shape != (examples,):
        raise UserError(f"the data's mask has shape {mask.shape} for {examples} examples a shard")
    return mask.astype(jnp.float32)  # the mean over the axis leaves integers out


def sum_and_count(values: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The sum of values `(examples,)` over the unmasked examples of a shard, and their number."""
    mask = mask_of(batch)
    if mask is None:
        return jnp.sum(values), jnp.asarray(values.size, jnp.float32)
    return jnp.sum(jnp.where(mask > 0, values * mask, 0.0)), jnp.sum(mask)


def metric_sums(task: Task, outputs: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The sum and count of each metric of a task, over one shard."""
    return {
        name: sum_and_count(per_example(metric, outputs, batch, f"config.metrics.{name}"), batch)
        for name, metric in task.metrics.items()
    }


def loss_reduction(
    batch: Batch, axis: str | None
) -> Callable[[jax.Array, jax.Array | None], jax.Array]:
    """How a shard reduces its losses so that the mean over the shards is the global mean.

    Args:
        batch: one shard.
        axis: the bound axis over the shards, if any.

    Returns:
        `(losses, mask) -> scalar`, for all examples of the shard or for a microbatch of them: the
        results for the microbatches add up to that for the shard.
    """
    mask = mask_of(batch)
    examples = batch["x"].shape[0]
    if mask is None:

        def mean(losses: jax.Array, mask: jax.Array | None) -> jax.Array:
            if losses.shape[0] == examples:
                return jnp.mean(losses)
            return jnp.sum(losses) / examples

        return mean
    count = jnp.sum(mask)
    if axis is not None:
        count = lax.pmean(count, axis)

    def masked_mean(losses: jax.Array, mask: jax.Array | None) -> jax.Array:
        assert mask is not None
        return jnp.sum(jnp.where(mask > 0, losses * mask, 0.0)) / jnp.maximum(count, 1e-9)

    return masked_mean
