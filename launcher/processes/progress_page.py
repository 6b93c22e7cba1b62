"""How far a worker is, told to its launcher through a page of memory that both have mapped.

Writing it is a store into memory, well under a microsecond, so a step costs no more with a
launcher that watches than without. The page outlives a worker that was killed.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

# In the order of a run; the number of a phase is its place here.
PHASES = ("spawn", "start", "compile", "train", "wait", "evaluate", "save")
_RECORD = struct.Struct("<qqq")


@dataclass(frozen=True)
class Progress:
    """What a worker said last.

    Attributes:
        count: how often it has said something.
        step: steps taken.
        phase: what it went on to do, one of `PHASES`.
    """

    count: int
    step: int
    phase: str


class ProgressPage:
    """The page of one worker, in an open file that its launcher made and hands down.

    Args:
        descriptor: of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)
        self._count = 0

    def write(self, step: int, phase: str) -> None:
        """For the worker: it has taken so many steps, and goes on to `phase`."""
        self._count += 1
        _RECORD.pack_into(self._memory, 0, self._count, step, PHASES.index(phase))

    def read(self) -> Progress:
        """For the launcher: what was said last."""
        count, step, phase = _RECORD.unpack_from(self._memory)
        return Progress(count, step, PHASES[phase])
