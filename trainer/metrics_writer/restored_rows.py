"""Compares `metrics.jsonl` with what a checkpoint says of it, and restores the rows it lacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from trainer.console import warn
from trainer.errors import first_line
from trainer.metrics_writer.metrics_file import lines_up_to
from trainer.workdir.paths import write_whole


def restore_rows(
    path: epath.Path,
    step: int,
    lines: Sequence[str],
    identity: Mapping[str, Any] | None,
) -> bool:
    """Makes the file hold every row up to a step that it or the checkpoint has.

    A file that is not what was written is reported, and put aside unless it is only too short.

    Args:
        path: of the file, local or remote.
        step: of the checkpoint.
        lines: of the newest rows up to that step.
        identity: `MetricsFile.identity` at that step; None: an earlier version saved it, or a
            process that does not write the file.

    Returns:
        Whether the file holds them now.
    """
    data = path.read_bytes() if path.exists() else b""
    found = lines_up_to(path, step)
    merged = _merge(lines, found, step)
    text = "".join(merged)
    is_changed = merged != found or _has_other_lines(data)
    if not is_changed and (identity is None or _is_of(data, identity)):
        return True
    is_complete = identity is None or _is_of(text.encode(), identity)
    # Short of rows that a disk refused, or of the end of a line; nothing else is lost with it.
    is_short = text.startswith("".join(found)) and not _has_other_lines(data) and is_complete
    state = "is too short" if is_short else "is damaged"
    state = state if data.strip() else "is gone or empty"
    compared = f"{path} {state}, compared with the checkpoint of step {step}"
    told = f"{len(merged)} rows are left"
    if identity is not None:
        told = f"{len(merged)} of {identity['rows']} rows are left"
        if is_complete:
            told = "every row is there again"
    if not is_changed:
        warn(f"{compared}: {told}, not as they were written")
        return True
    try:
        restored = path.parent / f".{path.name}.restored"
        write_whole(restored, text)
        if data.strip() and not is_short:
            told += f"; what was there is now {_put_aside(path)}"
        restored.replace(path)
    except Exception as error:  # a disk, or the client of an object store
        warn(f"{compared}: it cannot be restored, {first_line(error)}")
        return False
    warn(f"{compared}: {told}")
    return True


def _is_of(data: bytes, identity: Mapping[str, Any]) -> bool:
    """Whether a file begins with the rows that were written; rows of later steps may follow."""
    return bool(hashlib.sha256(data[: identity["bytes"]]).hexdigest() == identity["sha256"])


def _has_other_lines(data: bytes) -> bool:
    """Whether a line is no row. The last one may be: a kill can cut it short."""
    for line in data.decode("utf-8", "replace").split("\n")[:-1]:
        try:
            int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return True
    return False


def _merge(saved: Sequence[str], found: Sequence[str], step: int) -> list[str]:
    """The lines of the file before those of the checkpoint, which are right from their first step.

    Only at the checkpoint's own step can the file have others: an evaluation that was made up for.
    """
    rows = [json.loads(line) for line in saved]
    first = rows[0]["step"] if rows else step + 1
    last = [row.keys() for row in rows if row["step"] == step]

    def is_later(row: Mapping[str, Any]) -> bool:
        return row["step"] == step and row.keys() not in last

    before = [line for line in found if json.loads(line)["step"] < first]
    after = [line for line in found if is_later(json.loads(line))] if rows else []
    return [*before, *saved, *after]


def _put_aside(path: epath.Path) -> epath.Path:
    number = 1
    while (aside := path.parent / f"{path.name}.damaged-{number}").exists():
        number += 1
    path.rename(aside)
    return aside
