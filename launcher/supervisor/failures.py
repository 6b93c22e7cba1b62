"""Failures that the launcher itself finds, as opposed to those that a worker reports."""

from __future__ import annotations

import traceback

from launcher import exit_codes
from launcher.processes import user_errors
from launcher.processes.failure import Failure
from launcher.processes.progress_page import Progress
from launcher.supervisor.watchdog import Stuck


def hang(stuck: Stuck, log: str, *, is_suspended: bool) -> Failure:
    """A worker that makes no progress.

    Args:
        stuck: what the watchdog found.
        log: path of the worker's log.
        is_suspended: whether a signal has stopped the worker.
    """
    progress = stuck.progress
    suspended = ", and is suspended (SIGSTOP)" if is_suspended else ""
    return Failure(
        stuck.rank,
        exit_codes.RETRY,
        f"rank {stuck.rank} has made no progress for {stuck.seconds:.0f} s, at step "
        f"{progress.step} ({progress.phase}){suspended}\n  HINT: the stacks of "
        "all ranks are in their logs; if it is only slow, raise --hang_timeout_secs",
        step=progress.step,
        log=log,
        wants_stacks=True,
        count=progress.count,
    )


def grace_exceeded(rank: int, progress: Progress, grace_secs: float, log: str) -> Failure:
    """A worker that did not stop in time after a request to stop.

    Args:
        rank: of the worker.
        progress: its last report.
        grace_secs: the time it had.
        log: path of its log.
    """
    return Failure(
        rank,
        exit_codes.RETRY,
        f"rank {rank} has not stopped within {grace_secs:g} s (step "
        f"{progress.step}, {progress.phase}), and was killed\n"
        "  HINT: --grace_secs waits longer",
        step=progress.step,
        log=log,
        wants_stacks=True,
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
