"""Reads the folders of runs. Any file may be missing or incomplete: a run may be training."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from launcher.report.attempts import Attempt, attempt_of, read_attempts
from trainer.checkpoints.folder import QUARANTINE, CheckpointFolder
from trainer.checkpoints.manifest import Damaged
from trainer.config.config_json import NONE_TYPES
from trainer.config.keys import flatten
from trainer.errors import UserError, first_line
from trainer.metrics_writer.metrics_file import read_metrics_file
from trainer.workdir import lock
from trainer.workdir.json_object import read_object
from trainer.workdir.paths import absolute, local_folder

# A folder with any of these is the folder of a run.
_SIGNS = ("config.json", "env.json", "metrics.jsonl", "failure.json")

# (step, value), with ascending steps; None is a value that is not finite.
Series = Sequence[tuple[int, float | None]]


@dataclass(frozen=True)
class Best:
    """The best value of the metric that ranks checkpoints."""

    tag: str
    value: float
    step: int


@dataclass(frozen=True)
class Run:
    """A run, as its folder describes it.

    Attributes:
        name: name for messages, unique in a report.
        state: "finished", "running", "stopped" or "failed".
        status: the state as text, with details.
        steps: number of steps taken.
        series: values of each tag, in display order.
        best: best value of the metric that ranks; None if it was never measured.
        config: the config by key, such as "model.hidden_size".
        environment: `env.json` by key.
        failure: `failure.json`; empty if there is none.
        attempts: attempts that left logs.
        quarantined: states in quarantine, with the reason for each.
        checkpoints: steps to resume from.
        missing: files that are missing or unreadable.
    """

    name: str
    state: str
    status: str
    steps: int
    series: Mapping[str, Series]
    best: Best | None
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    failure: Mapping[str, Any]
    attempts: Sequence[Attempt]
    quarantined: Mapping[str, str]
    checkpoints: Sequence[int]
    missing: Sequence[str]

    @property
    def seconds(self) -> float | None:
        """Total time of all attempts with a known time; None if there is none."""
        known = [attempt.seconds for attempt in self.attempts if attempt.seconds is not None]
        return sum(known) if known else None

    @property
    def devices(self) -> str:
        """For example "8 cpu in 2 processes"; empty if unknown."""
        count, kind = (self.environment.get(f"devices.{key}") for key in ("count", "kind"))
        processes = self.environment.get("devices.processes")
        if count is None or kind is None:
            return ""
        return f"{count} {kind}" + (f" in {processes} processes" if processes != 1 else "")


def read_runs(places: Sequence[str], local_dir: str | None = None) -> list[Run]:
    """Reads runs. A folder that is named twice is read once.

    Args:
        places: local or remote folders.
        local_dir: where the logs of remote runs are.

    Raises:
        UserError: a folder is not the folder of a run, or cannot be read.
    """
    folders: dict[str, epath.Path] = {}
    for place in places:
        folder = absolute(place)
        folders.setdefault(os.fspath(folder), folder)
        with _errors_of_reading(folder):
            _check_is_run(folder, place)
    runs = []
    for folder, name in zip(folders.values(), distinct_names(list(folders)), strict=True):
        with _errors_of_reading(folder):
            runs.append(_read(folder, name, local_dir))
    return runs


@contextlib.contextmanager
def _errors_of_reading(folder: epath.Path) -> Any:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # clients of object stores raise many types
        why = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"{folder} cannot be read: {why}") from error


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as make all unique."""
    parts = [[part for part in path.split("/") if part] for path in paths]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _check_is_run(folder: epath.Path, place: str) -> None:
    if _is_run(folder):
        return
    parent = folder.parent
    if not folder.exists():
        what = f"there is no folder {place}"
    elif not folder.is_dir():
        what = f"{place} is a file, not the folder of a run"
        if _is_run(parent):
            raise UserError(what, f"did you mean {os.path.dirname(place) or '.'}?")
    else:
        what = f"{place} is not the folder of a run: it has none of {', '.join(_SIGNS)}"
    inside = _runs_in(folder) if folder.is_dir() else []
    if inside:
        names = [os.path.join(place, name) for name in inside]
        raise UserError(what, f"runs in it: {_first(names)}")
    beside = _runs_in(parent)
    near = difflib.get_close_matches(folder.name, beside, n=1)
    names = [os.path.join(os.path.dirname(place.rstrip("/")), name) for name in near or beside]
    if near:
        raise UserError(what, f"did you mean {names[0]}?")
    raise UserError(
        what,
        f"runs near it: {_first(names)}" if names else "name the --workdir of a run",
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def _is_run(folder: epath.Path) -> bool:
    return any((folder / name).exists() for name in _SIGNS)


def _runs_in(folder: epath.Path) -> list[str]:
    """Names of runs in a folder, for hints: looks at 100 entries at most, and never fails."""
    try:
        entries = sorted(folder.iterdir())[:100]
        return [entry.name for entry in entries if entry.is_dir() and _is_run(entry)]
    except Exception:
        return []


def _read(folder: epath.Path, name: str, local_dir: str | None) -> Run:
    here = local_folder(os.fspath(folder), local_dir)
    config = _read_object(folder / "config.json")
    config.pop(NONE_TYPES, None)
    flat = flatten(config)
    environment = flatten(_read_object(folder / "env.json"))
    failure = _read_object(epath.Path(here) / "failure.json")
    attempts = read_attempts(here, failure)
    rows = read_metrics_file(folder / "metrics.jsonl", sys.maxsize)
    series = _series_of(rows)
    latest = CheckpointFolder(folder / "checkpoints", 1)
    checkpoints = latest.steps()
    last_row = max((points[-1][0] for points in series.values()), default=0)
    logged = [attempt.last_step for attempt in attempts if attempt.last_step is not None]
    steps = max([last_row, *checkpoints[-1:], *logged[-1:]])
    total = _total(latest, flat, attempts)
    state, status = _state(folder, local_dir, steps, total, failure, attempts)
    found = {"config.json": flat, "env.json": environment, "metrics.jsonl": rows}
    return Run(
        name=name,
        state=state,
        status=status,
        steps=steps,
        series=series,
        best=_best(series, flat),
        config=flat,
        environment=environment,
        failure=failure,
        attempts=attempts,
        quarantined=_quarantined(folder),
        checkpoints=checkpoints,
        missing=[file for file, content in found.items() if not content],
    )


def _read_object(path: epath.Path) -> dict[str, Any]:
    """A JSON object; empty if the file is missing, incomplete or something else."""
    try:
        return read_object(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return {}


def _series_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """The values of each tag by step: numbers only, None for those that are not finite."""
    found: dict[str, dict[int, float | None]] = {}
    for row in rows:
        step = _finite(row["step"])
        if step is None:
            continue
        for tag, value in row.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if tag != "step" and (is_number or value is None):
                found.setdefault(tag, {})[int(step)] = _finite(value)
    return {tag: sorted(found[tag].items()) for tag in sorted(found, key=_display_order)}


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _display_order(tag: str) -> tuple[int, str, bool, str]:
    """Sorts the loss first, then metrics, then training statistics; train before eval."""
    kind, _, name = tag.partition("/")
    last = {"learning_rate": 2, "grad_norm": 3, "examples_per_second": 4, "step_seconds": 5}
    place = 0 if name == "loss" else last.get(name, 6 if name == "skipped" else 1)
    return place, name, kind != "train", tag


def _best(series: Mapping[str, Series], config: Mapping[str, Any]) -> Best | None:
    """The best value by the run's own rule: the first of equal values."""
    tag = str(config.get("checkpoint.best_metric", "eval/loss"))
    sign = -1 if config.get("checkpoint.best_mode") == "max" else 1
    found = [(sign * value, step) for step, value in series.get(tag, ()) if value is not None]
    if not found:
        return None
    value, step = min(found)
    return Best(tag, sign * value, step)


def _total(
    latest: CheckpointFolder, config: Mapping[str, Any], attempts: Sequence[Attempt]
) -> int | None:
    """The length of the run in steps. Its config may only state epochs."""
    known = [attempt.stop for attempt in attempts[-1:] if attempt.stop is not None]
    for step in reversed(latest.steps()):
        with contextlib.suppress(Damaged, KeyError, TypeError, ValueError):
            known.append(int(latest.check(step).meta["num_steps"]))
            break
    if isinstance(config.get("num_steps"), int):
        known.append(config["num_steps"])
    return max(known, default=None)


def _state(
    folder: epath.Path,
    local_dir: str | None,
    steps: int,
    total: int | None,
    failure: Mapping[str, Any],
    attempts: Sequence[Attempt],
) -> tuple[str, str]:
    """The state, and the status text."""
    of = f" of {total:,}" if total is not None else ""
    try:
        lock.check_free(folder, local_dir)
    except UserError:
        return "running", f"running, at step {steps:,}{of}"
    last = attempts[-1] if attempts else None
    failed = attempt_of(failure)
    if failure and (last is None or failed is None or failed >= last.number):
        step = failure.get("step")
        at = f" at step {step:,}{of}" if isinstance(step, int) else ""
        return "failed", f"failed{at}"
    if total is not None and steps >= total:
        return "finished", "finished"
    if last is not None and "stopped early at step" in last.ending:
        return "finished", f"stopped early at step {steps:,}{of}"
    why = ""
    if last is not None and last.ending.startswith("asked to stop"):
        why = ", on request"
    elif last is not None and "config.stop_at_step" in last.ending:
        why = " (config.stop_at_step)"
    elif last is not None and not last.went_well:
        why = ", without an error message" if not last.ending else ", after a failure"
    return "stopped", f"stopped at step {steps:,}{of}{why}"


def _quarantined(folder: epath.Path) -> dict[str, str]:
    """The reason for each state in quarantine, by its path in the folder."""
    found = {}
    for kind in ("checkpoints", "best"):
        with contextlib.suppress(OSError):
            for place in sorted((folder / kind / QUARANTINE).iterdir()):
                why = "reason unknown"
                with contextlib.suppress(OSError):
                    why = (place / "why.txt").read_bytes().decode("utf-8", "replace").strip()
                found[f"{kind}/{QUARANTINE}/{place.name}"] = why
    return found
