"""Epoch losses and rows of metrics, from the metrics of finished steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.errors import NonFiniteLoss


@dataclass(frozen=True)
class LogRow:
    """The mean of the metrics over the steps since the last row, and their speed.

    Attributes:
        step: steps taken at its end.
        values: means by name; `learning_rate` is that of the last step.
        step_seconds: wall time a step, without evaluations and saves; NaN if no step was timed.
    """

    step: int
    values: dict[str, float]
    step_seconds: float


class TrainLog:
    """Collects the metrics of finished calls, in order.

    Args:
        names: of the columns of the metrics.
        steps_per_epoch: steps an epoch.
        clock: seconds, monotonic.
        on_epoch: called with (epoch, counted from 1; mean loss over its steps).
        on_row: called with each row.
        skip_limit: how many steps may be skipped because they are not finite.

    Attributes:
        skipped: how many steps were skipped.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        steps_per_epoch: int,
        clock: Callable[[], float],
        on_epoch: Callable[[int, float], None],
        on_row: Callable[[LogRow], None],
        skip_limit: int = 0,
    ) -> None:
        self._names = list(names)
        self._loss = self._names.index("loss")
        self._guarded = [self._loss, self._names.index("grad_norm")]
        self._steps_per_epoch = steps_per_epoch
        self._clock = clock
        self._epoch_sum = 0.0
        self._epoch_skipped = 0
        self._skip_limit = skip_limit
        self.skipped = 0
        self._on_epoch = on_epoch
        self._on_row = on_row
        self._total = np.zeros(len(self._names))
        self._last = self._total
        self._steps = 0
        self._timed_steps = 0
        self._since: float | None = None
        self._paused_at: float | None = None
        self._lost = 0.0

    def to_json(self) -> dict[str, Any]:
        """The sums of the unfinished epoch and row, for a checkpoint."""
        return {
            "epoch": self._epoch_sum,
            "epoch_skipped": self._epoch_skipped,
            "row": self._total.tolist(),
            "steps": self._steps,
            "skipped": self.skipped,
        }

    def from_json(self, saved: dict[str, Any]) -> None:
        """Restores what `to_json` gave."""
        self._epoch_sum = saved["epoch"]
        self._epoch_skipped, self.skipped = saved["epoch_skipped"], saved["skipped"]
        if len(saved["row"]) == len(self._names):  # else the config has other metrics now
            self._total, self._steps = np.array(saved["row"]), saved["steps"]

    def begin_epoch(self, step: int) -> None:
        """Leaves the steps so far out of the mean over the current epoch, which is another now.

        Args:
            step: how many steps were taken.
        """
        self._epoch_sum, self._epoch_skipped = 0.0, step % self._steps_per_epoch

    def add(self, first_step: int, rows: np.ndarray) -> None:
        """Adds the metrics of one finished call.

        Args:
            first_step: steps taken before the call.
            rows: shape (steps, metrics).

        Raises:
            NonFiniteLoss: more steps than `skip_limit` have a loss or gradient norm that is not
                finite.
        """
        finite = np.isfinite(rows[:, self._guarded]).all(axis=1)
        for bad in np.flatnonzero(~finite):
            self.skipped += 1
            if self.skipped > self._skip_limit:
                values = dict(zip(self._names, rows[bad].tolist(), strict=True))
                raise NonFiniteLoss(first_step + int(bad) + 1, values, self.skipped - 1)
        self._add_to_epochs(first_step, rows[:, self._loss], finite)
        good = rows[finite]
        self._total = self._total + good.sum(axis=0, dtype=np.float64)
        if len(good):
            self._last = good[-1]
        self._steps += len(good)
        if self._since is None:  # timing starts after the first call, which compiles
            self._since = self._now()
        elif self._paused_at is None:
            self._timed_steps += len(rows)

    def _add_to_epochs(self, first_step: int, losses: np.ndarray, finite: np.ndarray) -> None:
        start = 0
        while start < len(losses):
            in_epoch = (first_step + start) % self._steps_per_epoch
            end = min(len(losses), start + self._steps_per_epoch - in_epoch)
            good = losses[start:end][finite[start:end]]
            self._epoch_sum += float(good.sum(dtype=np.float64))
            self._epoch_skipped += end - start - len(good)
            start = end
            if (first_step + end) % self._steps_per_epoch == 0:
                epoch = (first_step + end) // self._steps_per_epoch
                taken = self._steps_per_epoch - self._epoch_skipped
                self._on_epoch(epoch, self._epoch_sum / taken if taken else float("nan"))
                self._epoch_sum, self._epoch_skipped = 0.0, 0

    def newest(self) -> dict[str, float]:
        """The metrics of the newest step, by name; empty before the first."""
        if self._since is None:
            return {}
        return dict(zip(self._names, self._last.tolist(), strict=True))

    def emit(self, step: int) -> None:
        """Reports the row of the steps since the last row, if there are any.

        Args:
            step: the last step added.
        """
        if not self._steps:
            return
        values = dict(zip(self._names, (self._total / self._steps).tolist(), strict=True))
        values["learning_rate"] = float(self._last[self._names.index("learning_rate")])
        elapsed = self._now() - self._since if self._since is not None else 0.0
        seconds = elapsed / self._timed_steps if self._timed_steps else float("nan")
        self._total = np.zeros(len(self._names))
        self._steps = self._timed_steps = 0
        self._on_row(LogRow(step, values, seconds))
        self._since = self._now()  # opening files for the first row is not part of the next

    def exclude(self, seconds: float) -> None:
        """Excludes time that was not spent on steps from the speed."""
        if self._since is not None and self._paused_at is None:
            self._since += seconds

    def pause(self) -> None:
        """Stops the clock: time and steps until `resume` are not part of the speed.

        Call both with all steps so far added.
        """
        self._paused_at = self._clock()

    def resume(self) -> None:
        """Starts the clock again."""
        if self._paused_at is not None:
            self._lost += self._clock() - self._paused_at
        self._paused_at = None

    def _now(self) -> float:
        return (self._clock() if self._paused_at is None else self._paused_at) - self._lost
