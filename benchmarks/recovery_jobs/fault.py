"""The fault that strikes the jobs of `recovery.py` and `faults.py` once, between two steps."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def strike(kind: str, mark: str) -> None:
    """Makes this process fail, unless one has failed already.

    Args:
        kind: "kill", "raise", "stall" or "term".
        mark: a file for the time of the event, in seconds since the epoch.
    """
    if os.path.exists(mark):
        return
    Path(mark).write_text(repr(time.time()))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise":
        raise ValueError("a fault of the user's code")
    if kind == "stall":
        time.sleep(10_000)
    if kind == "term":
        os.kill(os.getpid(), signal.SIGTERM)
