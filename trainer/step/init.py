"""A new training state: variables initialised, split into params and model state."""

from __future__ import annotations

import functools

import flax.core
import jax
import jax.numpy as jnp

from trainer.state.train_state import TrainState
from trainer.step.precision import LossScale
from trainer.step.task import AXIS, PLAIN, Recipe, Task


def init_state(task: Task, seed: int, example: jax.Array, recipe: Recipe = PLAIN) -> TrainState:
    """Initialises variables and splits them into params and state. Jit it: eager init is slow.

    Args:
        task: the task.
        seed: of the parameters and of every later random number in a step.
        example: one example of `batch["x"]`, without a batch axis; its values do not matter.
        recipe: of the steps, which may keep state of their own.
    """
    params_key, run_key = jax.random.split(jax.random.key(seed))

    # Inside an axis of size one, so that a model may use the axis while it initialises.
    init = jax.vmap(functools.partial(task.init, params_key), axis_name=AXIS)
    variables = init(example[None, None])
    variables = jax.tree.map(lambda leaf: leaf[0], variables)
    model_state, params = flax.core.pop(variables, "params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=task.optimizer.init(params),
        rng=jax.random.key_data(run_key),
        # Of its own, or donation would give one buffer away twice.
        ema=None if recipe.ema_decay is None else jax.tree.map(jnp.copy, params),
        loss_scale=LossScale.initial() if recipe.scale_loss else None,
    )
