"""Writes in a thread, so that a terminal or a disk that blocks does not hold up the launcher."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundWriter:
    """A thread that writes one thing after the other.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._pending = 0
        self._thread: threading.Thread | None = None

    @property
    def pending(self) -> int:
        """The size of what is not written yet, in bytes. Whoever calls `put` bounds it."""
        return self._pending

    def put(self, write: Callable[[], None], size: int) -> None:
        """Has something written, soon.

        Args:
            write: writes it; raises nothing.
            size: its memory in bytes.
        """
        size += 200  # for its place in the queue
        with self._changed:
            self._waiting.append((write, size))
            self._pending += size
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Waits until all is written, or until the time is over; whether all is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                write, size = self._waiting.popleft()
            write()
            del write  # it holds the text
            with self._changed:
                self._pending -= size
                self._changed.notify_all()
