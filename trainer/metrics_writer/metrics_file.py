"""`metrics.jsonl`: one JSON object a line.

Rows that the disk refuses are kept and written later.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from trainer.console import warn
from trainer.workdir.paths import is_local, write_whole
from trainer.workdir.patience import patiently


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


class MetricsFile(ABC):
    """An open metrics file.

    Attributes:
        lines: every line, because another program can remove or empty the file at any time.
    """

    def __init__(self, path: epath.Path | Path, step: int) -> None:
        self._path = path
        self.lines = patiently(path, lambda: lines_up_to(path, step))
        self._identity = _Identity(self.lines)

    def add(self, line: str) -> None:
        """Adds the line of a row, written now or with a later one."""
        self.lines.append(line)
        self._identity.add(line.encode())

    @abstractmethod
    def flush(self) -> bool:
        """Writes what is pending; returns whether every row is written."""

    @abstractmethod
    def unwritten(self) -> list[str]:
        """The lines that are not written yet."""

    def identity(self) -> dict[str, Any]:
        """Describes what the file holds once every row is written, as JSON."""
        return self._identity.to_json()

    def is_whole(self) -> bool:
        """Whether the path leads to a file with these lines and no others."""
        return self._path.exists() and self._path.read_bytes() == "".join(self.lines).encode()


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


class _LocalFile(MetricsFile):
    _path: Path

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path, step)
        self._waiting: list[bytes] = []  # lines not fully written
        self._written_of_first = 0
        self._is_warned = False
        self._file: int | None = None
        self._truncate()

    def _truncate(self) -> None:
        kept = "".join(self.lines).encode()
        if not self._path.exists():
            return
        if self._path.read_bytes().startswith(kept):
            os.truncate(self._path, len(kept))  # needs no space: it works on a full disk
        else:
            write_whole(epath.Path(self._path), kept.decode())

    def add(self, line: str) -> None:
        super().add(line)
        self._waiting.append(line.encode())
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

    def unwritten(self) -> list[str]:
        return [line.decode() for line in self._waiting]

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class _RemoteFile(MetricsFile):
    """Object stores cannot append: the whole file is written at each flush."""

    _path: epath.Path

    def __init__(self, path: epath.Path, step: int) -> None:
        super().__init__(path, step)
        self._is_written = False
        self._written = 0

    def add(self, line: str) -> None:
        super().add(line)
        self._is_written = False

    def flush(self) -> bool:
        if not self._is_written:
            try:
                write_whole(self._path, "".join(self.lines))
            except Exception as error:  # clients of object stores raise many types
                warn(f"{self._path} could not be written, and will be with the next rows: {error}")
                return False
            self._is_written, self._written = True, len(self.lines)
        return True

    def unwritten(self) -> list[str]:
        return self.lines[self._written :]
