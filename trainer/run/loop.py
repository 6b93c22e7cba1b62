"""The loop of a run: data, dispatch, and the actions that are due after a call of the step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, suppress
from typing import Any

import jax
import numpy as np
from etils import epath

from trainer.checkpoints.init_from import initialise_from
from trainer.checkpoints.restorer import Restored
from trainer.checkpoints.saver import Saver
from trainer.config.settings import Settings
from trainer.console import say
from trainer.data.prefetch import depth_for, prefetch
from trainer.errors import NonFiniteLoss, PeerFailed, Preempted, SavesFailed
from trainer.inference.evaluate import Evaluator
from trainer.lift.call import Call, calls
from trainer.lift.lift import Lift
from trainer.lift.replicas import check_replicas
from trainer.lift.same_data import agree_on_data
from trainer.lift.update import lift_update_step
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.messages import (
    say_end,
    say_nothing_to_do,
    say_start,
    warn_of_changes,
    warn_of_narrow_state,
    warn_of_unsynced_state,
)
from trainer.metrics_writer.run_log import RunLog
from trainer.metrics_writer.step_metrics import StepMetrics
from trainer.metrics_writer.throughput import Throughput
from trainer.metrics_writer.train_log import TrainLog
from trainer.metrics_writer.writer import evaluation_at
from trainer.run import actions
from trainer.run.actions import StopRequested
from trainer.run.early_stop import EarlyStop
from trainer.run.ownership import Ownership
from trainer.run.profiling import Profile, Profiler, annotated
from trainer.run.rescue import rescuing
from trainer.run.result import Result
from trainer.run.training_labels import TrainingLabels
from trainer.state.train_state import TrainState
from trainer.step.job import Job, make_init
from trainer.step.update import metric_names
from trainer.summaries.held_out import make_held_out_summaries
from trainer.summaries.histograms import HistogramSummary
from trainer.summaries.stragglers import Stragglers
from trainer.workdir.workdir import Workdir

# How long the other processes give process 0 to save, after a loss that is not finite.
_PATIENCE_SECS = 60.0


class Run:
    """One call of `trainer.train`, which describes the arguments.

    The order of every round of the loop: data, dispatch, metrics of older calls, then the actions
    that are due, each on the state of exactly the step it is reported under.
    """

    def __init__(
        self,
        settings: Settings,
        workdir: Workdir,
        lift: Lift,
        job: Job,
        stop_requested: StopRequested,
        local_dir: str | None,
        profile: Profile | str | None,
    ) -> None:
        self.settings, self.workdir, self.lift, self.job = settings, workdir, lift, job
        self.stop_requested = stop_requested
        self.ownership = Ownership(workdir, lift, local_dir)
        self.saver = Saver(workdir, settings, lift)
        self.goodput = Goodput(time.monotonic)
        self.early_stop = EarlyStop.of(settings)
        self.prefetch_depth = depth_for(settings.prefetch, lift.platform)
        self.scan = settings.steps_per_call > 1
        self.step = 0  # before the call in progress
        self.labels = TrainingLabels(job, lift)
        self.run_log = RunLog(
            workdir,
            self.goodput,
            writes=lift.writes,
            stop=job.stop,
            global_batch_size=settings.global_batch_size,
            num_devices=lift.mesh.size,
            metrics=list(job.task.metrics),
        )
        self.log = TrainLog(
            metric_names(job.task, job.recipe),
            steps_per_epoch=job.stream.steps_per_epoch,
            clock=time.monotonic,
            on_epoch=self.run_log.epoch,
            on_row=lambda row: self.run_log.row(row, self.log.skipped),
            skip_limit=settings.nan_limit if settings.nan == "skip" else 0,
        )
        self.metrics = StepMetrics(self.log, self.goodput, self._read, self._on_non_finite)
        self.profiler = Profiler(
            profile,
            workdir,
            lift.process,
            per_call=settings.steps_per_call,
            stop=job.stop,
            metrics=self.metrics,
        )
        self.checkpoint = actions.Checkpoint(
            self.saver,
            self.metrics,
            self.run_log,
            self._meta,
            stop_requested,
            settings.checkpoint_every_steps,
        )
        self.evaluate = self._make_evaluate()
        self.actions = self._list_actions()

    def _make_evaluate(self) -> actions.Evaluate | None:
        settings, job, lift = self.settings, self.job, self.lift
        summaries = make_held_out_summaries(
            settings, job, lift, self.workdir, self.run_log, self.goodput, self.stop_requested
        )
        if job.held_out is None:
            return None
        batch_size = settings.eval_batch_size or settings.global_batch_size
        return actions.Evaluate(
            Evaluator(job.task, job.held_out, lift, batch_size, self.prefetch_depth),
            self.metrics,
            self.run_log,
            self.saver,
            self.early_stop,
            self.stop_requested,
            every_steps=settings.eval_every_steps or job.stream.steps_per_epoch,
            summaries=summaries,
        )

    def _list_actions(self) -> list[actions.Action]:
        """What is done after a call of the step when it is due, in this order."""
        settings, lift = self.settings, self.lift
        listed: list[actions.Action | None] = [
            self.profiler,
            actions.LogRow(self.metrics, lift, settings.log_every_steps),
            Stragglers.of(settings, lift, self.metrics, self.run_log),
            HistogramSummary.of(
                settings, self.job, lift, self.metrics, self.run_log, self.stop_requested
            ),
            self.evaluate,
            self.checkpoint,
            actions.CheckReplicas(lift, settings.replica_check_every_steps, self.checkpoint),
            actions.CheckSaves(self.saver),
            actions.CheckFolder(self.ownership),
            actions.InMemoryCheckpoint(self.saver, self.metrics, self._meta),
        ]
        return [action for action in listed if action is not None]

    # The main path

    def train(self) -> Result:
        """Trains from the newest state to the last step."""
        state = self._start()
        step = int(self.lift.read(state.step))
        if step >= self.job.stop or self.early_stop.reason:
            with self._rescuing(step, state):
                return self._finish_at_once(step, state)
        if self.workdir.exists:
            self.ownership.record(self.saver.run)
        warn_of_unsynced_state(self.lift, self.job, state)
        warn_of_narrow_state(state)
        self.goodput.begin_steps()
        update = lift_update_step(self.settings, self.job, self.lift, state)
        began = time.monotonic()
        with closing(self._batches(step)) as batches:
            for call, batch, check_labels in batches:
                phase = "compile" if call.is_first else "train"
                if self.stop_requested(call.before, phase):
                    with self._rescuing(call.before, state):
                        self._save_and_stop(call.before, state)
                self.step = call.before
                kind = "compile" if call.is_first else "step"
                with self.goodput.spending(kind), annotated(call.before):
                    state, values = update(state, batch)
                    if call.is_first:
                        jax.block_until_ready(state)
                check_labels()
                self.metrics.add(call, values)
                if call.is_first:
                    self._begin(call, state, time.monotonic() - began)
                self.run_log.progress(call.step)
                with self._rescuing(call.step, state):
                    for action in self.actions:
                        if action.due(call):
                            action.run(call, state)
                step = call.step
                if self.early_stop.reason:
                    break
        if step < self.job.stop and not self.early_stop.reason:
            raise RuntimeError(f"the batches ended after step {step} of {self.job.stop}")
        with self._rescuing(step, state):
            if self._evaluation_pending:
                self._save_and_stop(step, state)
            return self._finish(step, state)

    def close(self) -> None:
        """Releases everything, also after a failure, whose cause it never hides."""
        self.profiler.close(self.step)
        with suppress(Exception):
            self.saver.close()
        self.run_log.close()
        self.ownership.close()

    # Before the first step

    def _start(self) -> TrainState:
        """The state to train on: restored, or new."""
        began = time.monotonic()
        self.stop_requested(0, "start")
        self.ownership.agree()
        sources = {"train": self.job.stream.source, "eval": self.job.held_out}
        self.saver.data = agree_on_data(self.lift, sources)
        if self.workdir.exists:
            self.saver.run, self.saver.identity = self.ownership.claim()
        state = self._restore_or_initialise()
        step = int(self.lift.read(state.step))
        seconds = time.monotonic() - began
        say_start(self.settings, self.job, self.lift, self.workdir.path, state, seconds)
        if self._evaluation_pending and self.evaluate is not None:
            self.run_log.open(step)
            self.evaluate.evaluate(step, state)
        return state

    def _restore_or_initialise(self) -> TrainState:
        init = make_init(self.job, self.settings.seed)
        if self.workdir.exists:
            changed = bool(self.workdir.changes)
            restored = self.saver.restore(jax.eval_shape(init), init, has_changed=changed)
            changed |= restored is not None and bool(restored.other_data)
            if restored is None or not restored.in_memory or changed:
                # In-memory checkpoints on any host are of steps that this start takes anew.
                self.saver.run = self.ownership.new_run_id()
            if restored is not None:
                self._resume(restored)
                return restored.state
            self.run_log.resume(0)
            say(f"{self.workdir.path} holds no checkpoint yet: starting at step 0")
        state = self.lift.make_state(init)
        if self.settings.init_from:
            return initialise_from(self.settings, self.lift, state)
        return state

    def _resume(self, restored: Restored) -> None:
        """Takes up what was saved beside the state."""
        meta = restored.meta
        # A test set that is another one now says nothing about these counts.
        has_other_examples = self.saver.has_other_examples(meta)
        steps_per_epoch = self.job.stream.steps_per_epoch
        self.log.from_json(meta["log"])
        if meta.get("steps_per_epoch", steps_per_epoch) != steps_per_epoch:
            self.log.begin_epoch(restored.step)
        self.run_log.resume(restored.step, meta)
        self.goodput.resume(meta.get("goodput"))
        self.early_stop.from_json(None if has_other_examples else meta.get("early_stop"))
        if meta["evaluation_pending"] and self.evaluate is not None:
            row = None
            if not has_other_examples:
                row = evaluation_at(self.workdir, restored.step)
            done = json.loads(self.lift.broadcast_text(json.dumps(row)))
            self.evaluate.pending = done is None
            if done is not None:  # by an attempt that ended before it saved again
                self.early_stop.add(restored.step, done)
        warn_of_changes(self.job, self.workdir.changes, meta["num_steps"])

    def _begin(self, call: Call, state: TrainState, seconds: float) -> None:
        """Opens the run's files once its first call has succeeded."""
        check_replicas(self.lift, state)
        say(f"first {'call' if self.scan else 'step'} done, compiled in {seconds:.2f} s")
        self._claim_new_folder()
        self.run_log.open(call.before)
        if self.lift.writes:
            throughput = Throughput(self.settings, self.job, self.lift, state)
            self.run_log.start_view(call.step, self.log.newest, throughput)
        self.metrics.drain()

    def _claim_new_folder(self) -> None:
        if self.ownership.is_new:
            self.saver.run, self.saver.identity = self.ownership.claim()
            self.ownership.record(self.saver.run)

    def _rescuing(self, step: int, state: TrainState) -> AbstractContextManager[None]:
        def save() -> epath.Path:
            self.metrics.drain()
            return self.saver.rescue(step, state, self._meta())

        return rescuing(self.ownership, step, save)

    # In the loop

    def _batches(self, first: int) -> Generator[tuple[Call, Any, Callable[[], None]]]:
        """Each call from step `first` on, its batch on the devices, and a check of its labels."""
        rows = self.lift.rows(self.settings.global_batch_size)
        stream = self.job.stream

        def make(call: Call) -> tuple[Call, Any, Callable[[], None]]:
            if self.scan:
                batch = stream.batches_at(call.before, call.steps, rows)
            else:
                batch = stream.batch_at(call.before, rows)
            check_labels = self.labels.check_after(call, batch)
            return call, self.lift.put_batch(batch, scan=self.scan), check_labels

        to_make = calls(first, self.job.stop, self.settings.steps_per_call)
        with closing(prefetch(make, to_make, self.prefetch_depth)) as made:
            self.profiler.before(first)
            for call, batch, check_labels in self.goodput.waiting(made):
                yield call, batch, check_labels
                self.profiler.before(call.step)
                self.stop_requested(call.step, "wait")

    def _read(self, values: Any) -> np.ndarray:
        # Draining waits for up to 16 calls in turn, and each of them is progress.
        self.stop_requested(self.step, "wait")
        return np.atleast_2d(self.lift.read(values))

    def _on_non_finite(self, error: NonFiniteLoss) -> None:
        self.run_log.non_finite(error)
        self.labels.blame(error)  # first: another process may not wait for a disk
        self.saver.close()  # completes the save in progress: its state is good
        error.last_good = self.saver.last_good
        # The first failure ends the job, and process 0 still saves.
        time.sleep(self.labels.patience(error) if self.lift.writes else _PATIENCE_SECS)

    def _meta(self) -> dict[str, Any]:
        """What a resume needs beside the state."""
        return {
            "log": self.log.to_json(),
            "num_steps": self.job.num_steps,
            "steps_per_epoch": self.job.stream.steps_per_epoch,
            "goodput": self.goodput.to_json(),
            "evaluation_pending": self._evaluation_pending,
            "early_stop": self.early_stop.to_json(),
            **self.run_log.for_checkpoint(self.saver.last_saved),
        }

    @property
    def _evaluation_pending(self) -> bool:
        return self.evaluate is not None and self.evaluate.pending

    # After the last step

    def _finish(self, step: int, state: TrainState) -> Result:
        self.checkpoint.save(step, state)
        self.stop_requested(step, "save")
        with self.goodput.spending("save"):
            self.saver.finish()
        self.run_log.finish(step)
        self._check_rows(step)  # also because the job takes a process that leaves early for lost
        reason = self.early_stop.reason
        say_end(self.settings, self.job, self.workdir, self.saver, self.goodput, step, reason)
        self.profiler.say_end()
        return Result(state, self.run_log.metrics)

    def _finish_at_once(self, step: int, state: TrainState) -> Result:
        """The restored state is that of the last step."""
        if self._evaluation_pending:
            self._save_and_stop(step, state)
        if self.saver.is_unsaved(step):  # the state was only in memory
            self.ownership.record(self.saver.run)
            self.checkpoint.save(step, state)
        self.saver.finish()
        self._check_rows(step)
        say_nothing_to_do(self.settings, self.job, self.workdir.path, step, self.early_stop.reason)
        return Result(state, self.run_log.metrics)

    def _check_rows(self, step: int) -> None:
        """Raises unless every row is written: a run is not done without its metrics."""
        is_complete = self.run_log.complete(step)
        if not all(self.lift.gather(int(is_complete))):
            if is_complete:
                raise PeerFailed("process 0 could not write metrics.jsonl")
            raise SavesFailed(
                f"{self.workdir.metrics} lacks rows that could not be written; they are in the "
                f"checkpoint of step {step}, and the same command writes them"
            )

    def _save_and_stop(self, step: int, state: TrainState) -> None:
        say(f"asked to stop: saving at step {step}")
        self._claim_new_folder()
        self.profiler.close(step)
        self.checkpoint.save(step, state)
        self.run_log.close()
        self.saver.finish()
        raise Preempted(step)
