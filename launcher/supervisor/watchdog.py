"""Finds workers that make no progress."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.processes.progress_page import Progress

# For compiling, saving and evaluating, as a multiple of the time for training.
_FACTOR_OUTSIDE_TRAINING = 10
# Without a report, until a worker counts as idle.
_IDLE_SECS = 5.0


@dataclass(frozen=True)
class Stuck:
    """The worker that is furthest behind, in a job that makes no progress.

    Attributes:
        rank: of the worker.
        progress: its last report.
        seconds: since that report.
        is_suspended: whether a signal has stopped it.
    """

    rank: int
    progress: Progress
    seconds: float
    is_suspended: bool


def furthest_behind(reports: Mapping[int, Progress], suspended: Collection[int]) -> int:
    """The rank that the others wait for: a suspended one, or that with the fewest reports."""
    return min(reports, key=lambda rank: (rank not in suspended, reports[rank].count, rank))


class Watchdog:
    """Remembers the last report of each worker, and since when it is unchanged.

    Args:
        timeout: seconds without progress in training; ten times as long in any other phase.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._seen: dict[int, tuple[Progress, float]] = {}
        self._now = 0.0

    @property
    def period(self) -> float:
        """Seconds between two checks."""
        return min(5.0, max(0.1, self._timeout / 10))

    def check(
        self, reports: Mapping[int, Progress], now: float, suspended: Collection[int] = ()
    ) -> Stuck | None:
        """The worker that holds up the job, if one does.

        Args:
            reports: the last report of every worker that has not ended, by rank.
            now: seconds on a monotonic clock.
            suspended: ranks that a signal has stopped.
        """
        is_stuck = False
        self._now = now
        self._seen = {rank: seen for rank, seen in self._seen.items() if rank in reports}
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
        behind = furthest_behind(reports, suspended)
        progress, since = self._seen[behind]
        return Stuck(behind, progress, now - since, behind in suspended)

    def idle(self, suspended: Collection[int]) -> list[Stuck]:
        """The workers that had not reported for a while at the last `check`.

        Args:
            suspended: ranks that a signal has stopped.
        """
        least = min(_IDLE_SECS, self._timeout / 3)
        return [
            Stuck(rank, progress, self._now - since, rank in suspended)
            for rank, (progress, since) in self._seen.items()
            if self._now - since >= least
        ]
