"""Initialisation of a training state."""

from __future__ import annotations

import functools

import flax.core
import jax
import jax.numpy as jnp

from trainer.config.settings import check_seed
from trainer.state.leaves import widen
from trainer.state.train_state import TrainState
from trainer.step.precision import LossScale
from trainer.step.task import AXIS, PLAIN, Recipe, Task


def init_state(task: Task, seed: int, example: jax.Array, recipe: Recipe = PLAIN) -> TrainState:
    """Initialises the model's variables and splits them into params and model state.

    Call it under `jax.jit`: eager initialisation is slow.

    Args:
        task: what to train.
        seed: seeds the params and every random number of later steps; from 0 to 2**32 - 1.
        example: one example of `batch["x"]`, without a batch axis; its values do not matter.
        recipe: says which optional fields the state has.

    Raises:
        UserError: the seed has more than 32 bits.
    """
    if isinstance(seed, int):
        check_seed(seed, "seed")
    params_key, run_key = jax.random.split(jax.random.key(seed))

    # An axis of size one, because a model may use the axis during initialisation.
    init = jax.vmap(functools.partial(task.init, params_key), axis_name=AXIS)
    variables = init(example[None, None])
    variables = jax.tree.map(lambda leaf: leaf[0], variables)
    model_state, params = flax.core.pop(variables, "params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=task.optimizer.init(widen(params)),
        rng=jax.random.key_data(run_key),
        # A copy, because a buffer must not be donated twice.
        ema=None if recipe.ema_decay is None else jax.tree.map(jnp.copy, widen(params)),
        loss_scale=LossScale.initial() if recipe.scale_loss else None,
    )
