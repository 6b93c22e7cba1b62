"""A worker's progress, in a page of memory that it shares with its launcher.

A worker writes it with one store into memory, well under a microsecond, so supervision adds nothing
to a step. The page survives a worker that is killed.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

# In the order of a run. The page holds the index.
PHASES = ("spawn", "start", "load", "compile", "train", "wait", "evaluate", "save")
# What a worker does in each of them, in words.
DOING = {
    "spawn": "starts Python",
    "start": "imports jax, joins the others or restores",
    "load": "loads its data (config.data.target)",
    "compile": "compiles",
    "train": "takes a step",
    "wait": "waits for its data or its devices",
    "evaluate": "evaluates",
    "save": "saves",
}
_RECORD = struct.Struct("<qqq")


@dataclass(frozen=True)
class Progress:
    """A worker's last report.

    Attributes:
        count: number of reports.
        step: steps taken.
        phase: what the worker has begun since, one of `PHASES`.
    """

    count: int
    step: int
    phase: str


class ProgressPage:
    """The page of one worker, in an open file that the worker inherits from its launcher.

    Args:
        descriptor: of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._count = 0

    def write(self, step: int, phase: str) -> None:
        """Reports the steps taken and the phase that begins; for the worker."""
        self._count += 1
        _RECORD.pack_into(self._memory, 0, self._count, step, PHASES.index(phase))

    def read(self) -> Progress:
        """The last report; for the launcher."""
        count, step, phase = _RECORD.unpack_from(self._memory)
        return Progress(count, step, PHASES[phase])
