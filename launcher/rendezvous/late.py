"""Which rank all others wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from launcher.processes.failure import Failure

# Without progress of any rank, until the rank that is late is named; then twice as long, and so on.
_TELL_SECS = 20.0


@dataclass(frozen=True)
class Idle:
    """A rank that has not reported progress for a while.

    Attributes:
        hang: the failure that it would be if this lasted.
        doing: what it does, as the predicate of a sentence.
        seconds: since its last report.
    """

    hang: Failure
    doing: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For another launcher."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Idle:
        """The inverse of `to_json`."""
        hang = Failure.from_json(values["hang"])
        return cls(hang, str(values["doing"]), float(values["seconds"]))


class Late:
    """Remembers which ranks are idle, to name the one that holds up the others.

    Args:
        size: number of ranks.
        fresh_secs: how long a report is valid; longer than launchers take to the next one.
        now: seconds on a monotonic clock.
    """

    def __init__(self, size: int, fresh_secs: float, now: Callable[[], float]) -> None:
        self._size = size
        self._fresh_secs = fresh_secs
        self._now = now
        self._idle: dict[int, tuple[Idle, float]] = {}
        self._tell_secs = _TELL_SECS

    def add(self, idle: Idle) -> str | None:
        """Takes a report; returns a line for the user where it is time for one."""
        self._idle[idle.hang.rank] = idle, self._now()
        found = self._fresh()
        seconds = min(each.seconds for each in found)
        counts = {each.hang.count or 0 for each in found}
        # Ranks that have all come equally far do the same, and none of them is late.
        if len(found) < self._size or seconds < self._tell_secs or len(counts) == 1:
            return None
        self._tell_secs *= 2
        late = [each for each in found if (each.hang.count or 0) == min(counts)]
        ranks = ", ".join(str(each.hang.rank) for each in late[:8]) + ", ..." * (len(late) > 8)
        rank = "ranks" if len(late) > 1 else "rank"
        first = f"rank {late[0].hang.rank} " if len(late) > 1 else "it "
        return f"waiting for {rank} {ranks} for {seconds:.0f} s: {first}{late[0].doing}"

    def hangs(self) -> list[Failure]:
        """What the idle ranks would fail with, the least advanced first."""
        return sorted((each.hang for each in self._fresh()), key=lambda hang: hang.count or 0)

    def _fresh(self) -> list[Idle]:
        oldest = self._now() - self._fresh_secs
        return [idle for _, (idle, at) in sorted(self._idle.items()) if at >= oldest]
