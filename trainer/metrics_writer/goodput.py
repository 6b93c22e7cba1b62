"""Where the time of a run goes, over all its starts. Its goodput is the share of steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

# All other time is "step", or a kind that only some runs have.
KINDS = ("start", "restart", "compile", "data", "evaluate", "save")


class Goodput:
    """Adds up seconds by kind.

    The time of a killed attempt past its newest checkpoint is lost with it.

    Args:
        clock: seconds, monotonic.
        cpu_clock: seconds of processor time of the calling thread.
    """

    def __init__(
        self, clock: Callable[[], float], cpu_clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._since, self._cpu_since = clock(), cpu_clock()
        self._cpu_spent: dict[str, float] = {}
        self._kind = "start"
        self._spent = dict.fromkeys((*KINDS, "step"), 0.0)
        self.starts = 1

    @contextlib.contextmanager
    def spending(self, kind: str) -> Generator[None]:
        """Counts the time of a block as this kind, except blocks of another kind within it."""
        outer = self._kind
        self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def begin_steps(self) -> None:
        """Counts all time that is not of another kind as "step" from now on."""
        self._switch("step")

    def waiting(self, batches: Iterable[Any]) -> Generator[Any]:
        """Yields the batches, and counts the wait for each as "data"."""
        iterator, end = iter(batches), object()
        while True:
            with self.spending("data"):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch

    def seconds(self) -> dict[str, float]:
        """Seconds by kind until now, over all starts."""
        # Changes nothing: the thread of the live view calls it too.
        spent = dict(self._spent)
        spent[self._kind] = spent.get(self._kind, 0.0) + self._clock() - self._since
        return spent

    def cpu_seconds(self, kind: str) -> float:
        """Seconds of processor time of one kind in this start, without waits."""
        spent = self._cpu_spent.get(kind, 0.0)
        return spent + self._cpu_clock() - self._cpu_since if kind == self._kind else spent

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seconds": self.seconds(), "starts": self.starts}

    def resume(self, saved: Mapping[str, Any] | None) -> None:
        """Adds what `to_json` gave in an earlier start; the time until now becomes "restart"."""
        self._switch("restart")
        self._spent["restart"] += self._spent["start"]
        self._spent["start"] = 0.0
        if saved is None:  # a checkpoint of a podlift without goodput
            return
        for kind, seconds in saved["seconds"].items():
            self._spent[kind] = self._spent.get(kind, 0.0) + seconds
        self.starts += saved["starts"]

    def shares(self) -> dict[str, float]:
        """The share of each kind in the whole time, largest first, without empty kinds."""
        seconds = self.seconds()
        total = sum(seconds.values()) or 1.0
        shares = {kind: spent / total for kind, spent in seconds.items() if spent > 0}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def _switch(self, kind: str) -> None:
        now, cpu_now = self._clock(), self._cpu_clock()
        self._spent[self._kind] = self._spent.get(self._kind, 0.0) + now - self._since
        cpu_spent = self._cpu_spent.get(self._kind, 0.0)
        self._cpu_spent[self._kind] = cpu_spent + cpu_now - self._cpu_since
        self._kind, self._since, self._cpu_since = kind, now, cpu_now
