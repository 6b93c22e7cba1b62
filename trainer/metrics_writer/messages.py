"""The lines that open and close a run, for the person who started it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from trainer.checkpoints.saver import Saver
from trainer.config.settings import Settings
from trainer.console import duration, say, warn
from trainer.lift.lift import Lift
from trainer.lift.unsynced import unsynced_state
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.model_table import draw_table, model_rows
from trainer.metrics_writer.train_log import LogRow
from trainer.state.leaves import count_params
from trainer.state.train_state import TrainState
from trainer.step.job import Job
from trainer.workdir.workdir import Workdir

# What time is spent on, for a person.
_KINDS = {
    "step": "steps",
    "data": "waiting for data",
    "evaluate": "evaluation",
    "save": "saving",
    "compile": "compilation",
    "profile": "profiling",
}


@dataclass(frozen=True)
class About:
    """What a run is."""

    settings: Settings
    folder: Workdir
    lift: Lift
    job: Job


def warn_of_unsynced_state(lift: Lift, job: Job, state: TrainState) -> None:
    """Says that numbers will depend on the number of devices, which nothing else would show."""
    if lift.num_shards == 1 or not state.model_state:
        return
    try:
        batch = job.stream.shapes(job.stream.global_batch_size)
        names = unsynced_state(job.task, state, batch, lift.num_shards)
    except Exception:  # a courtesy: a model may hold what this stricter tracing cannot follow
        return
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn(
            f"each device computes {names[0]}{more} from its own examples; the copies are "
            "averaged after each step\n  HINT: right for a plain running mean; a BatchNorm "
            'needs axis_name="batch", or its outputs depend on the number of devices'
        )


def warn_of_changes(about: About, num_steps: int) -> None:
    """What is not as it was; `num_steps` is how long the run was to be before."""
    job = about.job
    if num_steps != job.num_steps and callable(job.task.learning_rate):
        warn(
            f"the run is now {job.num_steps} steps long and was {num_steps}: a schedule that spans "
            "the run is stretched, so the learning rate may jump"
        )
    for change in about.folder.changes:
        warn(f"goes on with another config, as allowed: {change}")


def say_row(about: About, row: LogRow, tags: Mapping[str, float]) -> None:
    """One row of metrics, as a line."""
    shown = [f"step {row.step}/{about.job.stop}"]
    shown += [
        f"{name} {row.values[name]:.4g}" for name in ["loss", *sorted(about.job.task.metrics)]
    ]
    if row.step_seconds > 0:
        eta = (about.job.stop - row.step) * row.step_seconds
        shown += [describe_rate(tags, about.lift.mesh.size)]
        shown += [f"{1000 * row.step_seconds:.3g} ms/step"]
        shown += describe_chips(tags)
        shown += [f"eta {duration(eta)}"]
    if "train/skipped" in tags:
        shown += [f"skipped {tags['train/skipped']}"]
    say("  ".join(shown))


def describe_rate(tags: Mapping[str, float], num_devices: int) -> str:
    """`8,000 examples/s (1,000 a device)`."""
    rate = f"{tags['train/examples_per_second']:,.0f} examples/s"
    if num_devices == 1 or "train/examples_per_second_per_device" not in tags:
        return rate
    return f"{rate} ({tags['train/examples_per_second_per_device']:,.0f} a device)"


def describe_chips(tags: Mapping[str, float]) -> list[str]:
    """`["mfu 41.0%", "memory 12.1/79.1 GiB"]`, as far as they are known."""
    shown = []
    if "train/mfu" in tags:
        shown += [f"mfu {tags['train/mfu']:.1%}"]
    if "memory/peak_bytes_in_use" in tags:
        peak = tags["memory/peak_bytes_in_use"] / 2**30
        limit = tags.get("memory/bytes_limit", 0) / 2**30
        shown += [f"memory {peak:.1f}{f'/{limit:.1f}' if limit else ''} GiB"]
    return shown


def describe_shares(goodput: Goodput) -> str:
    """`steps 91%, compilation 7%, saving 2%`."""
    shares = [f"{_KINDS.get(kind, kind)} {share:.0%}" for kind, share in goodput.shares().items()]
    return ", ".join(share for share in shares if not share.endswith(" 0%"))


def say_start(about: About, state: TrainState, seconds: float) -> None:
    """What is trained on what; `seconds` is how long the state took."""
    lift, settings, job = about.lift, about.settings, about.job
    say(
        f"{describe_devices(lift)}, global batch {settings.global_batch_size} "
        f"({settings.global_batch_size // lift.num_shards} a shard)"
    )
    held_out = f", {len(job.held_out):,} held out" if job.held_out is not None else ""
    say(
        f"{count_params(state.params):,} parameters, {len(job.stream.source):,} examples"
        f"{held_out}, {_steps(job.stream.steps_per_epoch)} an epoch; state ready in "
        f"{seconds:.2f} s"
    )
    is_whole = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    if lift.sharded and is_whole and lift.num_shards > 1:
        warn(
            f"config.state_sharding={settings.state_sharding!r} cuts nothing: each leaf is small, "
            f"or has no dimension that {lift.num_shards} divides"
        )
    if settings.model_table:
        _say_model(job, state, settings.model_table)
    say(f"workdir {about.folder.path}")


def _say_model(job: Job, state: TrainState, depth: int) -> None:
    example = job.stream.shapes(1)["x"]
    x = jax.ShapeDtypeStruct(example.shape[1:], example.dtype)
    try:
        say(draw_table(model_rows(job.task, state, x, depth)))
    except Exception as error:  # no reason not to train: a model may not take one example alone
        warn(f"no table of the model: {type(error).__name__}: {error}")


def describe_devices(lift: Lift) -> str:
    """`8 cpu devices, lift pmap`."""
    device = lift.mesh.devices.flat[0]
    shards = "" if lift.kind != "vmap" else f" as {lift.num_shards} shards"
    processes = "" if lift.num_processes == 1 else f" in {lift.num_processes} processes"
    return (
        f"{lift.mesh.size} {device.device_kind} device{'s' * (lift.mesh.size > 1)}{processes}"
        f"{shards}, lift {lift.kind}"
    )


def say_evaluation(step: int, stop: int, metrics: Mapping[str, float]) -> None:
    """What an evaluation gave, as a line; `stop` is the step at which the run is to stop."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    say(f"step {step}/{stop}  {shown}")


def say_finished_before(about: About, step: int, early: str = "") -> None:
    """The run had nothing left to do; `early` is as for `say_end`."""
    if early and step < about.job.stop:
        say(f"nothing to do: stopped early at step {step} of {about.job.num_steps}: {early}")
    else:
        say(f"nothing to do: this run has taken {_steps(step)}, and is to stop at {about.job.stop}")
    say(f"to go on: {_how_to_resume(about, step, early)}")


def say_end(about: About, saver: Saver, goodput: Goodput, step: int, early: str = "") -> None:
    """What came of it, where it is, and how to go on.

    Args:
        about: what the run is.
        saver: which knows the best state.
        goodput: which knows where the time went, that of earlier starts too.
        step: that it has come to.
        early: why it ends before its time, if evaluations have stopped getting better.
    """
    if early and step < about.job.stop:
        say(f"stopped early at step {step} of {about.job.num_steps}: {early}")
    elif step < about.job.num_steps:
        say(f"stopped at step {step} of {about.job.num_steps} (config.stop_at_step)")
    else:
        say(f"finished: {_steps(step)} in {duration(sum(goodput.seconds().values()))}")
    starts = f", of {goodput.starts} starts" if goodput.starts > 1 else ""
    say(f"time{starts}: {describe_shares(goodput)}")
    if saver.best_value is not None:
        say(
            f"best {about.settings.best_metric} {saver.best_value:.4g} at step "
            f"{saver.best_step}, in {about.folder.best}"
        )
    say(f"last checkpoint: {about.folder.checkpoints / str(step)}")
    say(f"to go on: {_how_to_resume(about, step, early)}")
    say(f"curves: tensorboard --logdir {shlex.quote(str(about.folder.path))}")


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _how_to_resume(about: About, step: int, early: str) -> str:
    settings = about.settings
    if early and step < about.job.stop:
        change = f"and --config.early_stop.patience={2 * (settings.early_stop_patience or 1)}"
    elif step < about.job.num_steps:
        change = "without config.stop_at_step"
    elif settings.num_steps is not None:
        change = f"and --config.num_steps={2 * step}"
    else:
        epochs = 2 * -(-step // about.job.stream.steps_per_epoch)
        change = f"and --config.num_epochs={epochs}"
    workdir = shlex.quote(f"--workdir={about.folder.path}")
    return f"the same command with {workdir} {change}"
