"""Waits for files, signals and timers in one thread: callbacks on an asyncio loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any


class EventLoop:
    """Calls back when a file is readable, a signal has arrived or a timer has expired.

    Unlike asyncio's loop, it runs until a condition holds, raises what a callback raises, and
    restores the signal handlers that it has replaced. A context manager, for the main thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.SelectorEventLoop()
        self._until: Callable[[], bool] = lambda: True
        self._errors: list[Exception] = []
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> EventLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def time(self) -> float:
        """Seconds on a monotonic clock."""
        return self._loop.time()

    def add_reader(self, file: Any, callback: Callable[[], None]) -> None:
        """Calls back each time `file` (a descriptor, or an object with one) is readable."""
        self._loop.add_reader(file, self._call, callback)

    def remove_reader(self, file: Any) -> None:
        """Ends `add_reader`, for a file that is still open; does nothing where there was none."""
        self._loop.remove_reader(file)

    def add_signal_handler(self, number: int, callback: Callable[[], None]) -> None:
        """Calls back after each arrival of a signal, between two other callbacks."""
        self._previous_handlers.setdefault(number, signal.getsignal(number))
        self._loop.add_signal_handler(number, self._call, callback)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Calls back once, after a delay; the handle cancels it."""
        return self._loop.call_later(seconds, self._call, callback)

    def run(self, until: Callable[[], bool]) -> None:
        """Runs callbacks until `until()` holds, which is evaluated after each of them.

        Raises:
            Exception: what a callback raised. The loop can run again. Where two callbacks of one
                round raise, the next `run` raises the second exception.
        """
        self._until = until
        while not (self._errors or until()):
            self._loop.run_forever()
        if self._errors:
            raise self._errors.pop(0)

    def _call(self, callback: Callable[[], None]) -> None:
        try:
            callback()
            if self._until():
                self._loop.stop()
        except Exception as error:
            self._errors.append(error)
            self._loop.stop()
