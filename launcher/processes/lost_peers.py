"""What jax logs before it aborts a process whose peers are gone."""

from __future__ import annotations

import re

# Of jax, and of gloo where it throws in a thread of its own.
_ABORTS = re.compile(r"distributed service detected fatal errors|terminate called .*'gloo::")
_LIST = "tasks are unhealthy (stopped sending heartbeats):"
# Since jax 0.10 a number alone.
_TASK = re.compile(r"(?:/job:\S*/task:)?(\d+)")
# A process that gets no answer to its own heartbeat has lost the coordinator, which is in rank 0.
_NO_ANSWER = "CoordinationService/Heartbeat"


class LostPeers:
    """Reads the log of one process, line by line, whatever follows: jax adds long stacks.

    Attributes:
        are_lost: whether jax or gloo has aborted the process for this reason.
    """

    def __init__(self) -> None:
        self.are_lost = False
        self._ranks: set[int] = set()
        self._in_list = False

    def read(self, line: str) -> None:
        """Takes the next line."""
        task = _TASK.fullmatch(line.strip()) if self._in_list else None
        self._in_list = task is not None or line.rstrip().endswith(_LIST)
        if task is not None:
            self._ranks.add(int(task[1]))
        self.are_lost |= _ABORTS.search(line) is not None
        if self.are_lost and _NO_ANSWER in line:
            self._ranks.add(0)

    def __str__(self) -> str:
        """The ranks that jax names, in words."""
        if not self._ranks:
            return "its peers"
        ranks = ", ".join(map(str, sorted(self._ranks)))
        return f"rank{'s' * (len(self._ranks) > 1)} {ranks}"
