"""The update step: one function, written for one shard of the batch and one named axis.

    update_step(state, batch) -> (state, metrics)

`state` is the whole training state and `batch` is this shard's slice of the global batch. The
function knows nothing about devices or processes. It mentions the other shards only by the name of
the axis, "batch":

1. `gradient_step` (`trainer.step.gradients`) computes the gradient of this shard's examples and
   takes the mean with `lax.pmean(..., "batch")`. Layers of the model may use the axis too, as
   `nn.BatchNorm(axis_name="batch")` does. From here on every shard holds the same numbers.
2. `apply_gradients` lets the optax optimizer update the params. It needs no axis.

Without an axis this is a plain training step. `trainer.lift.lift` decides what the axis is: an axis
of `jax.vmap`, of `jax.pmap`, or a mesh axis of `jax.shard_map` over all devices of all hosts. The
step is the same in all three cases, and so are its numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from trainer.state.leaves import fill_in, widen
from trainer.state.train_state import TrainState
from trainer.step.gradients import Gradients, make_gradient_step
from trainer.step.learning_rate import used_rate
from trainer.step.task import AXIS, PLAIN, Batch, Metrics, Recipe, Task


def make_update_step(
    task: Task, recipe: Recipe = PLAIN, *, axis: str | None = AXIS
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `update_step(state, batch) -> (state, metrics)` for one shard of the batch.

    Args:
        task: what to train.
        recipe: how to take a step.
        axis: the name of the axis over the shards; None if there is one shard and no axis.
    """
    gradient_step = make_gradient_step(task, recipe, axis=axis)

    def update_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return apply_gradients(task, recipe, state, gradient_step(state, batch))

    return update_step


def apply_gradients(
    task: Task, recipe: Recipe, state: TrainState, gradients: Gradients
) -> tuple[TrainState, Metrics]:
    """Updates the state with the gradients of the global batch; the same on every shard.

    Args:
        task: what to train.
        recipe: how to take a step.
        state: before the step.
        gradients: the result of `gradient_step`.

    Returns:
        The state after the step, and the metrics of the step.
    """
    grads, metrics = gradients.grads, dict(gradients.metrics)
    norm = metrics["grad_norm"]
    if recipe.clip_norm is not None:
        factor = jnp.minimum(1.0, recipe.clip_norm / (norm + 1e-12))
        grads = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads)
    # The gradients have at least 32 bits; so have the optimizer's averages, if the params do.
    updates, opt_state = task.optimizer.update(grads, state.opt_state, widen(state.params))
    metrics["learning_rate"] = used_rate(task.learning_rate, state.opt_state, opt_state, state.step)
    params = optax.apply_updates(state.params, updates)
    updated = dataclasses.replace(
        state, params=params, model_state=gradients.model_state, opt_state=opt_state
    )
    if state.ema is not None:
        wide = widen(params)
        ema = optax.incremental_update(
            task.trainable(wide), task.trainable(state.ema), 1 - (recipe.ema_decay or 0.0)
        )
        updated = dataclasses.replace(updated, ema=fill_in(wide, ema))
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    if recipe.skip_nonfinite or state.loss_scale is not None:
        updated = jax.tree.map(functools.partial(jnp.where, finite), updated, state)
    if state.loss_scale is not None:
        # While the scale can still fall, an overflow is expected and not reported as a NaN.
        expected = ~finite & jnp.isfinite(metrics["loss"]) & ~state.loss_scale.is_lowest
        metrics["grad_norm"] = jnp.where(expected, 0.0, norm)
        metrics["loss_scale"] = state.loss_scale.scale
        updated = dataclasses.replace(updated, loss_scale=state.loss_scale.updated(finite))
    return dataclasses.replace(updated, step=state.step + 1), metrics


def stack_metrics(
    update_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Makes a step return its metrics as one array, in the order of their sorted names.

    Every output costs a dispatch per device (about 2 us on CPU), and the loop reads all metrics
    together.
    """

    def stacked(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, metrics = update_step(state, batch)
        return state, jnp.stack([metrics[name] for name in sorted(metrics)])

    return stacked


def metric_names(task: Task, recipe: Recipe) -> list[str]:
    """The names of a step's metrics, in the order of `stack_metrics`."""
    scale = ["loss_scale"] if recipe.scale_loss else []
    return sorted(["loss", "grad_norm", "learning_rate", *scale, *task.metrics])
