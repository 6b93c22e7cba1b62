"""How an attempt ended."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.processes.failure import Failure


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended.

    Attributes:
        exit_code: of `launcher.exit_codes`, or 130 after a second Ctrl-C.
        message: for the user, if the attempt stopped on request.
        failure: the root cause, if the attempt failed.
        asked_to_stop: whether any launcher was asked to stop.
        number: the attempt, counted over the life of the workdir; 0 if it never started.
        is_moved: whether the run's folder was renamed or removed meanwhile.
    """

    exit_code: int
    message: str = ""
    failure: Failure | None = None
    asked_to_stop: bool = False
    number: int = 0
    is_moved: bool = False
