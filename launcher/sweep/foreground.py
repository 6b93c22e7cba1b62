"""Runs commands one after the other, and passes this process's signals on to them."""

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
    """Runs commands, each in its own session, so that Ctrl-C reaches them only through here.

    Use as a context manager, in the main thread.

    Attributes:
        asked_to_stop: whether a signal has requested a stop; then no other command starts.
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
            Its exit code as in `subprocess`; None if it did not start, because of a request to
            stop.
        """
        if self.asked_to_stop:
            return None
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_stop_with_parent(),
        )
        if self.asked_to_stop:  # while it started
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
                number = signal.SIGTERM  # a command that has just started handles it, too
        self._send(number)

    def _send(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _stop_with_parent() -> Callable[[], None] | None:
    """For a child between fork and exec: the kernel stops it when this process ends. Linux only."""
    if sys.platform != "linux":
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1

    def ask_kernel() -> None:
        prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)

    return ask_kernel
