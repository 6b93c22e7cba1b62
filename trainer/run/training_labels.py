"""The labels of training batches: which are checked, and whether they explain a loss of NaN."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from trainer.data.stream import HostBatch
from trainer.errors import NonFiniteLoss, UserError
from trainer.lift.call import Call
from trainer.lift.lift import Lift
from trainer.step.job import Job
from trainer.step.labels import LabelCheck

# A batch is checked whenever so many steps are taken, and the first one of a start.
_EVERY_STEPS = 100

# The first failure ends the job. A process notices a loss up to 16 calls after another.
_PATIENCE_SECS = 2.0


class TrainingLabels:
    """Checks the labels of a run's training batches against the classes of its model.

    Args:
        job: what is trained.
        lift: over which devices and processes.
    """

    def __init__(self, job: Job, lift: Lift) -> None:
        self._stream = job.stream
        self._lift = lift
        self._rows = lift.rows(job.stream.global_batch_size)
        rank = lift.process if lift.num_processes > 1 else None
        self._check = LabelCheck(job.task, "training", rank)

    def check_after(self, call: Call, batch: HostBatch) -> Callable[[], None]:
        """The check of a call's batch, to be made once its step is compiled, which shows classes.

        Args:
            call: the steps of the batch.
            batch: this process's rows, of one step or of several.
        """
        if not (call.is_first or call.reaches(_EVERY_STEPS)):
            return _nothing
        numbers = self._stream.indices_at(call.before, call.steps, self._rows)
        return functools.partial(self._check.check, batch, numbers)

    def blame(self, error: NonFiniteLoss) -> None:
        """Raises a UserError if a label that this process read for that step is no class.

        Nothing is communicated: the processes notice the loss after different steps.
        """
        if not self._may_explain(error):
            return
        step = error.step - 1
        try:
            batch = self._stream.batch_at(step, self._rows)
            found = self._check.explain(batch, self._stream.indices_at(step, 1, self._rows))
        except (Exception, SystemExit):  # a user's data may raise anything, and explain nothing
            return
        if found:
            raise UserError(
                f"the loss of step {error.step} is not finite: {found}", self._check.hint()
            ) from error

    def patience(self, error: NonFiniteLoss) -> float:
        """For how many seconds a process without such a label waits for one that may have it."""
        is_alone = self._lift.num_processes == 1
        return 0.0 if is_alone or not self._may_explain(error) else _PATIENCE_SECS

    def _may_explain(self, error: NonFiniteLoss) -> bool:
        return self._check.guards_loss and not math.isfinite(error.values["loss"])


def _nothing() -> None:
    pass
