"""The log file of a rank: `logs/attempt-K/rank-R.log` in the run's folder."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import TextIO

from etils import epath

from launcher.processes.background import BackgroundWriter
from launcher.processes.lost_peers import LostPeers
from launcher.processes.messages import print_err
from trainer.errors import UserError
from trainer.workdir.identity import Identity
from trainer.workdir.lock import is_held

_STAMP = "%Y-%m-%d %H:%M:%S"
# Bytes that wait for a disk; more of them stay in the pipes of the workers.
_MAX_PENDING = 32_000_000
# How long to wait, at the end, for a disk that is slow.
_CLOSE_SECS = 10.0


def next_attempt(folder: Path) -> int:
    """The number of the next attempt in a run's local folder, from 1.

    Raises:
        UserError: `logs` is a file.
    """
    logs = folder / "logs"
    if logs.exists() and not logs.is_dir():
        raise UserError(f"{logs} is a file", "logs go into a folder of that name: move it away")
    numbers = [
        int(match[1])
        for path in (logs.iterdir() if logs.exists() else ())
        if (match := re.fullmatch(r"attempt-(\d+)", path.name))
    ]
    return max(numbers, default=0) + 1


def claim_attempt(folder: Path) -> int:
    """Creates the log folder of the next attempt and returns its number.

    No other launcher gets the same number, unless the folder cannot be created: training does not
    fail because its logs cannot be written.
    """
    while True:
        number = next_attempt(folder)
        try:
            (folder / "logs" / f"attempt-{number}").mkdir(parents=True)
        except FileExistsError:
            continue  # another run was faster; one of the two will be refused
        except OSError:
            return number
        return number


class RankFile:
    """The log of one worker, which its launcher writes in a thread: each line with its time.

    Training continues without a log that cannot be written. The thread waits for a disk that is
    slow, and then so does a worker that prints much; the launcher does not.

    Args:
        folder: the run's local folder.
        attempt: number of the attempt.
        rank: of the worker.

    Attributes:
        path: of the file.
        lost_peers: what jax has written into it about lost peers.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self.path = folder / "logs" / f"attempt-{attempt}" / f"rank-{rank}.log"
        self.lost_peers = LostPeers()
        self._file: FileIO | None = None
        self._is_whole = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self.path, "a")
        except OSError as error:
            self._tell(error)

    def write(self, text: str) -> None:
        """Adds lines."""
        stamp = time.strftime(_STAMP)
        for line in text.removesuffix("\n").split("\n"):
            self.lost_peers.read(line)
            if self._file is not None:
                data = _encode(f"{stamp} {line}\n")
                _disk.put(functools.partial(self._append, self._file, data), len(data))

    def close(self) -> None:
        """Closes the file once all is written."""
        if self._file is not None:
            _disk.put(functools.partial(self._close, self._file), 0)

    def _append(self, file: FileIO, data: bytes) -> None:
        try:
            while data:
                data = data[file.write(data) :]
        except OSError as error:
            self._tell(error)

    def _close(self, file: FileIO) -> None:
        try:
            file.close()
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if self._is_whole:
            self._is_whole = False
            print_err(f"warning: {self.path} cannot be written: {error.strerror or error}")


def finish_logs(files: Sequence[RankFile]) -> None:
    """Closes logs, and waits for their disk for a while."""
    for file in files:
        file.close()
    if files and not _disk.flush(_CLOSE_SECS):
        folder = files[0].path.parent
        print_err(f"warning: the logs in {folder} are incomplete: their disk does not answer")


def is_log_disk_slow() -> bool:
    """Whether so much output waits for the disk that workers should wait with theirs."""
    return _disk.pending > _MAX_PENDING


def _encode(line: str) -> bytes:
    try:
        return line.encode("utf-8", "surrogateescape")  # the bytes that the worker has printed
    except UnicodeEncodeError:
        return line.encode("utf-8", "backslashreplace")


_disk = BackgroundWriter("podlift-logs")


def remove_logs(files: Iterable[RankFile]) -> None:
    """Removes logs, and their folders if nothing else is in them.

    A command that is refused leaves nothing behind.
    """
    for file in files:
        with contextlib.suppress(OSError):
            file.path.unlink()
            for folder in list(file.path.parents)[:3]:  # attempt-K, logs, the run's folder
                folder.rmdir()


class RankLog(logging.Handler):
    """Writes log records of a run in place to the rank's file, once the run owns its folder.

    Records are buffered until then, so that a run that is refused leaves nothing behind.

    Args:
        workdir: the run's folder.
        folder: its local folder.

    Attributes:
        attempt: its number, once the file exists.
    """

    def __init__(self, workdir: str, folder: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", _STAMP))
        self._workdir = workdir
        self._folder = folder
        self._buffered: list[str] = []
        self._path: Path | None = None
        self._file: TextIO | None = None
        self._identity: Identity | None = None
        self.attempt = 1

    @property
    def is_moved(self) -> bool:
        """Whether the path leads elsewhere by now: the run's folder was renamed or removed."""
        return self._identity is not None and self._identity.is_moved

    def emit(self, record: logging.LogRecord) -> None:
        """Writes or buffers one record."""
        self._buffered.append(self.format(record) + "\n")
        if self._path is not None or is_held(self._workdir):
            try:
                self.open()
            except (OSError, UserError):  # training continues on a full disk
                del self._buffered[:-1000]

    def write_from_handler(self, line: str) -> None:
        """Writes a line from a signal handler, past the locks of logging, if the file exists."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.write(self._file.fileno(), f"{time.strftime(_STAMP)} {line}\n".encode())

    def open(self) -> Path:
        """Creates the file if it does not exist, writes the buffer, and returns the path."""
        if self._path is None:
            self.attempt = next_attempt(self._folder)
            folder = self._folder / "logs" / f"attempt-{self.attempt}"
            folder.mkdir(parents=True)
            self._path = folder / "rank-0.log"
        if self._file is None:
            # Held open: the path may be given to another run.
            self._file = self._path.open("a", encoding="utf-8", errors="replace")
            self._identity = Identity(epath.Path(self._folder))
        if self._buffered:
            self._file.writelines(self._buffered)
            self._file.flush()
            self._buffered.clear()
        return self._path

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        super().close()
