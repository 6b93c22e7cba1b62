"""From the metrics of finished steps to epoch losses and log rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import NonFiniteLoss

# XLA:CPU deadlocks with more than 32 computations in flight on several devices (jax 0.10), and a
# window of 16 was measured to cost nothing.
MAX_IN_FLIGHT = 16


class InFlight:
    """Calls that were dispatched and whose metrics have not been read.

    Reading a call's metrics waits for it, so holding at most `limit` bounds how far the host runs
    ahead of the devices without ever waiting for the newest call.
    """

    def __init__(self, read: Callable[[Any], np.ndarray], limit: int = MAX_IN_FLIGHT) -> None:
        self._read = read
        self._limit = limit
        self._calls: deque[tuple[Any, Any]] = deque()

    def push(self, key: Any, values: Any) -> list[tuple[Any, Any]]:
        """Adds a call; returns those that had to be read to keep within the limit."""
        self._calls.append((key, values))
        return self._pop(self._limit)

    def drain(self) -> list[tuple[Any, Any]]:
        """Reads all that is left."""
        return self._pop(0)

    def _pop(self, left: int) -> list[tuple[Any, Any]]:
        finished = []
        while len(self._calls) > left:
            key, values = self._calls.popleft()
            finished.append((key, self._read(values)))
        return finished


@dataclass(frozen=True)
class LogRow:
    """The mean of the metrics over the steps since the last row, and their speed.

    Attributes:
        step: steps taken at its end.
        values: by name, `learning_rate` being the last one.
        step_seconds: wall time a step, without evaluation and saving; NaN where none was timed.
    """

    step: int
    values: dict[str, float]
    step_seconds: float


class TrainLog:
    """Collects finished calls in order.

    Args:
        names: of the columns of the metrics.
        steps_per_epoch: steps an epoch.
        clock: seconds, monotonic.
        on_epoch: called with (epoch, counted from 1; mean loss over its steps).
        on_row: called with each row.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        steps_per_epoch: int,
        clock: Callable[[], float],
        on_epoch: Callable[[int, float], None],
        on_row: Callable[[LogRow], None],
    ) -> None:
        self._names = list(names)
        self._loss = self._names.index("loss")
        self._guarded = [self._loss, self._names.index("grad_norm")]
        self._steps_per_epoch = steps_per_epoch
        self._clock = clock
        self._epoch_sum = 0.0
        self._on_epoch = on_epoch
        self._on_row = on_row
        self._total = np.zeros(len(self._names))
        self._last = self._total
        self._steps = 0
        self._timed_steps = 0
        self._since: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The sums of the unfinished epoch and row, for a checkpoint."""
        return {"epoch": self._epoch_sum, "row": self._total.tolist(), "steps": self._steps}

    def from_json(self, saved: dict[str, Any]) -> None:
        """Goes on from what `to_json` gave."""
        self._epoch_sum, self._steps = saved["epoch"], saved["steps"]
        self._total = np.array(saved["row"])

    def add(self, first_step: int, rows: np.ndarray) -> None:
        """Takes the metrics of one finished call.

        Args:
            first_step: steps taken before the call.
            rows: shape (steps, metrics).

        Raises:
            NonFiniteLoss: at the first step whose loss or gradient norm is not finite.
        """
        steps = len(rows)
        finite = np.isfinite(rows[:, self._guarded]).all(axis=1)
        if not finite.all():
            bad = int(np.argmin(finite))
            raise NonFiniteLoss(
                first_step + bad + 1, dict(zip(self._names, rows[bad].tolist(), strict=True))
            )
        self._add_to_epochs(first_step, rows[:, self._loss])
        self._total = self._total + rows.sum(axis=0, dtype=np.float64)
        self._last = rows[-1]
        self._steps += steps
        if self._since is None:  # the first call compiles, so timing starts at its end
            self._since = self._clock()
        else:
            self._timed_steps += steps

    def _add_to_epochs(self, first_step: int, losses: np.ndarray) -> None:
        start = 0
        while start < len(losses):
            in_epoch = (first_step + start) % self._steps_per_epoch
            end = min(len(losses), start + self._steps_per_epoch - in_epoch)
            self._epoch_sum += float(losses[start:end].sum(dtype=np.float64))
            start = end
            if (first_step + end) % self._steps_per_epoch == 0:
                epoch = (first_step + end) // self._steps_per_epoch
                self._on_epoch(epoch, self._epoch_sum / self._steps_per_epoch)
                self._epoch_sum = 0.0

    def emit(self, step: int) -> None:
        """Hands over the row of the steps added since the last one, if there are any.

        Args:
            step: the last step added.
        """
        if not self._steps:
            return
        values = dict(zip(self._names, (self._total / self._steps).tolist(), strict=True))
        values["learning_rate"] = float(self._last[self._names.index("learning_rate")])
        now = self._clock()
        elapsed = now - self._since if self._since is not None else 0.0
        seconds = elapsed / self._timed_steps if self._timed_steps else float("nan")
        self._total = np.zeros(len(self._names))
        self._steps = self._timed_steps = 0
        self._since = now
        self._on_row(LogRow(step, values, seconds))

    def exclude(self, seconds: float) -> None:
        """Leaves time that was spent on something else than steps out of the speed."""
        if self._since is not None:
            self._since += seconds
