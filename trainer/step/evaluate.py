"""The evaluation step, written for one shard: sums and counts over the axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from trainer.state.train_state import TrainState
from trainer.step.per_example import (
    PerExampleValues,
    mask_of,
    metric_sums,
    per_example,
    sum_and_count,
)
from trainer.step.task import AXIS, Batch, Task

# Not a name of a metric, which is an attribute's.
NAN = "outputs with NaN"


def make_eval_step(
    task: Task, *, axis: str | None = AXIS
) -> Callable[[TrainState, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """Builds `eval_step(state, batch) -> {name: (sum, count)}`, summed over the axis.

    Beside the loss and the metrics, `NAN` counts the examples for which the outputs hold a NaN: a
    metric such as the accuracy gives them a number.

    The model runs with `train=False`, and its state updates are discarded. Examples whose `mask` is
    0 do not count, so the sums of a padded last batch are exact.

    Args:
        task: the model, its loss and metrics.
        axis: the name of the axis over the shards; None if there is one shard and no axis.
    """

    def eval_step(state: TrainState, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        rng = jax.random.wrap_key_data(state.rng)
        outputs, _ = task.apply(state.eval_params, state.model_state, batch, train=False, rng=rng)
        losses = per_example(task.loss, outputs, batch, "config.loss")
        sums = {"loss": sum_and_count(losses)} | metric_sums(task, outputs, batch)
        has_nan = _has_nan(outputs, batch["x"].shape[0])
        sums[NAN] = sum_and_count(PerExampleValues(has_nan, mask_of(batch)))
        return sums if axis is None else lax.psum(sums, axis)

    return eval_step


def _has_nan(outputs: Any, examples: int) -> jax.Array:
    """1.0 for each example for which an output holds a NaN, else 0.0; shape (examples,)."""
    found = jnp.zeros(examples, bool)
    for leaf in jax.tree.leaves(outputs):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and jnp.shape(leaf)[:1] == (
            examples,
        ):
            found |= jnp.isnan(leaf).reshape(examples, -1).any(axis=1)
    return found.astype(jnp.float32)
