"""Finds workers that make no progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.processes.progress_page import Progress

# For compiling, saving and evaluating, as a multiple of the time for training.
_FACTOR_OUTSIDE_TRAINING = 10


@dataclass(frozen=True)
class Stuck:
    """The worker that is furthest behind, in a job that makes no progress.

    Attributes:
        rank: of the worker.
        progress: its last report.
        seconds: since that report.
    """

    rank: int
    progress: Progress
    seconds: float


class Watchdog:
    """Remembers the last report of each worker, and since when it is unchanged.

    Args:
        timeout: seconds without progress in training; ten times as long in any other phase.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._seen: dict[int, tuple[Progress, float]] = {}

    @property
    def period(self) -> float:
        """Seconds between two checks."""
        return min(5.0, max(0.1, self._timeout / 10))

    def check(self, reports: Mapping[int, Progress], now: float) -> Stuck | None:
        """The worker that holds up the job, if one does.

        Args:
            reports: the last report of every worker that has not ended, by rank.
            now: seconds on a monotonic clock.
        """
        is_stuck = False
        for rank, progress in reports.items():
            before, since = self._seen.get(rank, (None, now))
            if progress != before:
                since = now
            self._seen[rank] = (progress, since)
            is_training = progress.phase in ("train", "wait")
            allowed = self._timeout * (1 if is_training else _FACTOR_OUTSIDE_TRAINING)
            is_stuck |= now - since > allowed
        if not is_stuck:
            return None
        # The others wait for this one, and may exceed their time before it does.
        behind = min(reports, key=lambda rank: (reports[rank].count, rank))
        progress, since = self._seen[behind]
        return Stuck(behind, progress, now - since)
