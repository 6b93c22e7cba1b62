"""The results of a sweep: a table, best run first, and `sweep.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from launcher.command_line.variants import Variant, short_keys, show_value
from launcher.launch.spec import LaunchSpec
from launcher.report.read import read_runs
from trainer.console import warn
from trainer.errors import UserError
from trainer.workdir.paths import write_whole

FILE = "sweep.json"


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        index: index of the variant.
        name: name of its folder.
        overrides: new values, by key of the config.
        status: status as text.
        exit_code: exit code in this command; None if it has not started the run.
        steps: number of steps taken.
        metric: metric that ranks the runs.
        mode: "min" or "max" of the metric.
        best: best value so far; None if it was never measured.
        best_step: step of the best value.
        last: last value.
        train_loss: last training loss.
    """

    index: int
    name: str
    overrides: Mapping[str, Any]
    status: str
    exit_code: int | None
    steps: int
    metric: str
    mode: str
    best: float | None
    best_step: int | None
    last: float | None
    train_loss: float | None


def read_row(variant: Variant, spec: LaunchSpec, exit_code: int | None) -> Row:
    """Reads the folder of a run, which may be missing."""
    settings = spec.settings
    status, steps, best, last, train_loss = "not started", 0, None, None, None
    try:
        (run,) = read_runs([spec.workdir], spec.local_base)
    except UserError:
        pass  # no step taken
    else:
        status, steps, best = run.status, run.steps, run.best
        last, train_loss = (
            run.series[tag][-1][1] if run.series.get(tag) else None
            for tag in (settings.best_metric, "train/loss")
        )
    if exit_code:
        status = f"{status}, exit code {exit_code}" if steps else f"exit code {exit_code}"
    return Row(
        index=variant.index,
        name=variant.name,
        overrides=variant.overrides,
        status=status,
        exit_code=exit_code,
        steps=steps,
        metric=settings.best_metric,
        mode=settings.best_mode,
        best=best.value if best else None,
        best_step=best.step if best else None,
        last=last,
        train_loss=train_loss,
    )


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Sorts by the metric, or else the training loss, best first; runs with neither come last."""

    def rank(row: Row) -> tuple[int, float, int]:
        if row.best is not None:
            return 0, -row.best if row.mode == "max" else row.best, row.index
        if row.train_loss is not None:
            return 1, row.train_loss, row.index
        return 2, 0.0, row.index

    return sorted(rows, key=rank)


def format_table(rows: Sequence[Row]) -> str:
    """Formats the rows as a table, best first."""
    keys = list(dict.fromkeys(key for row in rows for key in row.overrides))
    short = short_keys(keys)
    measured = any(row.best is not None for row in rows)
    metrics = ["best " + rows[0].metric, "step", "last"] if measured else []
    table = [["run", *(short[key] for key in keys), *metrics, "train/loss", "status", "workdir"]]
    for row in ranked(rows):
        values = [show_value(row.overrides[key]) if key in row.overrides else "" for key in keys]
        numbers = [_short(row.best), _short(row.best_step), _short(row.last)] if measured else []
        table.append(
            [str(row.index), *values, *numbers, _short(row.train_loss), row.status, row.name]
        )
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in table
    )


def write_rows(folder: epath.Path, config: str, rows: Sequence[Row]) -> None:
    """Writes `sweep.json`; warns if that fails.

    Args:
        folder: the folder of the sweep.
        config: the value of --config.
        rows: rows ordered by index.
    """
    runs = [
        {
            "index": row.index,
            "workdir": row.name,
            "overrides": dict(row.overrides),
            "status": row.status,
            "exit_code": row.exit_code,
            "steps": row.steps,
            "best": row.best,
            "best_step": row.best_step,
            "last": row.last,
            "train/loss": row.train_loss,
        }
        for row in rows
    ]
    found = {"config": config, "metric": rows[0].metric, "mode": rows[0].mode, "runs": runs}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(found, indent=2) + "\n")
    except Exception as error:  # clients of object stores raise many types
        warn(f"{os.fspath(folder / FILE)} cannot be written: {error}")


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
