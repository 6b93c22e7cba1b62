"""Pauses a job of `benchmarks/peers.py` between segments, so that contestants take turns.

Standard library only, because torch's environment does not have podlift.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path


class Pauses:
    """Reports the end of a segment over a socket, and waits for the permission to continue.

    The process exits when the socket is closed.

    Args:
        address: path of a Unix socket; empty for a job without pauses.
        segment: steps from one pause to the next.
        rank: rank of this process.
    """

    def __init__(self, address: str, segment: int, rank: int) -> None:
        self._segment, self._rank = segment, rank
        self._lines = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address)
            self._lines = self._socket.makefile("rw")

    def is_due(self, step: int) -> bool:
        """Whether to pause before a step: in mid-segment, since saves are at the ends."""
        return self._lines is not None and step % self._segment == self._segment // 2

    def wait(self) -> None:
        """Pauses once. All work of the previous steps must be done."""
        assert self._lines is not None
        self._lines.write(json.dumps({"rank": self._rank, "peak_bytes": peak_bytes()}) + "\n")
        self._lines.flush()
        if not self._lines.readline():
            os._exit(0)  # no turns are left


def peak_bytes() -> int:
    """Peak resident memory of this process; that of `getrusage` includes its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
