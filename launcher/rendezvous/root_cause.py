"""Which of several failures is the story."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from launcher.exit_codes import RETRY
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import CONSEQUENCE, Failure

# What a rank's end does to the others is seen within milliseconds of it.
_SETTLE_SECS = 0.1


class RootCause:
    """Takes failures as they are seen, and after a while says which came first.

    Args:
        loop: to wait with.
        on_verdict: called once, with the story.
        consequence_secs: how long to wait for the cause where only a consequence was seen.
        hang_secs: how long to wait for other reports of a hang: launchers look now and then, and
            the rank that is furthest behind is the one that holds up the others.
    """

    def __init__(
        self,
        loop: EventLoop,
        on_verdict: Callable[[Failure], None],
        *,
        consequence_secs: float,
        hang_secs: float,
    ) -> None:
        self._loop = loop
        self._on_verdict = on_verdict
        self._consequence_secs = consequence_secs
        self._hang_secs = hang_secs
        self._seen: list[Failure] = []
        self._is_over = False

    def add(self, failure: Failure) -> None:
        """Takes a failure."""
        self._seen.append(failure)
        if len(self._seen) == 1:
            self._loop.call_later(_SETTLE_SECS, self._weigh)
        elif failure.weight < CONSEQUENCE and failure.count is None:
            self._loop.call_later(_SETTLE_SECS, self._decide)  # a plain cause, after all

    def _weigh(self) -> None:
        story = self._first()
        if story.weight == CONSEQUENCE:
            self._loop.call_later(self._consequence_secs, self._decide)
        elif story.count is not None:
            self._loop.call_later(self._hang_secs, self._decide)
        else:
            self._decide()

    def _decide(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        story = self._first()
        if story.weight == CONSEQUENCE and story.exit_code != RETRY:
            # Nobody has failed that we know of: the connection has.
            message = story.message.splitlines()[0][:300]
            story = replace(
                story,
                exit_code=RETRY,
                trace="",
                message=f"rank {story.rank} lost contact to its peers ({message})",
            )
        self._on_verdict(story)

    def _first(self) -> Failure:
        """The likeliest cause; of hangs, the rank with the least progress; else the first seen."""
        return min(self._seen, key=lambda failure: (failure.weight, failure.count or 0))


# Given what to call with the story.
MakeRootCause = Callable[[Callable[[Failure], None]], RootCause]
