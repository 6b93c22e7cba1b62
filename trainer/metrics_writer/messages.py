"""The lines that a run prints: how it starts, its rows, its evaluations and how it ends.

Each takes what it prints, and nothing more. `launcher.report` reads the lines of a log that begin
with "step", "restored", "finished", "stopped", "nothing to do" and "asked to stop": change them
there too.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from os import PathLike

import jax
import jax.numpy as jnp

from trainer.checkpoints.saver import Saver
from trainer.config.settings import Settings
from trainer.console import duration, say, warn
from trainer.errors import text_of
from trainer.lift.lift import Lift
from trainer.lift.unsynced import unsynced_state
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.model_table import draw_table, model_rows
from trainer.metrics_writer.train_log import LogRow
from trainer.state.leaves import count_params, is_narrow_float, name_leaves
from trainer.state.train_state import TrainState
from trainer.step.job import Job
from trainer.workdir.workdir import Workdir

# How `Goodput` kinds are printed.
_KINDS = {
    "step": "steps",
    "data": "waiting for data",
    "evaluate": "evaluation",
    "save": "saving",
    "compile": "compilation",
    "profile": "profiling",
}


def warn_of_unsynced_state(lift: Lift, job: Job, state: TrainState) -> None:
    """Warns if model state depends on the number of shards; nothing else would show it."""
    if lift.num_shards == 1 or not state.model_state:
        return
    try:
        batch = job.stream.shapes(job.stream.global_batch_size)
        names = unsynced_state(job.task, state, batch, lift.num_shards)
    except Exception:  # only a warning: a model may hold what this stricter tracing rejects
        return
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn(
            f"each device computes {names[0]}{more} from its own examples; the copies are "
            "averaged after each step\n  HINT: right for a plain running mean; a BatchNorm "
            'needs axis_name="batch", or its outputs depend on the number of devices'
        )


def warn_of_narrow_state(state: TrainState) -> None:
    """Warns of params and model state in 16 bits, in which small changes are lost."""
    leaves = name_leaves({"params": state.params, "model_state": state.model_state})
    narrow = {name: leaf.dtype for name, leaf in leaves.items() if is_narrow_float(leaf.dtype)}
    if narrow:
        name, dtype = next(iter(narrow.items()))
        more = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
        # Half the distance between two numbers: at least eps / 4 of the number.
        share = int(4 / float(jnp.finfo(dtype).eps))  # type: ignore[no-untyped-call]
        warn(
            f"{name}{more} {'are' if more else 'is'} {dtype}: a change of less than 1/{share} of a "
            "value is lost\n"
            "  HINT: keep parameters and running averages in float32; --config.precision=bf16 "
            "computes in 16 bits all the same"
        )


def warn_of_changes(job: Job, changes: Iterable[str], saved_num_steps: int) -> None:
    """Warns of what differs from the run that is resumed.

    Args:
        job: what is trained now.
        changes: of the config, as `Workdir.changes` describes them.
        saved_num_steps: the length of the run when its state was saved.
    """
    if saved_num_steps != job.num_steps and callable(job.task.learning_rate):
        warn(
            f"the run is now {job.num_steps} steps long and was {saved_num_steps}: a schedule that "
            "spans the run is stretched, so the learning rate may jump"
        )
    for change in changes:
        warn(f"resumes with another config, as allowed: {change}")


def say_row(
    row: LogRow,
    tags: Mapping[str, float],
    *,
    stop: int,
    metrics: Iterable[str],
    num_devices: int,
) -> None:
    """Prints one row of training metrics.

    Args:
        row: the metrics.
        tags: the same by tag, with the speed, and memory where it is known.
        stop: the step at which the run stops.
        metrics: the names of the config's own metrics.
        num_devices: of the run.
    """
    shown = [f"step {row.step}/{stop}"]
    shown += [f"{name} {row.values[name]:.4g}" for name in ["loss", *sorted(metrics)]]
    if row.step_seconds > 0:
        shown += [describe_rate(tags, num_devices), f"{1000 * row.step_seconds:.3g} ms/step"]
        shown += describe_chips(tags)
        shown += [f"eta {duration((stop - row.step) * row.step_seconds)}"]
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
    """`["mfu 41.0%", "memory 12.1/79.1 GiB"]`; without what the device does not report."""
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


def say_start(
    settings: Settings, job: Job, lift: Lift, path: PathLike[str], state: TrainState, seconds: float
) -> None:
    """Prints what is trained, on what and where.

    Args:
        settings: the checked config.
        job: what is trained.
        lift: over which devices.
        path: the run's folder.
        state: at the first step of this start.
        seconds: the time it took to make or restore the state.
    """
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
    is_replicated = all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    if lift.sharded and is_replicated and lift.num_shards > 1:
        warn(
            f"config.state_sharding={settings.state_sharding!r} shards nothing: each leaf is "
            f"small, or has no dimension that {lift.num_shards} divides"
        )
    if settings.model_table:
        _say_model(job, state, settings.model_table)
    say(f"workdir {path}")


def _say_model(job: Job, state: TrainState, depth: int) -> None:
    example = job.stream.shapes(1)["x"]
    x = jax.ShapeDtypeStruct(example.shape[1:], example.dtype)
    try:
        say(draw_table(model_rows(job.task, state, x, depth)))
    except Exception as error:  # a model may not take one example alone; it trains all the same
        warn(f"no table of the model: {type(error).__name__}: {text_of(error)}")


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
    """Prints the metrics of an evaluation; `stop` is the step at which the run stops."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    say(f"step {step}/{stop}  {shown}")


def say_nothing_to_do(
    settings: Settings, job: Job, path: PathLike[str], step: int, early: str = ""
) -> None:
    """Prints that the run in the folder is complete.

    Args:
        settings: the checked config.
        job: what is trained.
        path: the run's folder.
        step: of its state.
        early: the reason of an early stop; empty without one.
    """
    if early and step < job.stop:
        say(f"nothing to do: stopped early at step {step} of {job.num_steps}: {early}")
    else:
        say(f"nothing to do: the run is at step {step}, and the config stops it at {job.stop}")
    say(f"to train further: {_how_to_train_further(settings, job, path, step, early)}")


def say_end(
    settings: Settings,
    job: Job,
    workdir: Workdir,
    saver: Saver,
    goodput: Goodput,
    step: int,
    early: str = "",
) -> None:
    """Prints the result of the run, where it is, and how to train further.

    Args:
        settings: the checked config.
        job: what was trained.
        workdir: the run's folder.
        saver: knows the best state.
        goodput: knows where the time of all starts went.
        step: the last step.
        early: the reason of an early stop; empty without one.
    """
    if early and step < job.stop:
        say(f"stopped early at step {step} of {job.num_steps}: {early}")
    elif step < job.num_steps:
        say(f"stopped at step {step} of {job.num_steps} (config.stop_at_step)")
    else:
        say(f"finished: {_steps(step)} in {duration(sum(goodput.seconds().values()))}")
    starts = f", of {goodput.starts} starts" if goodput.starts > 1 else ""
    say(f"time{starts}: {describe_shares(goodput)}")
    if saver.best_value is not None:
        say(
            f"best {settings.best_metric} {saver.best_value:.4g} at step {saver.best_step}, in "
            f"{workdir.best}"
        )
    say(f"last checkpoint: {workdir.checkpoints / str(step)}")
    say(f"to train further: {_how_to_train_further(settings, job, workdir.path, step, early)}")
    say(f"curves: tensorboard --logdir {shlex.quote(str(workdir.path))}")


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"


def _how_to_train_further(
    settings: Settings, job: Job, path: PathLike[str], step: int, early: str
) -> str:
    if early and step < job.stop:
        change = f"and --config.early_stop.patience={2 * (settings.early_stop_patience or 1)}"
    elif step < job.num_steps:
        change = "without config.stop_at_step"
    elif settings.num_steps is not None:
        change = f"and --config.num_steps={2 * step}"
    else:
        epochs = 2 * -(-step // job.stream.steps_per_epoch)
        change = f"and --config.num_epochs={epochs}"
    workdir = shlex.quote(f"--workdir={path}")
    return f"the same command with {workdir} {change}"
