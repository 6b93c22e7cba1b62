"""Disturbances that a run has to wait out, without a restart."""

from __future__ import annotations

import signal
import time

from clock_step import Clock
from running import Start, send, wait_until, worker_of
from script import Disturbance


def wait_out(start: Start, disturbance: Disturbance, clock: Clock | None) -> bool:
    """Suspends a rank for a while, or steps the clock of a run.

    Args:
        start: of the run.
        disturbance: of the kind "suspend", "late" or "clock".
        clock: that the run follows; for "clock".

    Returns:
        False if the launcher or the rank ends before.
    """
    if disturbance.kind == "clock":
        assert clock is not None
        clock.step(int(disturbance.seconds))
        return True
    rank = int(disturbance.target.removeprefix("rank "))
    if not wait_until(start, lambda: worker_of(start.workdir, rank) is not None):
        return False
    if disturbance.kind == "late":
        time.sleep(disturbance.seed / 2)  # while it starts Python or imports jax
    pid = worker_of(start.workdir, rank)
    if pid is None or not send(pid, signal.SIGSTOP):
        return False
    time.sleep(disturbance.seconds)
    return send(pid, signal.SIGCONT)
