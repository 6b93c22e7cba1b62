"""Failures that the launcher itself finds, as opposed to those that a worker reports."""

from __future__ import annotations

import traceback

from launcher import exit_codes
from launcher.processes import user_errors
from launcher.processes.failure import Failure
from launcher.processes.progress_page import DOING, Progress
from launcher.rendezvous import Idle
from launcher.supervisor.watchdog import Stuck

_SUSPENDED = "is suspended (SIGSTOP)"


def hang(stuck: Stuck, log: str) -> Failure:
    """A worker that makes no progress.

    Args:
        stuck: what the watchdog found.
        log: path of the worker's log.
    """
    progress = stuck.progress
    suspended = f", and {_SUSPENDED}" if stuck.is_suspended else ""
    return Failure(
        stuck.rank,
        exit_codes.RETRY,
        f"rank {stuck.rank} has made no progress for {stuck.seconds:.0f} s, at step "
        f"{progress.step} ({progress.phase}){suspended}\n  HINT: the stacks of "
        "all ranks are in their logs; if it is only slow, raise --hang_timeout_secs",
        step=progress.step,
        log=log,
        wants_stacks=True,
        count=_count(progress, is_suspended=stuck.is_suspended),
    )


def not_resolved(rank: int, host: str, seconds: float) -> Failure:
    """The name of rank 0's host, which its launcher cannot look up.

    Args:
        rank: of this launcher's first worker.
        host: the name.
        seconds: the time that the resolver had.
    """
    message = (
        f"the name {host} of rank 0's host does not resolve: no answer for {seconds:.0f} s\n"
        "  HINT: is the name server of this host up? An address needs none: --coordinator_address "
        "or PODLIFT_COORDINATOR_ADDRESS=ADDRESS:PORT, the same for all ranks"
    )
    return Failure(rank, exit_codes.RETRY, message)


def idle(stuck: Stuck, log: str) -> Idle:
    """A worker that has made no progress for a while, as yet without consequences.

    Args:
        stuck: the worker.
        log: path of its log.
    """
    doing = _SUSPENDED if stuck.is_suspended else DOING[stuck.progress.phase]
    return Idle(hang(stuck, log), doing, stuck.seconds)


def _count(progress: Progress, *, is_suspended: bool) -> int:
    """How far a worker has come, next to others: one that is suspended is behind all others."""
    return -1 if is_suspended else progress.count


def grace_exceeded(
    rank: int, progress: Progress, grace_secs: float, log: str, *, is_suspended: bool
) -> Failure:
    """A worker that did not stop in time after a request to stop.

    Args:
        rank: of the worker.
        progress: its last report.
        grace_secs: the time it had.
        log: path of its log.
        is_suspended: whether a signal has stopped it.
    """
    suspended = f", {_SUSPENDED}" if is_suspended else ""
    return Failure(
        rank,
        exit_codes.RETRY,
        f"rank {rank} has not stopped within {grace_secs:g} s (step "
        f"{progress.step}, {progress.phase}{suspended}), and was killed\n"
        "  HINT: --grace_secs waits longer",
        step=progress.step,
        log=log,
        wants_stacks=True,
        count=_count(progress, is_suspended=is_suspended),
    )


def stopped_before_start(rank: int, launcher: str, signal_name: str) -> Failure:
    """A request to stop that arrived before all ranks had joined.

    Args:
        rank: of this launcher's first worker.
        launcher: this launcher, in words.
        signal_name: of the request.
    """
    message = f"{signal_name} to {launcher}, before all ranks had joined"
    return Failure(rank, exit_codes.RETRY, message)


def killed_by_user(rank: int, launcher: str) -> Failure:
    """A second Ctrl-C, for the other launchers."""
    return Failure(rank, exit_codes.RETRY, f"{launcher} was stopped at once (Ctrl-C)")


def launcher_raised(rank: int, error: Exception) -> Failure:
    """An exception in the launcher; to be called while it is handled."""
    what = user_errors.message_of(error)
    message = f"{type(error).__name__} in the launcher of rank {rank}: {what}"
    return Failure(rank, exit_codes.FAILED, message, trace=traceback.format_exc())
