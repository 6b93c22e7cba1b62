"""The log file of a rank: `logs/attempt-K/rank-R.log` in the run's folder."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from trainer.console import warn
from trainer.errors import UserError
from trainer.workdir.lock import is_held

_STAMP = "%Y-%m-%d %H:%M:%S"


def next_attempt(folder: Path) -> int:
    """The number of the next attempt in a run's local folder, from 1.

    Raises:
        UserError: there can be no logs.
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
    """Makes the folder of the next attempt's logs, which nobody else makes; returns its number.

    A disk that takes no logs is no reason not to train: then the number may not be the only one.
    """
    while True:
        number = next_attempt(folder)
        try:
            (folder / "logs" / f"attempt-{number}").mkdir(parents=True)
        except FileExistsError:
            continue  # another run has come first; one of them will be refused
        except OSError:
            return number
        return number


class RankFile:
    """The log of one worker, kept by its launcher, line by line with the time of each.

    A log that cannot be written is left out; training goes on.

    Args:
        folder: the run's local folder.
        attempt: its number.
        rank: of the worker.
    """

    def __init__(self, folder: Path, attempt: int, rank: int) -> None:
        self.path = folder / "logs" / f"attempt-{attempt}" / f"rank-{rank}.log"
        self._tail: deque[str] = deque(maxlen=100)
        self._file: TextIO | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8", errors="replace", buffering=1)
        except OSError as error:
            warn(f"{self.path} cannot be written: {error.strerror or error}")

    def write(self, text: str) -> None:
        """Adds lines."""
        stamp = time.strftime(_STAMP)
        for line in text.splitlines():
            self._tail.append(line[:1000])
            with contextlib.suppress(OSError):
                if self._file is not None:
                    self._file.write(f"{stamp} {line}\n")

    @property
    def tail(self) -> str:
        """The last hundred lines."""
        return "\n".join(self._tail)

    def close(self) -> None:
        """Closes the file; also one that could not be written."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def remove_logs(files: Iterable[RankFile]) -> None:
    """Takes back logs, and their folders as far as nothing else is in them.

    A refused command leaves nothing behind.
    """
    for file in files:
        with contextlib.suppress(OSError):
            file.path.unlink()
            for place in list(file.path.parents)[:3]:  # attempt-K, logs, the run's folder
                place.rmdir()


class RankLog(logging.Handler):
    """Writes log records to the rank's file, once the run has claimed its folder.

    Records are held back until then, so that a run that is refused leaves nothing behind.

    Args:
        workdir: the run's folder.
        folder: its local folder.

    Attributes:
        attempt: its number, once the file is there.
    """

    def __init__(self, workdir: str, folder: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", _STAMP))
        self._workdir = workdir
        self._folder = folder
        self._held: list[str] = []
        self._path: Path | None = None
        self.attempt = 1

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one record, as logging.Handler says."""
        self._held.append(self.format(record) + "\n")
        if self._path is not None or is_held(self._workdir):
            try:
                self.open()
            except (OSError, UserError):  # a full disk is no reason to stop training
                del self._held[:-1000]

    def last_words(self, line: str) -> None:
        """Writes to the file, if there is one, from a signal handler: past the locks of logging."""
        if self._path is not None:
            with contextlib.suppress(OSError), self._path.open("ab", buffering=0) as file:
                file.write(f"{time.strftime(_STAMP)} {line}\n".encode())

    def open(self) -> Path:
        """Makes the file if need be, writes what was held back, and returns its path."""
        if self._path is None:
            self.attempt = next_attempt(self._folder)
            folder = self._folder / "logs" / f"attempt-{self.attempt}"
            folder.mkdir(parents=True)
            self._path = folder / "rank-0.log"
        if self._held:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._held)
            self._held.clear()
        return self._path
