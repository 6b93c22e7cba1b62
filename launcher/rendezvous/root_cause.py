"""Which of several failures is the root cause."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from launcher.exit_codes import RETRY
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import CONSEQUENCE, Failure

# The consequences of a rank's end show within milliseconds.
_SETTLE_SECS = 0.1


class RootCause:
    """Collects failures, and decides after a short while which came first.

    Args:
        loop: to wait with.
        on_decision: called once, with the root cause.
        consequence_secs: how long to wait for the cause where only consequences were reported.
        hang_secs: how long to wait for other reports of a hang. Launchers check at intervals, and
            the rank that is furthest behind is the one that holds up the others.
    """

    def __init__(
        self,
        loop: EventLoop,
        on_decision: Callable[[Failure], None],
        *,
        consequence_secs: float,
        hang_secs: float,
    ) -> None:
        self._loop = loop
        self._on_decision = on_decision
        self._consequence_secs = consequence_secs
        self._hang_secs = hang_secs
        self._failures: list[Failure] = []
        self._is_decided = False

    def add(self, failure: Failure) -> None:
        """Adds a failure, in the order of arrival."""
        self._failures.append(failure)
        if len(self._failures) == 1:
            self._loop.call_later(_SETTLE_SECS, self._decide_or_wait)
        elif failure.weight < CONSEQUENCE and failure.count is None:
            self._loop.call_later(_SETTLE_SECS, self._decide)  # a plain cause, after all

    def _decide_or_wait(self) -> None:
        likeliest = self._likeliest()
        if likeliest.weight == CONSEQUENCE:
            self._loop.call_later(self._consequence_secs, self._decide)
        elif likeliest.count is not None:
            self._loop.call_later(self._hang_secs, self._decide)
        else:
            self._decide()

    def _decide(self) -> None:
        if self._is_decided:
            return
        self._is_decided = True
        cause = self._likeliest()
        if cause.weight == CONSEQUENCE and cause.exit_code != RETRY:
            # No rank is known to have failed: the network has, so a retry may succeed.
            message = cause.message.splitlines()[0][:300]
            cause = replace(
                cause,
                exit_code=RETRY,
                trace="",
                message=f"rank {cause.rank} lost contact with its peers ({message})",
            )
        self._on_decision(cause)

    def _likeliest(self) -> Failure:
        """The lowest weight; of hangs, the rank with the least progress; else the first."""
        return min(self._failures, key=lambda failure: (failure.weight, failure.count or 0))


# Takes the callback for the decision.
MakeRootCause = Callable[[Callable[[Failure], None]], RootCause]
