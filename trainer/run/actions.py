"""What a run does after a call of the step, when it is due.

`trainer.run.train` holds the list, in order. To add an action, write a class with `due` and `run`
and add it there. All processes run the same actions at the same calls, so `due` must depend only
on what is equal in all of them: the call and the config. (`InMemoryCheckpoint` is the exception:
it has no collective.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from trainer.checkpoints.saver import Saver
from trainer.inference.evaluate import Evaluator
from trainer.lift.call import Call
from trainer.lift.lift import Lift
from trainer.lift.replicas import check_replicas, check_usable
from trainer.metrics_writer.run_log import RunLog
from trainer.metrics_writer.step_metrics import StepMetrics
from trainer.run.early_stop import EarlyStop
from trainer.run.ownership import Ownership
from trainer.state.train_state import TrainState

StopRequested = Callable[[int, str], bool]


class Action(Protocol):
    """Something a run does after some calls of the step."""

    def due(self, call: Call) -> bool:
        """Whether it runs after this call. Has no effect of its own."""

    def run(self, call: Call, state: TrainState) -> None:
        """Does it.

        Args:
            call: the call that was dispatched last.
            state: after it; the next call donates its memory.
        """


class LogRow:
    """Reports the mean metrics of the steps since the last row, of a state that is finite."""

    def __init__(self, metrics: StepMetrics, lift: Lift, every_steps: int | None) -> None:
        self._lift = lift
        self._metrics = metrics
        self._every_steps = every_steps

    def due(self, call: Call) -> bool:
        """Every `log_every_steps` steps, and at the end."""
        return call.is_last or call.reaches(self._every_steps)

    def run(self, call: Call, state: TrainState) -> None:
        """Waits for the devices, so that a row's time is that of its own steps."""
        self._metrics.drain()
        # Loss and gradient can be finite without it: of frozen params, or where a `where` hides it.
        check_usable(self._lift, state, call.step)
        self._metrics.log.emit(call.step)


class Evaluate:
    """Evaluates the state on the held-out examples, and saves it if it is the best.

    Args:
        evaluator: of the held-out examples.
        metrics: of the steps; drained first.
        run_log: where the result goes.
        saver: of the best state.
        early_stop: counts evaluations without improvement.
        stop_requested: as for `trainer.train`.
        every_steps: how often.
        summaries: called with (step, state) after a complete evaluation.

    Attributes:
        pending: an evaluation was due when the run was asked to stop; a resume makes up for it.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        metrics: StepMetrics,
        run_log: RunLog,
        saver: Saver,
        early_stop: EarlyStop,
        stop_requested: StopRequested,
        *,
        every_steps: int,
        summaries: Sequence[Callable[[int, TrainState], None]] = (),
    ) -> None:
        self._evaluator = evaluator
        self._metrics = metrics
        self._run_log = run_log
        self._saver = saver
        self._early_stop = early_stop
        self._stop_requested = stop_requested
        self._every_steps = every_steps
        self._summaries = summaries
        self.pending = False

    def due(self, call: Call) -> bool:
        """Every `eval.every_steps` steps (an epoch where that is None), and at the end."""
        return call.is_last or call.reaches(self._every_steps)

    def run(self, call: Call, state: TrainState) -> None:
        """Evaluates after a call."""
        self.evaluate(call.step, state)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates the state of a step, unless asked to stop meanwhile: then it is `pending`."""
        self._metrics.drain()
        with self._metrics.excluding("evaluate"):
            found = self._evaluator(state, lambda: self._stop_requested(step, "evaluate"))
            self.pending = found is None
            if found is None:
                return
            self._run_log.evaluation(step, found)
            self._early_stop.add(step, found)
            with self._metrics.goodput.spending("save"):
                self._saver.save_if_best(step, state, found)
            self._run_log.flush()
            for summarise in self._summaries:
                summarise(step, state)


class Checkpoint:
    """Saves the state to disk, to resume from.

    Args:
        saver: writes it beside the training.
        metrics: drained first: a loss that is not finite is found before it is saved.
        run_log: flushed with it.
        meta: gives what a resume needs beside the state, as JSON.
        stop_requested: as for `trainer.train`.
        every_steps: how often; None: at the end only.
    """

    def __init__(
        self,
        saver: Saver,
        metrics: StepMetrics,
        run_log: RunLog,
        meta: Callable[[], Mapping[str, Any]],
        stop_requested: StopRequested,
        every_steps: int | None,
    ) -> None:
        self._saver = saver
        self._metrics = metrics
        self._run_log = run_log
        self._meta = meta
        self._stop_requested = stop_requested
        self._every_steps = every_steps

    def due(self, call: Call) -> bool:
        """Every `checkpoint.every_steps` steps."""
        return call.reaches(self._every_steps)

    def run(self, call: Call, state: TrainState) -> None:
        """Saves after a call."""
        self.save(call.step, state)

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save the state of a step, unless that step is saved already."""
        self._metrics.drain()
        self._stop_requested(step, "save")
        with self._metrics.excluding("save"):
            self._saver.save(step, state, self._meta())
            self._run_log.saved(step)


class CheckReplicas:
    """Checks that all devices hold the same state; a checkpoint does so anyway."""

    def __init__(self, lift: Lift, every_steps: int | None, checkpoint: Checkpoint) -> None:
        self._lift = lift
        self._every_steps = every_steps
        self._checkpoint = checkpoint

    def due(self, call: Call) -> bool:
        """Every `replica_check_every_steps` steps."""
        return call.reaches(self._every_steps) and not self._checkpoint.due(call)

    def run(self, call: Call, state: TrainState) -> None:
        """Raises ReplicasDiffer if they do not."""
        check_replicas(self._lift, state)


class CheckSaves:
    """Ends the run once too many saves in a row have failed. Costs nothing."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def due(self, call: Call) -> bool:
        """After every call."""
        return True

    def run(self, call: Call, state: TrainState) -> None:
        """Raises SavesFailed."""
        self._saver.check()


class CheckFolder:
    """Ends the run soon after its folder was renamed or removed. Looks at most once a second."""

    def __init__(self, ownership: Ownership) -> None:
        self._ownership = ownership

    def due(self, call: Call) -> bool:
        """After every call."""
        return True

    def run(self, call: Call, state: TrainState) -> None:
        """Raises FolderMoved, in the process that writes."""
        if self._ownership.identity is not None:
            self._ownership.identity.check_soon()


class InMemoryCheckpoint:
    """Copies the state into the host's memory. Each host decides for itself when.

    Args:
        saver: keeps the copies.
        metrics: drained first, as for a checkpoint.
        meta: gives what a resume needs beside the state, as JSON.
    """

    def __init__(
        self,
        saver: Saver,
        metrics: StepMetrics,
        meta: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._saver = saver
        self._metrics = metrics
        self._meta = meta

    def due(self, call: Call) -> bool:
        """Every `checkpoint.fast_every_secs` seconds."""
        return self._saver.in_memory_is_due

    def run(self, call: Call, state: TrainState) -> None:
        """Copies the state. Until the devices are done the time is that of steps."""
        self._metrics.drain()
        jax.block_until_ready(state)
        began = time.monotonic()
        meta = self._meta()
        with self._metrics.excluding("save"):
            self._saver.save_in_memory(call.step, state, meta, began)
