"""The step of a run as it is compiled: the config's own, lifted over the config's axis."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import PartitionSpec as P

from trainer.config.settings import Settings
from trainer.errors import UserError
from trainer.lift.lift import Lift
from trainer.state.partition import SHARDED_FIELDS, ParamSharding, shard_dimensions
from trainer.state.train_state import TrainState
from trainer.step.collectives import all_gather
from trainer.step.gradients import GATHER_SCOPE, Gradients, make_gradient_step
from trainer.step.job import Job
from trainer.step.task import AXIS, Batch, Recipe, Task
from trainer.step.tracing import has_convolution
from trainer.step.update import apply_gradients, make_update_step, stack_metrics


def lift_update_step(
    settings: Settings, job: Job, lift: Lift, state: Any, platform: str | None = None
) -> Callable[[Any, Any], Any]:
    """`(state, batch) -> (state, rows)` over all devices; it compiles at its first call.

    Args:
        settings: how to reduce, how many steps in a call, and what is done about NaN.
        job: what is trained.
        lift: how the batch axis is laid over devices.
        state: a state, or its shapes.
        platform: whose habits to follow; that of the devices where None.

    Raises:
        UserError: the optimizer cannot work with a state that is cut.
    """
    platform = platform or lift.platform
    scan = settings.steps_per_call > 1
    unroll = False
    if (scan or job.recipe.accum_steps > 1) and platform == "cpu":
        batch = job.stream.shapes(job.recipe.accum_steps)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), batch)
        unroll = has_convolution(make_job_step(settings, job, platform), state, shapes)
    if lift.sharded:
        _check_optimizer(settings, job.task, state)
        recipe = recipe_for(settings, job, platform, unroll=unroll)
        update_step = stack_metrics(make_sharded_step(job.task, recipe, lift, state))
        return lift.compile(update_step, state, scan=scan, unroll=unroll)
    update_step = make_job_step(settings, job, platform, unroll=unroll)
    return lift(update_step, scan=scan, unroll=unroll)


def make_job_step(
    settings: Settings, job: Job, platform: str, *, unroll: bool = False
) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The step of one shard, `(state, batch) -> (state, metrics as one array)`."""
    recipe = recipe_for(settings, job, platform, unroll=unroll)
    return stack_metrics(make_update_step(job.task, recipe))


def make_sharded_step(
    task: Task, recipe: Recipe, lift: Lift, state: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
    """The same step where the state is cut over the axis, as a function of whole arrays.

    Only the gradients are a matter of the axis. What the optimizer does with them is left to the
    compiler, which is told how the state lies: so a norm over all leaves is one, wherever they are.

    Args:
        task: what to train.
        recipe: how.
        lift: which says what is cut.
        state: a state, or its shapes.
    """
    trainable = task.trainable(state.params)
    sharding = ParamSharding(
        lift.num_shards,
        param_dimensions=shard_dimensions(state.params, lift.num_shards),
        grad_dimensions=shard_dimensions(trainable, lift.num_shards),
        shards_params="params" in lift.sharded,
    )
    sharded_specs = lift.specs(state, SHARDED_FIELDS["fsdp"])
    specs = lift.specs(state)
    gradients = lift.shard_map(
        make_gradient_step(task, recipe, sharding=sharding),
        (dataclasses.replace(specs, opt_state=P(), ema=P()), P(AXIS)),
        Gradients(lift.specs_of(trainable), P(), cast(Any, P())),
    )

    def gather(params: Any) -> Any:
        with jax.named_scope(GATHER_SCOPE):
            return all_gather(params, AXIS, sharding, flat=recipe.flat)

    gather_params = lift.shard_map(gather, (sharded_specs.params,), P())

    def update_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        found = gradients(dataclasses.replace(state, opt_state=(), ema=None), batch)
        # Each device updates its own part, also of params that it has whole.
        updated, metrics = apply_gradients(
            task, recipe, lift.constrain(state, sharded_specs), found
        )
        updated = lift.constrain(updated, sharded_specs)
        if not sharding.shards_params:
            updated = dataclasses.replace(updated, params=gather_params(updated.params))
        return lift.constrain(updated, specs), metrics

    return update_step


def recipe_for(settings: Settings, job: Job, platform: str, *, unroll: bool) -> Recipe:
    """The job's recipe with what a platform likes."""
    flat = settings.reduce == "flat" or (settings.reduce == "auto" and platform == "cpu")
    return dataclasses.replace(job.recipe, flat=flat, unroll=unroll)


def _check_optimizer(settings: Settings, task: Task, state: Any) -> None:
    """Raises a UserError if the optimizer needs the axis, outside of which it is to run."""
    args = task.trainable(state.params), state.opt_state, state.params
    try:
        jax.eval_shape(task.optimizer.update, *args)
    except NameError as error:
        # Of a name that is bound neither here nor there, the step itself will tell.
        with contextlib.suppress(NameError):
            jax.make_jaxpr(task.optimizer.update, axis_env=[(AXIS, 1)])(*args)
            raise UserError(
                f"config.optimizer.target={settings.optimizer['target']!r} uses the axis {AXIS!r} "
                f"itself, which it cannot under config.state_sharding={settings.state_sharding!r}",
                "its gradients are means over the axis already: leave that to podlift, or "
                "--config.state_sharding=replicated",
            ) from error
