"""Bounds how many calls of the step are in flight: dispatched, with metrics not yet read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# XLA:CPU deadlocks with more than 32 computations in flight on several devices (jax 0.10). A limit
# of 16 costs nothing measurable.
MAX_IN_FLIGHT = 16


class InFlight:
    """A queue of dispatched calls whose metrics have not been read.

    Reading the metrics of a call waits for it. Keeping at most `limit` calls bounds how far the
    host runs ahead of the devices, without ever waiting for the newest call.

    Args:
        read: turns the metrics on the devices into numpy arrays.
        limit: how many calls may be in flight.
    """

    def __init__(self, read: Callable[[Any], np.ndarray], limit: int = MAX_IN_FLIGHT) -> None:
        self._read = read
        self._limit = limit
        self._calls: deque[tuple[Any, Any]] = deque()

    def push(self, key: Any, values: Any) -> list[tuple[Any, Any]]:
        """Adds a call; returns the calls, with their metrics, that the limit made it read."""
        self._calls.append((key, values))
        finished = []
        while len(self._calls) > self._limit:
            finished.append(self._pop())
        return finished

    def drain(self) -> Iterator[tuple[Any, Any]]:
        """Reads all calls that are left, each when it is asked for."""
        while self._calls:
            yield self._pop()

    def clear(self) -> None:
        """Forgets all calls that are left, and does not wait for them."""
        self._calls.clear()

    def _pop(self) -> tuple[Any, Any]:
        key, values = self._calls.popleft()
        return key, self._read(values)
