"""The training state: everything that a step changes, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
    """The training state: replicated on all devices, except for the fields that are sharded.

    Attributes:
        step: the number of steps taken, int32, shape ().
        params: the parameters, which the optimizer updates.
        model_state: all other collections of the model, such as `batch_stats`.
        opt_state: the state of the optax optimizer, of params cast by `trainer.state.leaves.widen`.
        rng: the run's raw key data, uint32. It never changes: each step folds its number in.
        ema: an exponential moving average of the params, in float32 where these have less bits;
            None without `config.ema_decay`.
        loss_scale: a `trainer.step.precision.LossScale` in a float16 run, otherwise None.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    rng: jax.Array
    ema: Any = None
    loss_scale: Any = None

    @property
    def eval_params(self) -> Any:
        """The params to evaluate: their average if there is one, in the dtypes of the params."""
        if self.ema is None:
            return self.params
        return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), self.ema, self.params)
