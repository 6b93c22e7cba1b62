"""TensorBoard's event files. An error in writing them is a warning: training continues."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from trainer.config.keys import flatten
from trainer.console import warn
from trainer.workdir.workdir import Workdir

# Events that may wait for the disk; with more of them, tensorboardX would block the training.
_LONGEST_QUEUE = 10_000


@dataclass(frozen=True)
class Histogram:
    """The distribution of the values of an array.

    Attributes:
        low: the smallest value.
        high: the largest value.
        total: their sum.
        squares: the sum of their squares.
        counts: of bins of equal width from `low` to `high`, shape (bins,).
    """

    low: float
    high: float
    total: float
    squares: float
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        """The edges of the bins, shape (bins + 1,)."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)


class TensorBoardWriter:
    """The event files of one run.

    Args:
        workdir: the claimed folder of the run.
        step: the step the run resumes from; TensorBoard then ignores earlier events past it.
    """

    def __init__(self, workdir: Workdir, step: int) -> None:
        self._workdir = workdir
        self._first_step = step
        self._writer: Any = None
        self._is_warned = False
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._uploaded: dict[str, int] = {}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds finite values, by tag."""
        with self._errors_as_warnings():
            for tag, value in values.items():
                self._open().add_scalar(tag, value, step)

    def histograms(self, step: int, found: Mapping[str, Histogram]) -> None:
        """Adds histograms, by tag."""
        with self._errors_as_warnings():
            for tag, one in found.items():
                self._open().add_histogram_raw(
                    tag,
                    min=one.low,
                    max=one.high,
                    num=int(one.counts.sum()),
                    sum=one.total,
                    sum_squares=one.squares,
                    bucket_limits=one.edges[1:].tolist(),
                    bucket_counts=one.counts.tolist(),
                    global_step=step,
                )

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Adds an image, uint8 `(height, width, 1 or 3)`."""
        with self._errors_as_warnings():
            self._open().add_image(tag, pixels, step, dataformats="HWC")

    def hparams(self, metrics: Mapping[str, float]) -> None:
        """Adds the closing metrics; the HPARAMS tab then lists the run as finished."""
        with self._errors_as_warnings():
            for summary in self._hparams(metrics):
                self._open().file_writer.add_summary(summary)

    def _hparams(self, metrics: Mapping[str, float]) -> tuple[Any, Any, Any]:
        """The experiment, the start and the end of a session, for the file writer.

        `SummaryWriter.add_hparams` would start a second run for them.
        """
        from tensorboardX.summary import hparams

        # None too, so that the runs of a sweep have the same columns.
        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flatten(self._workdir.config.to_dict()).items()
        }
        experiment, start, end = hparams(settings, dict(metrics))
        return experiment, start, end

    def flush(self) -> None:
        """Flushes the file."""
        with self._errors_as_warnings():
            if self._writer is not None and self._is_writing:
                self._writer.flush()
            self._upload()

    def close(self) -> None:
        """Flushes and closes the file."""
        with self._errors_as_warnings():
            if self._writer is not None and self._is_writing:
                self._writer.close()
            self._upload()  # with the events that the flush had not written yet
        self._abandon()
        if self._local is not None:
            self._local.cleanup()
            self._local = None

    @property
    def _is_writing(self) -> bool:
        """Whether tensorboardX's thread is alive; a disk error ends it for good."""
        worker = getattr(self._writer.file_writer.event_writer, "_worker", None)
        return worker is None or worker.is_alive()

    def _open(self) -> Any:
        if self._writer is not None and not self._is_writing:
            self._abandon()
        if self._writer is None:  # lazily: the import takes 0.1 s
            import tensorboardX

            folder = os.fspath(self._workdir.path)
            if not self._workdir.is_local:
                self._local = self._local or tempfile.TemporaryDirectory(prefix="podlift-events-")
                folder = self._local.name
            self._writer = tensorboardX.SummaryWriter(
                folder,
                purge_step=self._first_step + 1 if self._first_step else None,
                # tensorboardX names files by the second: two writers in one second would share one.
                filename_suffix=f".{os.getpid()}.{time.time_ns()}",
                flush_secs=20,
                max_queue=_LONGEST_QUEUE,
            )
            _report_death(self._writer, self._warn)
            text = json.dumps(self._workdir.config.to_dict(), indent=2)
            indented = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text("config", indented, self._first_step)
            # Now, so that the HPARAMS tab also lists runs that never finish.
            self._writer.file_writer.add_summary(self._hparams({})[1])
        return self._writer

    def _abandon(self) -> None:
        """Lets go of the writer; of one that a disk error has ended, too.

        Its `close` would wait for the dead thread. It also runs at exit, and so does a wait for
        somebody to read its queue.
        """
        writer, self._writer = self._writer, None
        with contextlib.suppress(Exception):  # tensorboardX may change
            events = writer.file_writer.event_writer
            is_closed, events._closed = events._closed, True
            if not is_closed:
                events._event_queue.cancel_join_thread()
                # Not its `close`, which stops at what the disk does not take; Python 3.13 then
                # prints that error again when it collects the file.
                events._ev_writer._py_recordio_writer._writer.close()

    def _upload(self) -> None:
        """Copies event files that have grown to the object store.

        tensorboardX can write to some stores itself, but through a second client with its own
        credentials, whose retries block flush.
        """
        if self._local is not None:
            for file in Path(self._local.name).iterdir():
                content = file.read_bytes()
                if len(content) != self._uploaded.get(file.name):
                    (self._workdir.path / file.name).write_bytes(content)
                    self._uploaded[file.name] = len(content)

    @contextlib.contextmanager
    def _errors_as_warnings(self) -> Any:
        try:
            yield
        except Exception as error:  # clients of object stores raise many types
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        if not self._is_warned:
            self._is_warned = True
            warn(f"no curves for TensorBoard for now: {error}")


# By thread of tensorboardX: what to do with the error that ends it.
_deaths: WeakKeyDictionary[threading.Thread, Callable[[BaseException], None]] = WeakKeyDictionary()


def _report_death(writer: Any, report: Callable[[BaseException], None]) -> None:
    """Reports the error that ends a writer's thread, of which Python would print a traceback."""
    worker = getattr(writer.file_writer.event_writer, "_worker", None)
    if worker is None:  # another tensorboardX
        return
    _deaths[worker] = report
    if not isinstance(threading.excepthook, _Deaths):
        threading.excepthook = _Deaths(threading.excepthook)


class _Deaths:
    def __init__(self, previous: Callable[[Any], object]) -> None:
        self._previous = previous

    def __call__(self, arguments: Any) -> None:
        report = _deaths.get(arguments.thread) if arguments.thread else None
        if report is None:
            self._previous(arguments)
        else:
            report(arguments.exc_value)
