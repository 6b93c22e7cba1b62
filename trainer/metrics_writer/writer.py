"""Where metrics go: `metrics.jsonl` and TensorBoard, with the same tags in both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.console import warn
from trainer.errors import first_line
from trainer.metrics_writer.metrics_file import open_metrics_file, read_metrics_file
from trainer.metrics_writer.restored_rows import restore_rows
from trainer.metrics_writer.tensorboard import TensorBoardWriter
from trainer.workdir.workdir import Workdir


class MetricsWriter:
    """Writes the scalars of one run, in the one process of a job that writes.

    Args:
        workdir: the claimed folder of the run.
        step: the step the run resumes from; later rows in the files are dropped.
        lines: of the newest rows up to that step, which the file may lack.

    Attributes:
        tensorboard: the event files.
    """

    def __init__(self, workdir: Workdir, step: int, lines: Sequence[str] = ()) -> None:
        self._path = workdir.metrics
        self._file = open_metrics_file(self._path, step)
        self._recent = [(json.loads(line)["step"], line) for line in lines]
        present = {_canonical(line) for line in self._file.lines} if lines else set()
        for line in lines:
            if _canonical(line) not in present:
                self._file.add(line)
        self.tensorboard = TensorBoardWriter(workdir, step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row.

        Args:
            step: steps taken when the values were measured.
            values: by tag; a value that is not finite becomes `null` in the file.
        """
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        row = {"step": step, **dict.fromkeys(values), **finite}
        line = json.dumps(row) + "\n"
        self._recent.append((step, line))
        self._file.add(line)
        self.tensorboard.scalars(step, finite)

    def goodput(self, step: int, seconds: Mapping[str, float]) -> None:
        """Writes seconds by kind to TensorBoard only: they differ between equal runs."""
        self.tensorboard.scalars(step, {f"goodput/{kind}": s for kind, s in seconds.items()})

    def tensorboard_only(self, step: int, values: Mapping[str, float]) -> None:
        """Writes finite values, by tag, to TensorBoard only: they differ between equal runs."""
        self.tensorboard.scalars(step, values)

    def hparams(self, metrics: Mapping[str, float]) -> None:
        """Writes the run's settings and closing metrics for TensorBoard's HPARAMS tab."""
        self.tensorboard.hparams({tag: v for tag, v in metrics.items() if math.isfinite(v)})

    def flush(self) -> bool:
        """Flushes both; returns whether the file system took every row."""
        self.tensorboard.flush()
        return self._file.flush()

    def restore(self, step: int) -> bool:
        """Restores the file if it is not what was written, once every row is flushed.

        Writing goes on without an error after another program has removed or emptied it.

        Args:
            step: of the checkpoint on disk that describes the file.

        Returns:
            Whether the file holds every row now.
        """
        path = self._path
        try:
            if self._file.is_whole():
                return True
            return restore_rows(path, step, self._file.lines, self._file.identity())
        except Exception as error:  # a disk, or the client of an object store
            warn(f"{path} cannot be read: {first_line(error)}")
            return False

    def for_checkpoint(self, saved: int | None) -> dict[str, Any]:
        """What a checkpoint keeps of the file, as JSON: its newest rows, and what it should be.

        Args:
            saved: the step of the newest checkpoint on disk; rows before it that the file system
                has taken are left out from now on.
        """
        self._recent = [r for r in self._recent if saved is None or r[0] >= saved]
        # Both end at the newest row. As text, because a manifest sorts the keys of objects.
        newest = max([line for _, line in self._recent], self._file.unwritten(), key=len)
        return {"rows": [line.rstrip() for line in newest], "metrics_file": self._file.identity()}

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.flush()
        self.tensorboard.close()


def _canonical(line: str) -> str:
    """The same for equal rows, whatever the order of their tags."""
    return json.dumps(json.loads(line), sort_keys=True)


class NullWriter:
    """The writer of the processes that do not write."""

    tensorboard = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def goodput(self, step: int, seconds: Mapping[str, float]) -> None:
        """Does nothing."""

    def tensorboard_only(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def hparams(self, metrics: Mapping[str, float]) -> None:
        """Does nothing."""

    def flush(self) -> bool:
        """Does nothing."""
        return True

    def restore(self, step: int) -> bool:
        """Does nothing."""
        return True

    def for_checkpoint(self, saved: int | None) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def close(self) -> None:
        """Does nothing."""


def last_values(workdir: Workdir, step: int) -> dict[str, float]:
    """The last value of each tag in `metrics.jsonl`, up to a step."""
    values: dict[str, float] = {}
    for row in read_metrics_file(workdir.metrics, step):
        values |= {tag: value for tag, value in row.items() if value is not None}
    values.pop("step", None)
    return values


def evaluation_at(workdir: Workdir, step: int) -> dict[str, float] | None:
    """The finite metrics of the evaluation of a step in `metrics.jsonl`; None if it has none."""
    rows = [row for row in read_metrics_file(workdir.metrics, step) if row["step"] == step]
    rows = [row for row in rows if "eval/loss" in row]
    if not rows:
        return None
    return {tag: value for row in rows for tag, value in row.items() if value is not None}
