"""The evaluation step of one shard: sums and counts over the axis."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import lax

from trainer.state.train_state import TrainState
from trainer.step.gradients import metric_sums, per_example, sums_of
from trainer.step.task import AXIS, Batch, Task


def make_eval_step(
    task: Task, *, axis: str | None = AXIS
) -> Callable[[TrainState, Batch], dict[str, tuple[jax.Array, jax.Array]]]:
    """Builds `eval_step(state, batch) -> {name: (numerator, count)}`, summed over the axis.

    The model runs with `train=False`; what it would write to its state is thrown away. Examples
    whose `mask` is 0 count for nothing, so the sums of a padded last batch are exact.
    """

    def eval_step(state: TrainState, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        rng = jax.random.wrap_key_data(state.rng)
        outputs, _ = task.apply(state.eval_params, state.model_state, batch, train=False, rng=rng)
        losses = per_example(task.loss, outputs, batch, "config.loss")
        sums = {"loss": sums_of(losses, batch)} | metric_sums(task, outputs, batch)
        return sums if axis is None else lax.psum(sums, axis)

    return eval_step
