"""Waiting for files, signals and timers at once, in one thread and without jax or asyncio."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Any


class Timer:
    """Something that is due once; `cancel` calls it off."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Calls it off."""
        self._callback = None

    def fire(self) -> None:
        """Calls back, unless called off."""
        if self._callback is not None:
            self._callback()


class EventLoop:
    """Calls back when a file can be read, a signal has arrived or a time has come.

    Signals only leave a byte in a socket, and are acted on between other callbacks. Use as a
    context manager, in the main thread: handlers are put back at its end.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._on_signal: dict[int, Callable[[], None]] = {}
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> EventLoop:
        self._woken, wake = socket.socketpair()
        self._woken.setblocking(False)
        wake.setblocking(False)
        self._wake = wake
        self._previous = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        self.watch(self._woken, self._take_signals)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous)
        self._selector.close()
        self._woken.close()
        self._wake.close()

    def watch(self, file: Any, callback: Callable[[], None]) -> None:
        """Calls back each time `file` (with a `fileno`, or the number) can be read."""
        self._selector.register(file, selectors.EVENT_READ, callback)

    def forget(self, file: Any) -> None:
        """Ends `watch`; a file that is not watched is no error."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(file)

    def on_signal(self, number: int, callback: Callable[[], None]) -> None:
        """Calls back after each arrival of a signal."""
        self._on_signal[number] = callback
        previous = signal.signal(number, lambda number, frame: None)
        self._handlers.setdefault(number, previous)

    def call_in(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Calls back once, after so many seconds."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (self.clock() + seconds, next(self._numbers), timer))
        return timer

    def run(self, until: Callable[[], bool]) -> None:
        """Goes on until `until()` says so after a callback."""
        while not until():
            timeout = None
            if self._timers:
                timeout = max(0.0, self._timers[0][0] - self.clock())
            for key, _ in self._selector.select(timeout):
                # Unless a callback of this round has forgotten it, and perhaps closed it.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()
            while self._timers and self._timers[0][0] <= self.clock():
                heapq.heappop(self._timers)[2].fire()

    def _take_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._woken.recv(4096):
                if number in self._on_signal:
                    self._on_signal[number]()
