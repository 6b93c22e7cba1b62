"""Whether this launcher itself was suspended: with its host, or by SIGSTOP."""

from __future__ import annotations

from collections.abc import Callable

from launcher.exit_codes import RETRY
from launcher.processes.failure import Failure
from launcher.rendezvous.protocol import Hello


class Pulse:
    """The times at which a launcher sends heartbeats.

    A launcher that was suspended for longer than the others wait is the cause of what it finds
    afterwards: closed connections, and peers that it has not heard of.

    Args:
        now: seconds on a monotonic clock.
        timeout: seconds of silence after which the others give it up.
    """

    def __init__(self, now: Callable[[], float], timeout: float) -> None:
        self._now = now
        self._timeout = timeout
        self._last = now()
        self._gap = 0.0

    def beat(self) -> bool:
        """To be called with each heartbeat; returns whether the launcher was suspended before."""
        self._gap = self._now() - self._last
        self._last = self._now()
        return self._gap > self._timeout

    def given_up(self, hello: Hello) -> Failure | None:
        """What a lost connection means, if the launcher was suspended just before.

        Args:
            hello: its own.
        """
        seconds = max(self._gap, self._now() - self._last)
        if seconds <= self._timeout:
            return None
        message = (
            f"the launcher of rank {hello.rank} on {hello.host} was suspended for {seconds:.0f} s, "
            "and the others have given it up\n  HINT: --heartbeat_timeout_secs waits longer"
        )
        return Failure(hello.rank, RETRY, message, host=hello.host)
