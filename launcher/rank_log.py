"""The log file of one rank: `logs/attempt-K/rank-R.log` in the run's folder."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path

from trainer.workdir import is_claimed


def local_folder(workdir: str) -> Path:
    """Where a run's local files go: its workdir, or a temporary folder if that is remote."""
    if "://" not in workdir:
        return Path(os.path.abspath(os.path.expanduser(workdir)))
    digest = hashlib.sha256(workdir.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"podlift-{os.getuid()}" / digest


class RankLog(logging.Handler):
    """Writes log records to the rank's file, once the run has claimed its folder.

    Records are held back until then, so that a run that is refused leaves nothing behind.

    Args:
        workdir: the run's folder.
        rank: of this process.
    """

    def __init__(self, workdir: str, rank: int = 0) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._workdir = workdir
        self._folder = local_folder(workdir)
        self._rank = rank
        self._held: list[str] = []
        self._path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Takes one record, as logging.Handler says."""
        self._held.append(self.format(record) + "\n")
        if self._path is not None or is_claimed(self._workdir):
            try:
                self.open()
            except OSError:  # a full disk is no reason to stop training
                self.handleError(record)

    def open(self) -> Path:
        """Makes the file if need be, writes what was held back, and returns its path."""
        if self._path is None:
            logs = self._folder / "logs"
            numbers = [
                int(match[1])
                for path in (logs.iterdir() if logs.exists() else ())
                if (match := re.fullmatch(r"attempt-(\d+)", path.name))
            ]
            folder = logs / f"attempt-{max(numbers, default=0) + 1}"
            folder.mkdir(parents=True)
            self._path = folder / f"rank-{self._rank}.log"
        if self._held:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._held)
            self._held.clear()
        return self._path
