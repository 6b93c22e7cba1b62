"""`metrics.jsonl`: one JSON object a line.

Rows that the disk refuses are kept and written later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from etils import epath

from trainer.console import warn
from trainer.workdir.paths import is_local, write_whole
from trainer.workdir.patience import patiently


class MetricsFile(Protocol):
    """An open metrics file."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row, written now or with a later one."""

    def flush(self) -> bool:
        """Writes what is pending; returns whether every row is written."""

    def unwritten(self) -> list[dict[str, Any]]:
        """The rows that are not written yet."""

    def identity(self) -> dict[str, Any]:
        """Describes what the file holds once every row is written, as JSON."""


class _Identity:
    """Number, bytes and digest of all rows of a file, for a resume to compare it with."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._rows = self._bytes = 0
        self._digest = hashlib.sha256()
        for line in lines:
            self.add(line.encode())

    def add(self, line: bytes) -> None:
        self._rows += 1
        self._bytes += len(line)
        self._digest.update(line)

    def to_json(self) -> dict[str, Any]:
        return {"rows": self._rows, "bytes": self._bytes, "sha256": self._digest.hexdigest()}


def open_metrics_file(path: epath.Path, step: int) -> MetricsFile:
    """Opens a metrics file to append to, and drops its rows past a step.

    Args:
        path: local or remote.
        step: the last step to keep.
    """
    return _LocalFile(Path(path), step) if is_local(path) else _RemoteFile(path, step)


def read_metrics_file(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """The rows up to a step, without truncated lines."""
    lines = patiently(path, lambda: lines_up_to(path, step))
    return [json.loads(line) for line in lines]


def lines_up_to(path: Any, step: int) -> list[str]:
    """The lines of rows up to a step, without any other line."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_bytes().decode("utf-8", "replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept


class _LocalFile:
    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self._waiting: list[bytes] = []  # lines not fully written
        self._written_of_first = 0
        self._is_warned = False
        self._file: int | None = None
        self._truncate(step)

    def _truncate(self, step: int) -> None:
        lines = lines_up_to(self._path, step)
        self._identity = _Identity(lines)
        kept = "".join(lines).encode()
        if not self._path.exists():
            return
        if self._path.read_bytes().startswith(kept):
            os.truncate(self._path, len(kept))  # needs no space: it works on a full disk
        else:
            write_whole(epath.Path(self._path), kept.decode())

    def add(self, row: Mapping[str, Any]) -> None:
        self._waiting.append((json.dumps(row) + "\n").encode())
        self._identity.add(self._waiting[-1])
        self.flush()

    def flush(self) -> bool:
        try:
            if self._file is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o666)
            while self._waiting:
                rest = self._waiting[0][self._written_of_first :]
                self._written_of_first += os.write(self._file, rest)
                if self._written_of_first == len(self._waiting[0]):
                    self._waiting.pop(0)
                    self._written_of_first = 0
        except OSError as error:
            if not self._is_warned:
                why = error.strerror or error
                warn(f"{self._path} takes no rows: {why}; they are kept until it does")
            self._is_warned = True
            return False
        self._is_warned = False
        return True

    def unwritten(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._waiting]

    def identity(self) -> dict[str, Any]:
        return self._identity.to_json()

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class _RemoteFile:
    """Object stores cannot append: the whole file is written at each flush."""

    def __init__(self, path: epath.Path, step: int) -> None:
        self._path = path
        self._lines = lines_up_to(path, step)
        self._is_written = False
        self._written = 0

    def add(self, row: Mapping[str, Any]) -> None:
        self._lines.append(json.dumps(row) + "\n")
        self._is_written = False

    def flush(self) -> bool:
        if not self._is_written:
            try:
                write_whole(self._path, "".join(self._lines))
            except Exception as error:  # clients of object stores raise many types
                warn(f"{self._path} could not be written, and will be with the next rows: {error}")
                return False
            self._is_written, self._written = True, len(self._lines)
        return True

    def unwritten(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines[self._written :]]

    def identity(self) -> dict[str, Any]:
        return _Identity(self._lines).to_json()
