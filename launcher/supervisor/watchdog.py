"""Whether the workers move on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.processes.progress_page import Progress

# Compiling, saving and evaluating may take so many times as long as training.
_GENEROSITY = 10


@dataclass(frozen=True)
class Stuck:
    """The worker that is furthest behind, in a job of which one has not moved on.

    Attributes:
        rank: of the worker.
        progress: what it said last.
        seconds: since then.
    """

    rank: int
    progress: Progress
    seconds: float


class Watchdog:
    """Remembers what each worker said last, and since when.

    Args:
        timeout: seconds without progress while training; ten times as long for anything else.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._seen: dict[int, tuple[Progress, float]] = {}

    @property
    def period(self) -> float:
        """How often to look, in seconds."""
        return min(5.0, max(0.1, self._timeout / 10))

    def look(self, said: Mapping[int, Progress], now: float) -> Stuck | None:
        """Takes note of what each worker has said; returns who holds up the job, if anyone does.

        Args:
            said: by rank, for all workers that have not ended.
            now: seconds on a monotonic clock.
        """
        is_stuck = False
        for rank, progress in said.items():
            before, since = self._seen.get(rank, (None, now))
            if progress != before:
                since = now
            self._seen[rank] = (progress, since)
            is_training = progress.phase in ("train", "wait")
            allowed = self._timeout * (1 if is_training else _GENEROSITY)
            is_stuck |= now - since > allowed
        if not is_stuck:
            return None
        # The others wait for it, and may have come to a standstill before it is too late for it.
        behind = min(said, key=lambda rank: (said[rank].count, rank))
        progress, since = self._seen[behind]
        return Stuck(behind, progress, now - since)
