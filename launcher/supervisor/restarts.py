"""Which failed attempts are worth another one, and how long to wait before it."""

from __future__ import annotations

from launcher import exit_codes
from launcher.processes.failure import Failure
from launcher.supervisor.result import AttemptResult


def why_no_restart(
    result: AttemptResult, previous: Failure | None, restarts: int, max_restarts: int
) -> str | None:
    """None if another attempt follows; otherwise the reason, empty if it is obvious.

    Args:
        result: of the attempt.
        previous: the failure of the attempt before it, if any.
        restarts: number of restarts so far.
        max_restarts: the limit.
    """
    failure = result.failure
    if failure is None or result.asked_to_stop or failure.exit_code == exit_codes.USAGE:
        return ""
    if max_restarts == 0:
        return ""
    if result.is_moved:
        return "no restart: the folder of the run is not where it was"
    if (
        failure.exit_code == exit_codes.FAILED
        and previous is not None
        and previous.exit_code == exit_codes.FAILED
        and previous.step == failure.step
    ):
        at = "" if failure.step is None else f" at step {failure.step}"
        return f"failed twice{at}: a restart would most likely fail there again"
    if restarts >= max_restarts:
        return f"no restart left (--max_restarts={max_restarts})"
    return None


def backoff_secs(restarts: int, failure: Failure | None) -> float:
    """Seconds before the next restart: 1, 2, 4, ... up to a minute.

    The first restart is immediate if the attempt had taken steps: then the start itself works, and
    waiting gains nothing.
    """
    if restarts == 0 and failure is not None and failure.step:
        return 0.0
    return float(min(60, 2 ** min(restarts, 6)))
