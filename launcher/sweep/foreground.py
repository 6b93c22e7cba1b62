"""Commands in the foreground, one after the other: what this process is told goes to them."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from launcher.processes.signals import STACKS_SIGNAL, STOP_SIGNALS, write_from_handler


class Foreground:
    """Runs commands, each in a session of its own, so that Ctrl-C reaches it through here only.

    Use as a context manager, in the main thread.

    Attributes:
        asked_to_stop: whether a signal has asked for it; then nothing more is started.
    """

    def __init__(self) -> None:
        self.asked_to_stop = False
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Foreground:
        for number in (*STOP_SIGNALS, STACKS_SIGNAL):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._handlers[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str]) -> int | None:
        """Runs a command to its end.

        Returns:
            Its exit code as `subprocess` gives it; None if it was not started, since this process
            was asked to stop.
        """
        if self.asked_to_stop:
            return None
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_stop_with_parent(),
        )
        if self.asked_to_stop:  # while it was being started
            self._send(signal.SIGTERM)
        try:
            return self._process.wait()
        finally:
            self._process = None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number != STACKS_SIGNAL:
            again, self.asked_to_stop = self.asked_to_stop, True
            if number == signal.SIGINT and not again:
                write_from_handler(
                    "the run saves, then the sweep stops; Ctrl-C again stops at once"
                )
                number = signal.SIGTERM  # also well received by one that only just begins
        self._send(number)

    def _send(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _stop_with_parent() -> Callable[[], None] | None:
    """For a child between fork and exec: it is asked to stop when this process is gone; Linux."""
    if sys.platform != "linux":
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1

    def ask_kernel() -> None:
        prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)

    return ask_kernel
