"""The compiled step of a run: the update step that a config describes, lifted over its axis."""

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
from trainer.state.leaves import widen
from trainer.state.partition import SHARDED_FIELDS, ParamSharding, shard_dimensions
from trainer.state.train_state import TrainState
from trainer.step.analysis import has_convolution
from trainer.step.collectives import all_gather
from trainer.step.gradients import GATHER_SCOPE, Gradients, make_gradient_step
from trainer.step.job import Job
from trainer.step.task import AXIS, Batch, Recipe, Task
from trainer.step.update import apply_gradients, make_update_step, stack_metrics


def lift_update_step(
    settings: Settings, job: Job, lift: Lift, state: Any, platform: str | None = None
) -> Callable[[Any, Any], Any]:
    """Builds `(state, batch) -> (state, stacked metrics)` over all devices.

    It compiles at its first call.

    Args:
        settings: of the run.
        job: what to train.
        lift: over which devices, and how.
        state: a state, or its shapes.
        platform: the platform to choose defaults for; None: that of the devices.

    Raises:
        UserError: the optimizer does not work with a sharded state.
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
    """Builds a job's step of one shard, `(state, batch) -> (state, stacked metrics)`."""
    recipe = recipe_for(settings, job, platform, unroll=unroll)
    return stack_metrics(make_update_step(job.task, recipe))


def make_sharded_step(
    task: Task, recipe: Recipe, lift: Lift, state: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Any]]:
    """Builds the same step for a sharded state, as a function of global arrays.

    Only the gradients are computed per shard. The optimizer's part is left to the compiler, guided
    by sharding constraints; so a norm over all leaves is right, wherever their shards are.

    Args:
        task: what to train.
        recipe: how to take a step.
        lift: says which fields of the state are sharded.
        state: a state, or its shapes.
    """
    trainable = task.trainable(state.params)
    sharding = ParamSharding(
        lift.num_shards,
        param_dimensions=shard_dimensions(state.params, lift.num_shards),
        grad_dimensions=shard_dimensions(trainable, lift.num_shards),
        shards_params="params" in lift.sharded,
    )
    specs = lift.specs(state)
    fsdp_specs = lift.specs(state, SHARDED_FIELDS["fsdp"])
    gradient_step = lift.shard_map(
        make_gradient_step(task, recipe, sharding=sharding),
        (dataclasses.replace(specs, opt_state=P(), ema=P()), P(AXIS)),
        Gradients(lift.specs_of(trainable), P(), cast(Any, P())),
    )

    def gather(params: Any) -> Any:
        with jax.named_scope(GATHER_SCOPE):
            return all_gather(params, AXIS, sharding, flat=recipe.flat)

    gather_params = lift.shard_map(gather, (fsdp_specs.params,), P())

    def update_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        gradients = gradient_step(dataclasses.replace(state, opt_state=(), ema=None), batch)
        # Each device updates only its own shard of the params, even if they are replicated.
        sharded = lift.constrain(state, fsdp_specs)
        updated, metrics = apply_gradients(task, recipe, sharded, gradients)
        updated = lift.constrain(updated, fsdp_specs)
        if not sharding.shards_params:
            updated = dataclasses.replace(updated, params=gather_params(updated.params))
        return lift.constrain(updated, specs), metrics

    return update_step


def recipe_for(settings: Settings, job: Job, platform: str, *, unroll: bool) -> Recipe:
    """The job's recipe with the choices that depend on the platform."""
    flat = settings.reduce == "flat" or (settings.reduce == "auto" and platform == "cpu")
    return dataclasses.replace(job.recipe, flat=flat, unroll=unroll)


def _check_optimizer(settings: Settings, task: Task, state: Any) -> None:
    """Raises a UserError if the optimizer uses the axis: a sharded step runs it outside."""
    args = task.trainable(state.params), state.opt_state, state.params

    def update(grads: Any, opt_state: Any, params: Any) -> Any:
        return task.optimizer.update(widen(grads), opt_state, widen(params))

    try:
        jax.eval_shape(update, *args)
    except NameError as error:
        # If the name is unbound with the axis too, the step itself raises the better error.
        with contextlib.suppress(NameError):
            jax.make_jaxpr(update, axis_env=[(AXIS, 1)])(*args)
            raise UserError(
                f"config.optimizer.target={settings.optimizer['target']!r} uses the axis {AXIS!r} "
                f"itself, which it cannot under config.state_sharding={settings.state_sharding!r}",
                "the gradients it receives are already means over the axis: take no mean in the "
                "optimizer, or use --config.state_sharding=replicated",
            ) from error
