"""The log of one run: its lines, its rows in `metrics.jsonl` and TensorBoard, and its live view."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.console import say
from trainer.errors import NonFiniteLoss
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.live_view import LiveView
from trainer.metrics_writer.messages import say_evaluation, say_row
from trainer.metrics_writer.restored_rows import restore_rows
from trainer.metrics_writer.tensorboard import TensorBoardWriter
from trainer.metrics_writer.throughput import Throughput
from trainer.metrics_writer.train_log import LogRow
from trainer.metrics_writer.writer import MetricsWriter, NullWriter, last_values
from trainer.workdir.patience import patiently
from trainer.workdir.workdir import Workdir

# Seconds before each further try to write the last rows of a run.
_PAUSES = (0.5, 1.0, 2.0)


class RunLog:
    """Everything a run reports. One process writes it; in the others only lines are printed.

    Files are opened by `open`, once the run is certain to take a step.

    Args:
        workdir: the run's folder.
        goodput: where the time goes.
        writes: whether this process writes the files.
        stop: the step at which the run stops.
        global_batch_size: examples a step.
        num_devices: of the run.
        metrics: the names of the config's own metrics.

    Attributes:
        metrics: the last value of every tag.
    """

    def __init__(
        self,
        workdir: Workdir,
        goodput: Goodput,
        *,
        writes: bool,
        stop: int,
        global_batch_size: int,
        num_devices: int,
        metrics: Sequence[str],
    ) -> None:
        self._workdir = workdir
        self._goodput = goodput
        self._writes = writes
        self._stop = stop
        self._global_batch_size = global_batch_size
        self._num_devices = num_devices
        self._names = metrics
        self._writer: MetricsWriter | NullWriter | None = None
        self._view: LiveView | None = None
        self._throughput: Throughput | None = None
        self._restored_lines: Sequence[str] = ()
        self._is_restored = True
        self.metrics: dict[str, float] = {}

    @property
    def tensorboard(self) -> TensorBoardWriter | None:
        """For what goes to TensorBoard alone; None where this process does not write."""
        return self._writer.tensorboard if self._writer is not None else None

    def resume(self, step: int, meta: Mapping[str, Any] | None = None) -> None:
        """Reads the metrics that earlier starts reported, and restores those that are gone.

        Args:
            step: the restored step.
            meta: what the checkpoint has of `for_checkpoint`; None if there is no checkpoint.
        """
        if meta is not None:
            rows = meta.get("rows", [])  # of an earlier version they are dicts
            self._restored_lines = [
                (r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows
            ]
            if self._writes:
                path, identity = self._workdir.metrics, meta.get("metrics_file")
                self._is_restored = patiently(
                    path, lambda: restore_rows(path, step, self._restored_lines, identity)
                )
        self.metrics = last_values(self._workdir, step)

    def open(self, step: int) -> None:
        """Opens the files unless they are open, and drops what they hold past `step`."""
        if self._writer is None:
            lines = self._restored_lines
            self._writer = (
                MetricsWriter(self._workdir, step, lines) if self._writes else NullWriter()
            )

    def start_view(
        self, step: int, newest: Callable[[], Mapping[str, float]], throughput: Throughput
    ) -> None:
        """Starts the live view, where stdout is a terminal.

        Args:
            step: steps taken so far.
            newest: gives the metrics of the newest finished step.
            throughput: turns seconds a step into examples/s, MFU and memory.
        """
        self._throughput = throughput
        self._view = LiveView(step, self._stop, self._num_devices, newest, self._goodput)
        self._view.start()

    def progress(self, step: int) -> None:
        """Notes how many steps are dispatched."""
        if self._view is not None:
            self._view.step = step

    def epoch(self, epoch: int, loss: float) -> None:
        """Reports the end of an epoch; `loss` is the mean over its steps."""
        say(f"Loss for epoch {epoch}: {loss:.6g}")

    def row(self, row: LogRow, skipped: int) -> None:
        """Reports a row of training metrics; `skipped` counts the steps that were not finite."""
        tags = {f"train/{name}": value for name, value in row.values.items()}
        if row.step_seconds > 0:
            rate = self._global_batch_size / row.step_seconds
            tags |= {"train/examples_per_second": rate, "train/step_seconds": row.step_seconds}
        if skipped:
            tags["train/skipped"] = skipped
        speed: dict[str, float] = {}
        if self._throughput is not None and row.step_seconds > 0:
            speed = self._throughput.tags(row.step_seconds)
        say_row(
            row,
            tags | speed,
            stop=self._stop,
            metrics=self._names,
            num_devices=self._num_devices,
        )
        self._write(row.step, tags)
        if speed:
            assert self._writer is not None
            self._writer.tensorboard_only(row.step, speed)
        if speed and self._view is not None:
            self._view.speed = tags | speed

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports the metrics of an evaluation, by tag."""
        say_evaluation(step, self._stop, metrics)
        if self._view is not None:
            self._view.evaluation = metrics
        self._write(step, metrics)

    def non_finite(self, error: NonFiniteLoss) -> None:
        """Writes the metrics of the step that ends the run."""
        if self._writer is not None:
            tags = {f"train/{name}": value for name, value in error.values.items()}
            self._writer.scalars(error.step, tags)

    def saved(self, step: int) -> None:
        """Notes a checkpoint, and flushes the rows up to it."""
        if self._view is not None:
            self._view.saved = (step, time.monotonic())
        if self._writer is not None:
            self._writer.goodput(step, self._goodput.seconds())
            self._writer.flush()

    def flush(self) -> None:
        """Flushes all files."""
        if self._writer is not None:
            self._writer.flush()

    def for_checkpoint(self, saved: int | None) -> dict[str, Any]:
        """What a checkpoint keeps of `metrics.jsonl`; see `MetricsWriter.for_checkpoint`."""
        if self._writer is None:  # as the restored checkpoint has it
            return {"rows": [line.rstrip() for line in self._restored_lines]}
        return self._writer.for_checkpoint(saved)

    def complete(self, step: int) -> bool:
        """Whether `metrics.jsonl` holds every row; waits some seconds for a disk that does not.

        A file that was removed, emptied or changed during the run is restored.

        Args:
            step: the last step; its checkpoint is saved.
        """
        if self._writer is None and self._is_restored:
            return True
        self.open(step)
        assert self._writer is not None
        for pause in (0.0, *_PAUSES):
            time.sleep(pause)
            if self._writer.flush() and self._writer.restore(step):
                return True
        return False

    def finish(self, step: int) -> None:
        """Writes the closing metrics of a complete run, and closes the files."""
        assert self._writer is not None
        self._writer.goodput(step, self._goodput.seconds())
        self._writer.hparams(self.metrics)
        self._writer.close()

    def close(self) -> None:
        """Removes the live view and closes the files, also after a failure."""
        if self._view is not None:
            self._view.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, tags: Mapping[str, float]) -> None:
        assert self._writer is not None
        self._writer.scalars(step, tags)
        self.metrics |= tags
