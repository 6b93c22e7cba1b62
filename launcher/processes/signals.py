"""Requests to stop, and how all processes of a job agree on the step at which they stop.

SIGTERM, SIGINT, SIGHUP (a closed terminal), SIGUSR1 and SIGUSR2 (before a time limit: SLURM as its
--signal says, submitit, LSF, SGE; mpirun forwards both) and SIGXCPU (a limit of CPU time) all mean:
save, then stop. SIGQUIT (Ctrl-Backslash) stops nothing: as in Java, it asks for the stacks of all
threads.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)

# All threads write their stacks to stderr, and so to the rank's log, even while the process is
# inside a collective.
STACKS_SIGNAL = signal.SIGQUIT

STOPPED_AT_ONCE = "stopped at once; not saved"


class StopRequest:
    """Whether this process was asked to stop; call it to find out.

    Args:
        on_exit: only where a user may press Ctrl-C: the first prints a line, the second ends the
            process at once, after a call of this from the signal handler.
    """

    def __init__(self, on_exit: Callable[[str], None] | None = None) -> None:
        self._requested = False
        self._on_exit = on_exit

    def __call__(self, step: int, phase: str) -> bool:
        """Whether the process was asked to stop."""
        return self._requested

    def install(self) -> None:
        """Handles the stop signals for the rest of the process."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._requested = self._requested, True
        if number == signal.SIGINT and self._on_exit is not None:
            if again:
                write_from_handler(f"{_show_cursor()}{STOPPED_AT_ONCE}")
                self._on_exit(STOPPED_AT_ONCE)
                os._exit(128 + signal.SIGINT)
            write_from_handler("SIGINT: saving, then stopping; Ctrl-C again to stop at once")


def write_from_handler(line: str) -> None:
    """Writes a line to stderr from a signal handler, which may have interrupted a `print`.

    Errors are ignored: Ctrl-C also ends a `tee` that reads stderr, and the run must save all the
    same.
    """
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())


def _show_cursor() -> str:
    """The sequence that shows the cursor, which the live view hides (ECMA-48, DECTCEM)."""
    return "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""


class SyncPoint:
    """Whether all processes of the job stop now, because any of them was asked to.

    jax catches SIGTERM itself (it replaces Python's handler in `jax.distributed.initialize`) and
    lets the processes agree on a number that none of them has reached yet, in about a second. The
    number counts calls, not steps, because the step does not change during an evaluation.
    """

    def __init__(self) -> None:
        self._count = 0
        self._reached = False

    def __call__(self, step: int, phase: str) -> bool:
        """To be called by all processes at the same points of the run, except in phase "wait"."""
        if phase == "wait":
            return self._reached
        from jax.experimental import multihost_utils

        self._count += 1
        if not self._reached and multihost_utils.reached_preemption_sync_point(self._count):
            self._reached = True
        return self._reached


def reset_signals() -> None:
    """Restores the default handlers, in a forked child of user code: a signal ends it at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def forward_to_jax(request: StopRequest) -> None:
    """Turns other stop signals, and one that arrived earlier, into SIGTERM, which jax handles.

    To be called after `jax.distributed.initialize`.
    """
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    if request(0, "start"):
        os.kill(os.getpid(), signal.SIGTERM)


def with_progress(
    stop_requested: Callable[[int, str], bool], report: Callable[[int, str], None]
) -> Callable[[int, str], bool]:
    """`stop_requested` that first reports step and phase at each call."""

    def report_and_ask(step: int, phase: str) -> bool:
        report(step, phase)
        return stop_requested(step, phase)

    return report_and_ask
