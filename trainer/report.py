"""Where numbers go: `metrics.jsonl` and TensorBoard, the same tags in both."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from trainer.paths import write_whole
from trainer.settings import flatten
from trainer.workdir import Workdir


class Report:
    """Writes scalars of one run. One process of a job writes; the others have no report.

    Args:
        workdir: the claimed folder of the run.
        step: the step the run goes on from; what was written past it is cut away.
    """

    def __init__(self, workdir: Workdir, step: int) -> None:
        self._workdir = workdir
        self._lines = _lines_up_to(workdir, step)
        self._stale = True
        if workdir.is_local:
            if workdir.metrics.exists() or self._lines:
                write_whole(workdir.metrics, "".join(self._lines))
            self._file = open(  # noqa: SIM115 (closed by `close`)
                workdir.metrics, "a", buffering=1, encoding="utf-8"
            )
        self._first_step = step
        self._writer: Any = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row.

        Args:
            step: steps taken when the values were measured.
            values: by tag; a value that is not finite becomes `null` in the file.
        """
        row = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = json.dumps({"step": step, **row}) + "\n"
        if self._workdir.is_local:
            self._file.write(line)
        else:  # object stores cannot append: the whole file is written at each flush
            self._lines.append(line)
        for tag, value in values.items():
            if math.isfinite(value):
                self._tensorboard.add_scalar(tag, value, step)

    def hparams(self, metrics: Mapping[str, float]) -> None:
        """Writes the run's settings and closing metrics for TensorBoard's HPARAMS tab.

        Through the file writer, since `SummaryWriter.add_hparams` starts a second run for it.
        """
        from tensorboardX.summary import hparams

        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in flatten(self._workdir.config.to_dict()).items()
            if value is not None
        }
        finite = {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        for summary in hparams(settings, finite):
            self._tensorboard.file_writer.add_summary(summary)

    def flush(self) -> None:
        """Hands everything written so far to the file system."""
        if not self._workdir.is_local:
            write_whole(self._workdir.metrics, "".join(self._lines))
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        if self._workdir.is_local:
            self._file.close()
        if self._writer is not None:
            self._writer.close()

    @property
    def _tensorboard(self) -> Any:
        if self._writer is None:  # at the first scalar: the import takes 0.1 s
            import tensorboardX

            self._writer = tensorboardX.SummaryWriter(
                os.fspath(self._workdir.path),
                purge_step=self._first_step + 1 if self._first_step else None,
                # The name holds the second only: two writers in one second would share a file.
                filename_suffix=f".{os.getpid()}.{time.time_ns()}",
                flush_secs=20,
            )
            text = json.dumps(self._workdir.config.to_dict(), indent=2)
            indented = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text("config", indented, self._first_step)
        return self._writer


class NoReport:
    """What the processes that do not write have in place of a report."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes nothing."""

    def hparams(self, metrics: Mapping[str, float]) -> None:
        """Writes nothing."""

    def flush(self) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Has nothing to close."""


def _lines_up_to(workdir: Workdir, step: int) -> list[str]:
    """The rows of `metrics.jsonl` up to a step; a row that was cut short is dropped."""
    if not workdir.metrics.exists():
        return []
    kept = []
    for line in workdir.metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def last_values(workdir: Workdir, step: int) -> dict[str, float]:
    """The last value of each tag in `metrics.jsonl`, up to a step."""
    values: dict[str, float] = {}
    for line in _lines_up_to(workdir, step):
        values |= {tag: value for tag, value in json.loads(line).items() if value is not None}
    values.pop("step", None)
    return values


def has_row(workdir: Workdir, step: int, tag: str) -> bool:
    """Whether `metrics.jsonl` holds a value of a tag at a step."""
    rows = map(json.loads, _lines_up_to(workdir, step))
    return any(row["step"] == step and tag in row for row in rows)
