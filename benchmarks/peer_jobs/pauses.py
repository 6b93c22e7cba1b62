"""Where a job of `benchmarks/peers.py` pauses, so that the contestants take turns.

Only the standard library: torch's environment has nothing else of ours.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path


class Pauses:
    """Says over a socket that a segment is done, and waits to be told to go on.

    The process ends where the socket is closed.

    Args:
        address: a Unix socket; none where the job is to run through.
        segment: steps from one pause to the next.
        rank: of this process.
    """

    def __init__(self, address: str, segment: int, rank: int) -> None:
        self._segment, self._rank = segment, rank
        self._lines = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address)
            self._lines = self._socket.makefile("rw")

    def is_due(self, step: int) -> bool:
        """Whether there is one before a step. Not at the segments' ends: saves fall on those."""
        return self._lines is not None and step % self._segment == self._segment // 2

    def wait(self) -> None:
        """One pause. All work of the steps so far must be done."""
        assert self._lines is not None
        self._lines.write(json.dumps({"rank": self._rank, "peak_bytes": peak_bytes()}) + "\n")
        self._lines.flush()
        if not self._lines.readline():
            os._exit(0)  # all turns are over


def peak_bytes() -> int:
    """The most memory this process has held at once; `getrusage` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
