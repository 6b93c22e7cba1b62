"""Waits for files, signals, timers and threads in one thread: callbacks on an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


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

    def call_in_thread(
        self,
        function: Callable[[], T],
        on_result: Callable[[T], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        """Calls a function that may block in a thread of its own, then back with what came of it.

        A thread that never ends does not hold up the exit of the process.

        Args:
            function: blocks for as long as it likes.
            on_result: gets what it returns, unless the loop is closed by then.
            on_error: gets what it raises instead.
        """

        def work() -> None:
            try:
                callback = functools.partial(on_result, function())
            except Exception as error:
                callback = functools.partial(on_error, error)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._call, callback)

        threading.Thread(target=work, name="podlift-blocking", daemon=True).start()

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
