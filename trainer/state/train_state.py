"""The state of a run: everything a step changes, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
    """The training state: equal on every device, but for what `state_sharding` cuts over them.

    Attributes:
        step: steps taken so far, int32, shape ().
        params: what the optimizer changes.
        model_state: all other collections of the model, such as `batch_stats`.
        opt_state: the state of the optax optimizer.
        rng: raw key data of the run, uint32. It never changes: each step folds its number in.
        ema: an average of the params over the steps, if the config asks for one.
        loss_scale: of a run in float16, `trainer.step.precision.LossScale`.
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
        """The params that are evaluated: their average, where there is one."""
        return self.params if self.ema is None else self.ema
