"""Where numbers go: `metrics.jsonl` and TensorBoard, the same tags in both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.metrics_writer.metrics_file import open_metrics_file, read_metrics_file
from trainer.metrics_writer.tensorboard import TensorBoardWriter
from trainer.workdir.workdir import Workdir


class MetricsWriter:
    """Writes scalars of one run. One process of a job writes; the others have no report.

    Args:
        workdir: the claimed folder of the run.
        step: the step the run goes on from; what was written past it is cut away.
        rows: up to that step, which may be missing in the file.

    Attributes:
        curves: TensorBoard's.
    """

    def __init__(self, workdir: Workdir, step: int, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        there = read_metrics_file(workdir.metrics, step) if rows else []
        self._rows = open_metrics_file(workdir.metrics, step)
        for row in rows:
            if row not in there:
                self._rows.add(row)
        self.curves = TensorBoardWriter(workdir, step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row.

        Args:
            step: steps taken when the values were measured.
            values: by tag; a value that is not finite becomes `null` in the file.
        """
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        self._rows.add({"step": step, **dict.fromkeys(values), **finite})
        self.curves.scalars(step, finite)

    def times(self, step: int, seconds: Mapping[str, float]) -> None:
        """Writes what time was spent on, for TensorBoard only: no two runs agree about it."""
        self.curves.scalars(step, {f"goodput/{kind}": spent for kind, spent in seconds.items()})

    def curves_only(self, step: int, values: Mapping[str, float]) -> None:
        """Writes finite values, by tag, for TensorBoard only: no two runs agree about them."""
        self.curves.scalars(step, values)

    def hparams(self, metrics: Mapping[str, float]) -> None:
        """Writes the run's settings and closing metrics for TensorBoard's HPARAMS tab."""
        self.curves.hparams({tag: v for tag, v in metrics.items() if math.isfinite(v)})

    def flush(self) -> bool:
        """Hands everything written so far to the file system; says whether it took the rows."""
        self.curves.flush()
        return self._rows.flush()

    def unwritten(self) -> list[dict[str, Any]]:
        """Rows that the file system has not taken yet."""
        return self._rows.unwritten()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._rows.flush()
        self.curves.close()


class NullWriter:
    """What the processes that do not write have in place of a report."""

    curves = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes nothing."""

    def times(self, step: int, seconds: Mapping[str, float]) -> None:
        """Writes nothing."""

    def curves_only(self, step: int, values: Mapping[str, float]) -> None:
        """Writes nothing."""

    def hparams(self, metrics: Mapping[str, float]) -> None:
        """Writes nothing."""

    def flush(self) -> bool:
        """Writes nothing."""
        return True

    def unwritten(self) -> list[dict[str, Any]]:
        """Has no rows."""
        return []

    def close(self) -> None:
        """Has nothing to close."""


def last_values(workdir: Workdir, step: int) -> dict[str, float]:
    """The last value of each tag in `metrics.jsonl`, up to a step."""
    values: dict[str, float] = {}
    for row in read_metrics_file(workdir.metrics, step):
        values |= {tag: value for tag, value in row.items() if value is not None}
    values.pop("step", None)
    return values


def evaluation_at(workdir: Workdir, step: int) -> dict[str, float] | None:
    """What `metrics.jsonl` has of the evaluation of a step, but for `null`; None if it has none."""
    found = [row for row in read_metrics_file(workdir.metrics, step) if row["step"] == step]
    found = [row for row in found if "eval/loss" in row]
    if not found:
        return None
    return {tag: value for row in found for tag, value in row.items() if value is not None}
