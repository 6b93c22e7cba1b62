"""Being asked to stop, and how all processes of a job come to stop at the same step.

SIGTERM, SIGUSR1 (what schedulers and mpirun pass on), SIGINT and SIGHUP (a closed terminal) all ask
for the same: save and stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

# The stacks of all threads go to stderr, and so to the rank's log, even while the process is inside
# a collective.
STACKS_SIGNAL = signal.SIGUSR2

STOPPED_AT_ONCE = "stopped at once; not saved"


class StopRequest:
    """Remembers that this process was asked to stop. Call it to ask whether it was.

    Args:
        last_words: where a person may press Ctrl-C; the first is answered with a line, the second
            does not wait, and is told here, out of a signal handler.
    """

    def __init__(self, last_words: Callable[[str], None] | None = None) -> None:
        self._requested = False
        self._last_words = last_words

    def __call__(self, step: int, phase: str) -> bool:
        """Whether the process was asked to stop."""
        return self._requested

    def install(self) -> None:
        """Takes over the signals for the rest of the process."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self._requested = self._requested, True
        if number == signal.SIGINT and self._last_words is not None:
            if again:
                write_from_handler(f"{_show_cursor()}{STOPPED_AT_ONCE}")
                self._last_words(STOPPED_AT_ONCE)
                os._exit(128 + signal.SIGINT)
            write_from_handler("SIGINT: saving, then stopping; Ctrl-C again to stop at once")


def write_from_handler(line: str) -> None:
    """Writes a line to stderr out of a signal handler, which may have interrupted a `print`.

    Ctrl-C also ends a `tee` that stderr goes to: nobody there to read is no reason not to save.
    """
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{line}\n".encode())


def _show_cursor() -> str:
    """What gives a terminal back the cursor that the live view has hidden (ECMA-48, DECTCEM)."""
    return "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""


class SyncPoint:
    """Whether all processes of the job are to stop now, after any of them was asked to.

    jax notices SIGTERM itself (it replaces Python's handler when it joins a cluster) and lets the
    processes agree on a number that none of them has reached yet. The number counts the calls, not
    the steps: in an evaluation the step stands still. It takes about a second.
    """

    def __init__(self) -> None:
        self._count = 0
        self._reached = False

    def __call__(self, step: int, phase: str) -> bool:
        """To be asked by all processes at the same points of the run, but when they "wait"."""
        if phase == "wait":
            return self._reached
        from jax.experimental import multihost_utils

        self._count += 1
        if not self._reached and multihost_utils.reached_preemption_sync_point(self._count):
            self._reached = True
        return self._reached


def reset_signals() -> None:
    """For a forked child of user code: what ends it must not ask a run to save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def forward_to_jax(request: StopRequest) -> None:
    """After jax has taken over SIGTERM: passes on what arrived before, and the other signals."""
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: os.kill(os.getpid(), signal.SIGTERM))
    if request(0, "start"):
        os.kill(os.getpid(), signal.SIGTERM)


def with_progress(
    stop_requested: Callable[[int, str], bool], tell: Callable[[int, str], None]
) -> Callable[[int, str], bool]:
    """`stop_requested`, telling each time how far the run is."""

    def ask(step: int, phase: str) -> bool:
        tell(step, phase)
        return stop_requested(step, phase)

    return ask
