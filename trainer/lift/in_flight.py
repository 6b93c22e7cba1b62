"""Calls of the step that are dispatched and not yet read: at most 16 at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

# XLA:CPU deadlocks with more than 32 computations in flight on several devices (jax 0.10), and a
# window of 16 was measured to cost nothing.
MAX_IN_FLIGHT = 16


class InFlight:
    """Calls that were dispatched and whose metrics have not been read.

    Reading a call's metrics waits for it, so holding at most `limit` bounds how far the host runs
    ahead of the devices without ever waiting for the newest call.
    """

    def __init__(self, read: Callable[[Any], np.ndarray], limit: int = MAX_IN_FLIGHT) -> None:
        self._read = read
        self._limit = limit
        self._calls: deque[tuple[Any, Any]] = deque()

    def push(self, key: Any, values: Any) -> list[tuple[Any, Any]]:
        """Adds a call; returns those that had to be read to keep within the limit."""
        self._calls.append((key, values))
        return self._pop(self._limit)

    def drain(self) -> list[tuple[Any, Any]]:
        """Reads all that is left."""
        return self._pop(0)

    def _pop(self, left: int) -> list[tuple[Any, Any]]:
        finished = []
        while len(self._calls) > left:
            key, values = self._calls.popleft()
            finished.append((key, self._read(values)))
        return finished
