"""The step of a run as it is compiled: the config's own, lifted over the config's axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from trainer.job import Job
from trainer.lift import Lift, has_convolution
from trainer.settings import Settings
from trainer.step import Batch, Recipe, make_update_step, stack_metrics


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
    """
    platform = platform or lift.platform
    scan = settings.steps_per_call > 1
    unroll = False
    if (scan or job.recipe.accum_steps > 1) and platform == "cpu":
        batch = job.stream.shapes(job.recipe.accum_steps)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype), batch)
        unroll = has_convolution(make_job_step(settings, job, platform), state, shapes)
    update_step = make_job_step(settings, job, platform, unroll=unroll)
    return lift(update_step, scan=scan, unroll=unroll)


def make_job_step(
    settings: Settings, job: Job, platform: str, *, unroll: bool = False
) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """The step of one shard, `(state, batch) -> (state, metrics as one array)`."""
    recipe = recipe_on(settings, job, platform, unroll=unroll)
    return stack_metrics(make_update_step(job.task, recipe))


def recipe_on(settings: Settings, job: Job, platform: str, *, unroll: bool) -> Recipe:
    """The job's recipe with what a platform likes."""
    flat = settings.reduce == "flat" or (settings.reduce == "auto" and platform == "cpu")
    return dataclasses.replace(job.recipe, flat=flat, unroll=unroll)
