"""`train`: from a config and a folder to a trained state."""

from __future__ import annotations

import os

from jax.sharding import Mesh
from ml_collections import ConfigDict

from trainer.config.settings import check
from trainer.console import open_terminal
from trainer.errors import ReplicasDiffer
from trainer.lift.lift import make_lift
from trainer.run.actions import StopRequested
from trainer.run.loop import Run
from trainer.run.ownership import refuse_changes
from trainer.run.profiling import Profile
from trainer.run.result import Result
from trainer.step.job import build_job
from trainer.workdir.workdir import Workdir


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    stop_requested: StopRequested = lambda step, phase: False,
    local_dir: str | None = None,
    profile: Profile | str | None = None,
) -> Result:
    """Trains what `config` describes, resuming from the newest checkpoint in `workdir`.

    In a job of several processes (`jax.distributed.initialize`), all of them call this with the
    same arguments, and `workdir` is a folder that all of them see.

    Args:
        config: see `trainer.config.settings`; absent keys take their defaults.
        workdir: the run's folder; made if absent. Nothing is written before the first step is done.
        mesh: the devices, with the one axis "batch"; all devices where None.
        stop_requested: asked with the step and what comes next ("load", "start", "compile",
            "train", "evaluate" or "save"), at the same points in all processes. Once it returns
            True it must keep doing so; the state is saved and Preempted raised. Also called, at any
            time, with "wait" when this process is about to wait for data or devices: that answer is
            ignored.
        local_dir: where files that need a local folder go if `workdir` is remote.
        profile: which steps to trace, as "START:STEPS"; each process to which it is given writes
            its own trace into `workdir`.

    Raises:
        UserError: the config, its targets, the workdir or the profile cannot be used, or the data
            differ between processes or from those of the run.
        NonFiniteLoss: the loss is NaN or infinite.
        Preempted: asked to stop, and saved.
        CheckpointsUnreadable: the workdir holds checkpoints, and none is intact.
        ReplicasDiffer: devices disagree about the state.
        SavesFailed: too many saves in a row have failed.
        FolderMoved: the workdir was renamed or removed meanwhile; says where the state is.
        StorageFailed: files could not be read for minutes.
    """
    open_terminal()
    settings = check(config)
    folder = Workdir.check(workdir, settings.config)
    lift = make_lift(settings.lift, mesh, settings.state_sharding)
    lift.check_divides(settings.global_batch_size, settings.grad_accum_steps)
    stop_requested(0, "load")
    job = build_job(settings)
    stop_requested(0, "start")  # from here on, processes wait for each other
    if folder.refused:
        refuse_changes(settings, folder, job)
    run = Run(settings, folder, lift, job, stop_requested, local_dir, profile)
    try:
        return run.train()
    except ReplicasDiffer:
        run.saver.discard_in_memory()
        raise
    finally:
        run.close()
