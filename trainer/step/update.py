"""The one update step, written for one shard of the batch in terms of one named axis.

What the axis is (a `vmap`, a `pmap`, a mesh axis of a pod) is decided in `trainer/lift/lift.py` and
nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from trainer.state.leaves import fill_in
from trainer.state.train_state import TrainState
from trainer.step.gradients import Gradients, make_gradient_step
from trainer.step.task import AXIS, PLAIN, Batch, Metrics, Recipe, Task


def make_update_step(
    task: Task, recipe: Recipe = PLAIN, *, axis: str | None = AXIS
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds `update_step(state, batch) -> (state, metrics)` for one shard of the batch.

    Args:
        task: what to train.
        recipe: how.
        axis: the name of the axis over the shards; None where there is only one and no axis.
    """
    gradient_step = make_gradient_step(task, recipe, axis=axis)

    def update_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return apply_gradients(task, recipe, state, gradient_step(state, batch))

    return update_step


def apply_gradients(
    task: Task, recipe: Recipe, state: TrainState, found: Gradients
) -> tuple[TrainState, Metrics]:
    """The state after a step, and the step's metrics, from the gradients of the whole batch.

    Args:
        task: what is trained.
        recipe: how.
        state: before the step.
        found: in the batch.
    """
    grads, metrics = found.grads, dict(found.metrics)
    norm = metrics["grad_norm"]
    if recipe.clip_norm is not None:
        factor = jnp.minimum(1.0, recipe.clip_norm / (norm + 1e-12))
        grads = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), grads)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    rate = task.learning_rate
    metrics["learning_rate"] = jnp.asarray(
        rate(state.step) if callable(rate) else rate, jnp.float32
    )
    params = optax.apply_updates(state.params, updates)
    updated = dataclasses.replace(
        state, params=params, model_state=found.model_state, opt_state=opt_state
    )
    if state.ema is not None:
        ema = optax.incremental_update(
            task.trainable(params), task.trainable(state.ema), 1 - (recipe.ema_decay or 0.0)
        )
        updated = dataclasses.replace(updated, ema=fill_in(params, ema))
    good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    if recipe.skip_nonfinite or state.loss_scale is not None:
        updated = jax.tree.map(functools.partial(jnp.where, good), updated, state)
    if state.loss_scale is not None:
        # An overflow is the scale's doing, and no news, until it cannot be lower.
        expected = ~good & jnp.isfinite(metrics["loss"]) & ~state.loss_scale.is_lowest
        metrics["grad_norm"] = jnp.where(expected, 0.0, norm)
        metrics["loss_scale"] = state.loss_scale.scale
        updated = dataclasses.replace(updated, loss_scale=state.loss_scale.updated(good))
    return dataclasses.replace(updated, step=state.step + 1), metrics


def stack_metrics(
    update_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Returns the metrics as one array, in the order of their sorted names.

    Every output costs a dispatch per device (~2 us on CPU), and the loop reads metrics together.
    """

    def stacked(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, metrics = update_step(state, batch)
        return state, jnp.stack([metrics[name] for name in sorted(metrics)])

    return stacked


def metric_names(task: Task, recipe: Recipe) -> list[str]:
    """The names of a step's metrics, in the order in which `stack_metrics` has them."""
    scale = ["loss_scale"] if recipe.scale_loss else []
    return sorted(["loss", "grad_norm", "learning_rate", *scale, *task.metrics])
