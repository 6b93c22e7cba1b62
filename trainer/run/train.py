"""`train`: from a config and a folder to a trained state."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trainer.checkpoints.init_from import initialise_from
from trainer.checkpoints.restorer import Restored
from trainer.checkpoints.saver import Saver
from trainer.config.settings import Settings, check
from trainer.console import open_terminal, say
from trainer.data.prefetch import depth_for, prefetch
from trainer.errors import NonFiniteLoss, Preempted, ReplicasDiffer
from trainer.inference.evaluate import Evaluator
from trainer.lift.in_flight import InFlight
from trainer.lift.lift import Lift, make_lift
from trainer.lift.replicas import check_replicas
from trainer.lift.update import lift_update_step
from trainer.metrics_writer.messages import (
    About,
    say_finished_before,
    say_start,
    warn_of_changes,
    warn_of_unsynced_state,
)
from trainer.metrics_writer.run_log import RunLog
from trainer.metrics_writer.train_log import TrainLog, is_due
from trainer.metrics_writer.writer import evaluation_at
from trainer.run.early_stop import EarlyStop
from trainer.run.ownership import Ownership, refuse_changes
from trainer.run.profiling import Profile, Profiler, annotated
from trainer.state.train_state import TrainState
from trainer.step.job import Job, build_job, make_init
from trainer.step.update import metric_names
from trainer.summaries.summaries import Summaries
from trainer.workdir import lock
from trainer.workdir.workdir import Workdir

# For process 0 to save what it has, where all have found that the run is over.
_PATIENCE_SECS = 60.0

StopRequested = Callable[[int, str], bool]


class Result(NamedTuple):
    """What a run ends with.

    Attributes:
        state: the final state, on the devices.
        metrics: the last value of every tag that was reported, as `{"train/loss": ...}`.
    """

    state: TrainState
    metrics: dict[str, float]


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    mesh: Mesh | None = None,
    *,
    stop_requested: StopRequested = lambda step, phase: False,
    local_dir: str | None = None,
    profile: Profile | str | None = None,
) -> Result:
    """Trains what `config` describes, going on from the newest checkpoint in `workdir`.

    Where jax was told of several processes (`jax.distributed.initialize`), all of them call this
    with the same arguments, and `workdir` is a folder that all of them see.

    Args:
        config: see `trainer.config.settings`; keys it lacks take their defaults.
        workdir: the run's folder; made if absent. Nothing is written before the first step is done.
        mesh: the devices, with the one axis "batch"; all devices where None.
        stop_requested: asked with the step and what comes next ("start", "compile", "train",
            "evaluate" or "save"), at the same points in all processes. Once it says yes it must go
            on to do so; the state is saved and Preempted raised. Also told, at any time, that this
            process is about to "wait" for data or devices: then the answer does not count.
        local_dir: where what needs a local folder goes if `workdir` is remote.
        profile: which steps to trace, as "START:STEPS"; each process to which it is given writes
            its own trace into `workdir`.

    Raises:
        UserError: the config, its targets, the workdir or the profile are not as they should be.
        NonFiniteLoss: the loss is no longer a number.
        Preempted: asked to stop, and saved.
        CheckpointsUnreadable: the workdir has held checkpoints and none is whole.
        ReplicasDiffer: devices disagree about the state.
        SavesFailed: too many saves in a row have failed.
    """
    open_terminal()
    settings = check(config)
    folder = Workdir.check(workdir, settings.config)
    lift = make_lift(settings.lift, mesh, settings.state_sharding)
    lift.check_divides(settings.global_batch_size, settings.grad_accum_steps)
    job = build_job(settings)
    if folder.refused:
        refuse_changes(settings, folder, job)
    run = _Run(settings, folder, lift, job, stop_requested, local_dir, profile)
    try:
        return run.train()
    except ReplicasDiffer:
        run.saver.discard_in_memory()
        raise
    finally:
        run.close()


class _Run:
    """The moving parts of one call of `train`.

    `train` holds to this order for every call of the step: data, dispatch, metrics of older calls,
    then what is due (evaluate, save), each on the state of exactly the step it is reported under.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Workdir,
        lift: Lift,
        job: Job,
        stop_requested: StopRequested,
        local_dir: str | None,
        profile: Profile | str | None,
    ) -> None:
        self.shared = Ownership(folder, lift, local_dir)
        self.settings = settings
        self.folder = folder
        self.lift = lift
        self.job = job
        self.stop_requested = stop_requested
        self.about = About(settings, folder, lift, job)
        self.saver = Saver(folder, settings, lift)
        self.account = RunLog(self.about)
        self.goodput = self.account.goodput
        self.step = 0
        # An evaluation that was due when the run was asked to stop; a resume makes up for it.
        self.evaluation_pending = False
        self.early_stop = EarlyStop.of(settings)
        self.scan = settings.steps_per_call > 1
        self.eval_every_steps = settings.eval_every_steps or job.stream.steps_per_epoch
        self.prefetch_depth = depth_for(settings.prefetch, lift.platform)
        self.in_flight = InFlight(self._read_rows)
        self.log = TrainLog(
            metric_names(job.task, job.recipe),
            steps_per_epoch=job.stream.steps_per_epoch,
            clock=time.monotonic,
            on_epoch=self.account.epoch,
            on_row=lambda row: self.account.row(row, self.log.skipped),
            skip_limit=settings.nan_limit if settings.nan == "skip" else 0,
        )
        self.profiler = Profiler(
            profile,
            folder,
            lift.process,
            per_call=settings.steps_per_call,
            stop=job.stop,
            log=self.log,
            goodput=self.goodput,
            drain=self._drain,
        )
        self.summaries = Summaries(self.about, self.account, self.log, stop_requested)
        self.evaluator: Evaluator | None = None
        if job.held_out is not None:
            batch_size = settings.eval_batch_size or settings.global_batch_size
            self.evaluator = Evaluator(
                job.task, job.held_out, lift, batch_size, self.prefetch_depth
            )

    def train(self) -> Result:
        began = time.monotonic()
        self.stop_requested(0, "start")
        self.shared.agree()
        if self.folder.exists:
            self.saver.run = self.shared.claim()
        state = self._initial_state()
        step = first_step = int(self.lift.read(state.step))
        say_start(self.about, state, time.monotonic() - began)
        if self.folder.exists:
            self.account.read_metrics(step)
        if self.evaluation_pending and self.evaluator:
            self.account.open(step)
            self._evaluate(state, step)
        if step >= self.job.stop or self.early_stop.reason:
            if self.evaluation_pending:
                self._stop(step, state)
            if self.saver.is_unsaved(step):  # it was only in memory
                self.shared.record(self.saver.run)
                self._save(state, step)
            self.saver.finish()
            say_finished_before(self.about, step, self.early_stop.reason)
            return Result(state, self.account.metrics)
        if self.folder.exists:
            self.shared.record(self.saver.run)
        warn_of_unsynced_state(self.lift, self.job, state)
        self.goodput.begin_steps()
        update = lift_update_step(self.settings, self.job, self.lift, state)
        self.profiler.before(step)
        started = time.monotonic()
        with closing(self._batches(step)) as batches:
            for steps, batch in self.goodput.waiting(batches):
                if self.stop_requested(step, "compile" if step == first_step else "train"):
                    self._stop(step, state)
                before = self.step = step
                compiles = before == first_step
                with self.goodput.spending("compile" if compiles else "step"), annotated(before):
                    state, values = update(state, batch)
                    if compiles:
                        jax.block_until_ready(state)
                step += steps
                self._add(self.in_flight.push(before, values))
                if compiles:
                    self._after_first_call(state, before, step, time.monotonic() - started)
                self.profiler.after(step)
                last = step == self.job.stop
                if last or is_due(self.settings.log_every_steps, before, step):
                    self._drain()  # so that a row's time is that of its own steps
                    self.log.emit(step)
                    self.summaries.after_row(step)
                self.account.progress(step)
                self.summaries.after_call(before, step, state, self._drain)
                if self.evaluator and (last or is_due(self.eval_every_steps, before, step)):
                    self._evaluate(state, step)
                    if self.early_stop.reason:
                        break
                if is_due(self.settings.checkpoint_every_steps, before, step):
                    self._save(state, step)
                elif is_due(self.settings.replica_check_every_steps, before, step):
                    check_replicas(self.lift, state)
                self.saver.check()
                if self.saver.copy_is_due:
                    self._copy(state, step)
                self.profiler.before(step)
                self.stop_requested(step, "wait")
        if self.evaluation_pending:
            self._stop(step, state)
        self._save(state, step)
        self.stop_requested(step, "save")
        with self.goodput.spending("save"):
            self.saver.finish()
        self.account.finish(step)
        self.lift.gather(0)  # whoever leaves early would be taken for lost
        self.account.say_end(self.saver, step, self.early_stop.reason)
        self.profiler.say_end()
        return Result(state, self.account.metrics)

    def close(self) -> None:
        """Lets go of everything, also where the run has failed; never hides why it did."""
        self.profiler.close(self.step)
        with suppress(Exception):
            self.saver.close()
        self.account.close()
        lock.release(self.folder.path)

    def _begin_folder(self) -> None:
        """Makes a new folder this run's, once it is certain that there will be one."""
        if self.shared.is_new:
            self.saver.run = self.shared.claim()
            self.shared.record(self.saver.run)

    # Before the first step

    def _initial_state(self) -> TrainState:
        init = make_init(self.job, self.settings.seed)
        if self.folder.exists:
            restored = self.saver.restore(
                jax.eval_shape(init),
                init,
                has_changed=bool(self.folder.changes),
            )
            if restored is None or not restored.in_memory or self.folder.changes:
                # What is in the memory of some host is of a future that will not come.
                self.saver.run = self.shared.new_run_id()
            if restored is not None:
                self._go_on_from(restored)
                return restored.state
            say(f"{self.folder.path} holds no checkpoint yet: starting at step 0")
        state = self.lift.make_state(init)
        return (
            initialise_from(self.settings, self.lift, state) if self.settings.init_from else state
        )

    def _go_on_from(self, restored: Restored) -> None:
        meta = restored.meta
        self.log.from_json(meta["log"])
        self.account.go_on_from(meta)
        self.early_stop.from_json(meta.get("early_stop"))
        if meta["evaluation_pending"] and self.evaluator:
            found = json.dumps(evaluation_at(self.folder, restored.step))
            done = json.loads(self.lift.broadcast_text(found))
            self.evaluation_pending = done is None
            if done is not None:  # by an attempt that did not get to save again
                self.early_stop.add(restored.step, done)
        warn_of_changes(self.about, meta["num_steps"])

    def _batches(self, step: int) -> Generator[tuple[int, Any]]:
        """(steps in the call, batch on the devices) for each call from `step` to the stop."""
        stop, per_call = self.job.stop, self.settings.steps_per_call
        calls = ((s, min(per_call, stop - s)) for s in range(step, stop, per_call))
        rows = self.lift.rows(self.settings.global_batch_size)

        def make(call: tuple[int, int]) -> tuple[int, Any]:
            first, steps = call
            if self.scan:
                batch = self.job.stream.batches_at(first, steps, rows)
            else:
                batch = self.job.stream.batch_at(first, rows)
            return steps, self.lift.put_batch(batch, scan=self.scan)

        return prefetch(make, calls, self.prefetch_depth)

    def _after_first_call(self, state: TrainState, before: int, step: int, seconds: float) -> None:
        check_replicas(self.lift, state)
        say(f"first {'call' if self.scan else 'step'} done, compiled in {seconds:.2f} s")
        self._begin_folder()
        self.account.open(before)
        self.account.begin_steps(step, state, self.log.newest)
        self._drain()

    # In the loop

    def _read_rows(self, values: Any) -> np.ndarray:
        # Up to 16 calls are waited for at once, each of which is progress.
        self.stop_requested(self.step, "wait")
        return np.atleast_2d(self.lift.read(values))

    def _add(self, finished: list[tuple[int, np.ndarray]]) -> None:
        try:
            for first_step, rows in finished:
                self.log.add(first_step, rows)
        except NonFiniteLoss as error:
            self.account.not_finite(error)
            self.saver.close()  # what was being saved is good
            error.last_good = self.saver.last_good
            if not self.lift.writes:
                time.sleep(_PATIENCE_SECS)  # the job ends with the first that tells; 0 still saves
            raise

    def _drain(self) -> None:
        """Brings the log up to the newest step; waits for the devices."""
        self._add(self.in_flight.drain())

    def _evaluate(self, state: TrainState, step: int) -> None:
        assert self.evaluator is not None
        self._drain()
        began = time.monotonic()
        with self.goodput.spending("evaluate"):
            metrics = self.evaluator(state, lambda: self.stop_requested(step, "evaluate"))
        self.evaluation_pending = metrics is None
        if metrics is not None:
            self.account.evaluation(step, metrics)
            self.early_stop.add(step, metrics)
            self.saver.save_if_best(step, state, metrics)
            self.account.flush()
            self.summaries.after_evaluation(step, state)
        self.log.exclude(time.monotonic() - began)

    def _save(self, state: TrainState, step: int) -> None:
        self._drain()  # a loss that is not finite is found before it is saved
        self.stop_requested(step, "save")
        began = time.monotonic()
        with self.goodput.spending("save"):
            self.saver.save(step, state, self._meta())
        self.account.saved(step)
        self.log.exclude(time.monotonic() - began)

    def _copy(self, state: TrainState, step: int) -> None:
        self._drain()  # as for a save
        jax.block_until_ready(state)
        held_up = time.monotonic()  # until here the devices had steps to take
        meta = {**self._meta(), "rows": self.account.unwritten()}
        with self.goodput.spending("save"):
            self.saver.copy(step, state, meta, held_up)
        self.log.exclude(time.monotonic() - held_up)  # the steps before it were steps

    def _meta(self) -> dict[str, Any]:
        """What a resume needs beside the state."""
        return {
            "log": self.log.to_json(),
            "num_steps": self.job.num_steps,
            "goodput": self.goodput.to_json(),
            "evaluation_pending": self.evaluation_pending,
            "early_stop": self.early_stop.to_json(),
        }

    def _stop(self, step: int, state: TrainState) -> None:
        say(f"asked to stop: saving at step {step}")
        self._begin_folder()
        self.profiler.close(step)
        self._save(state, step)
        self.account.close()
        self.saver.finish()
        raise Preempted(step)
