"""What a run tells of itself: on the console, in `metrics.jsonl` and in TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.checkpoints.saver import Saver
from trainer.console import say
from trainer.errors import NonFiniteLoss
from trainer.metrics_writer.goodput import Goodput
from trainer.metrics_writer.live_view import LiveView
from trainer.metrics_writer.messages import About, say_end, say_evaluation, say_row
from trainer.metrics_writer.tensorboard import TensorBoardWriter
from trainer.metrics_writer.throughput import Speed
from trainer.metrics_writer.train_log import LogRow
from trainer.metrics_writer.writer import MetricsWriter, NullWriter, last_values
from trainer.workdir.workdir import Workdir


class RunLog:
    """The account that a run gives; files are begun once it is certain that there will be a run.

    Args:
        about: what the run is.

    Attributes:
        metrics: the last value of every tag.
        goodput: where the time goes.
    """

    def __init__(self, about: About) -> None:
        self._about = about
        self._report: MetricsWriter | NullWriter | None = None
        self._view: LiveView | None = None
        self._speed: Speed | None = None
        self._rows: Sequence[Mapping[str, Any]] = ()
        self.metrics: dict[str, float] = {}
        self.goodput = Goodput(time.monotonic)

    @property
    def curves(self) -> TensorBoardWriter | None:
        """For what goes to TensorBoard alone; None where this process does not write."""
        return self._report.curves if self._report is not None else None

    @property
    def _folder(self) -> Workdir:
        return self._about.folder

    def go_on_from(self, meta: Mapping[str, Any]) -> None:
        """Takes up what was saved with the state.

        Args:
            meta: `rows`, that a copy in memory knows of and perhaps no file, and `goodput`.
        """
        self._rows = meta.get("rows", [])
        self.goodput.go_on_from(meta.get("goodput"))

    def read_metrics(self, step: int) -> None:
        """Takes up the values that were reported up to a step."""
        self.metrics = last_values(self._folder, step)

    def open(self, step: int) -> None:
        """Opens the files, if they are not open yet; what lies past `step` in them is cut away."""
        if self._report is None:
            writes = self._about.lift.writes
            self._report = MetricsWriter(self._folder, step, self._rows) if writes else NullWriter()

    def begin_steps(self, step: int, state: Any, newest: Callable[[], Mapping[str, float]]) -> None:
        """From here on there is a live view, where there is a terminal.

        Args:
            step: steps taken so far.
            state: the state, or its shapes.
            newest: gives the metrics of the newest step that is known to be done.
        """
        about = self._about
        if about.lift.writes:
            self._speed = Speed(about.settings, about.job, about.lift, state)
            devices = about.lift.mesh.size
            self._view = LiveView(step, about.job.stop, devices, newest, self.goodput)
            self._view.start()

    def progress(self, step: int) -> None:
        """So many steps have been dispatched."""
        if self._view is not None:
            self._view.step = step

    def epoch(self, epoch: int, loss: float) -> None:
        """An epoch is over; `loss` is the mean over its steps."""
        say(f"Loss for epoch {epoch}: {loss:.6g}")

    def row(self, row: LogRow, skipped: int) -> None:
        """A row of training metrics; `skipped` steps were not finite so far."""
        tags = {f"train/{name}": value for name, value in row.values.items()}
        if row.step_seconds > 0:
            rate = self._about.settings.global_batch_size / row.step_seconds
            tags |= {"train/examples_per_second": rate, "train/step_seconds": row.step_seconds}
        if skipped:
            tags["train/skipped"] = skipped
        speed: dict[str, float] = {}
        if self._speed is not None and row.step_seconds > 0:
            speed = self._speed.tags(row.step_seconds)
        say_row(self._about, row, tags | speed)
        self._write(row.step, tags)
        if speed:
            assert self._report is not None
            self._report.curves_only(row.step, speed)
        if speed and self._view is not None:
            self._view.speed = tags | speed

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """What an evaluation gave, by tag."""
        say_evaluation(step, self._about.job.stop, metrics)
        if self._view is not None:
            self._view.evaluation = metrics
        self._write(step, metrics)

    def not_finite(self, error: NonFiniteLoss) -> None:
        """The values of the step that ends the run."""
        if self._report is not None:
            tags = {f"train/{name}": value for name, value in error.values.items()}
            self._report.scalars(error.step, tags)

    def saved(self, step: int) -> None:
        """A state of this step is on its way to the disk, and so should be what came before it."""
        if self._view is not None:
            self._view.saved = (step, time.monotonic())
        if self._report is not None:
            self._report.times(step, self.goodput.seconds())
            self._report.flush()

    def flush(self) -> None:
        """Hands everything to the file system."""
        if self._report is not None:
            self._report.flush()

    def unwritten(self) -> list[dict[str, Any]]:
        """Rows that the file system has not taken yet."""
        return self._report.unwritten() if self._report is not None else []

    def finish(self, step: int) -> None:
        """The run is over and everything is saved."""
        assert self._report is not None
        self._report.times(step, self.goodput.seconds())
        self._report.hparams(self.metrics)
        self._report.close()

    def say_end(self, saver: Saver, step: int, early: str = "") -> None:
        """The closing lines; `early` is why the run ends before its time, if it does."""
        say_end(self._about, saver, self.goodput, step, early)

    def close(self) -> None:
        """Takes the view off the screen and closes the files, also where the run has failed."""
        if self._view is not None:
            self._view.close()
        if self._report is not None:
            self._report.close()

    def _write(self, step: int, tags: Mapping[str, float]) -> None:
        assert self._report is not None
        self._report.scalars(step, tags)
        self.metrics |= tags
