"""Failures of ranks: how likely each is the cause, how it reads, and `failure.json`."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from etils import epath

from launcher import exit_codes
from launcher.processes.assignment import Outcome
from launcher.processes.lost_peers import LostPeers
from trainer.workdir.paths import write_whole


@dataclass(frozen=True)
class Failure:
    """The end of one rank, which ends the job.

    Attributes:
        rank: which rank.
        exit_code: the exit code of the job.
        message: what happened, for the user.
        host: where it ran; empty for this machine.
        trace: the traceback, if the program raised.
        step: the step at which it failed, if known.
        log: path of the rank's log.
        weight: `CAUSE`, `ABORT` or `CONSEQUENCE`; the lower, the likelier it is the root cause.
        wants_stacks: whether all ranks should write their stacks into their logs.
        count: of a rank that hangs, how often it has reported progress, and -1 if it is suspended;
            None for other failures.
    """

    rank: int
    exit_code: int
    message: str
    host: str = ""
    trace: str = ""
    step: int | None = None
    log: str = ""
    weight: int = 0
    wants_stacks: bool = False
    count: int | None = None

    def to_json(self) -> dict[str, Any]:
        """For another launcher."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Failure:
        """The inverse of `to_json`; ignores fields that another version may have added."""
        return cls(
            **{field.name: values[field.name] for field in fields(cls) if field.name in values}
        )

    def to_text(self, *, with_trace: bool = True) -> str:
        """The failure for the terminal: the traceback, the error, and the path of the log."""
        where = f" (host {self.host})" if self.host else ""
        log = f"\n  full log: {self.log}{where}" if self.log else ""
        return f"{self.trace if with_trace else ''}error: {self.message}{log}"


CAUSE, ABORT, CONSEQUENCE = 0, 1, 2


def failure_from_outcome(outcome: Outcome, rank: int, log: str) -> Failure:
    """The failure that a worker has reported itself."""
    return Failure(
        rank,
        outcome.exit_code,
        outcome.message,
        trace=outcome.trace,
        step=outcome.step,
        log="" if outcome.exit_code == exit_codes.USAGE else log,
        weight=CONSEQUENCE if outcome.lost_peer else CAUSE,
    )


# Signals of a crash in the program itself.
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGSYS", "SIGTRAP")


def failure_from_exit(
    returncode: int, rank: int, step: int, log: str, lost: LostPeers, out_of_memory: bool
) -> Failure:
    """The failure of a worker that ended without reporting an outcome.

    Args:
        returncode: of `subprocess`: negative for a signal.
        rank: of the worker.
        step: the last step it reported.
        log: path of its log.
        lost: what jax has logged about lost peers.
        out_of_memory: whether the kernel has killed a process for memory since the start.
    """
    weight = CAUSE
    if returncode >= 0:
        code = exit_codes.FAILED
        message = (
            f"rank {rank} exited with code {returncode} and no error message, around step {step}"
        )
    else:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        code = exit_codes.FAILED if name in _CRASHES else exit_codes.RETRY
        message = f"rank {rank} was killed by {name} around step {step}"
        if name == "SIGKILL" and out_of_memory:
            message += ": the kernel ran out of memory"
        elif name == "SIGKILL":
            message += ": out of memory?"
        if name == "SIGABRT":
            weight = ABORT
            if lost.are_lost:
                code, weight = exit_codes.RETRY, CONSEQUENCE
                message = f"rank {rank} aborted around step {step}: jax lost contact with {lost}"
    return Failure(rank, code, message, step=step, log=log, weight=weight)


# In messages of jax, gloo and NCCL about a process that is gone or does not answer.
_LOST_PEER_WORDS = (
    "gloo all",
    "gloo context",
    "gloo collective",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "coordination service",
    "coordinationservice",
    "waiting for async_write_complete barrier",
    "deadline_exceeded",
    "unavailable:",
)


def is_lost_peer_error(message: str) -> bool:
    """Judges by the words: jax raises several types for a lost peer, ValueError among them."""
    return any(words in message.lower() for words in _LOST_PEER_WORDS)


def write_failure(
    folder: Path, failure: Failure | Outcome, *, rank: int, log: Path | str, attempt: int = 1
) -> None:
    """Writes `failure.json` into the run's local folder."""
    record = {
        "rank": rank,
        "exit_code": failure.exit_code,
        "error": failure.message,
        "step": failure.step,
        "attempt": attempt,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "log": str(log),
    }
    if isinstance(failure, Failure) and failure.host:
        record["host"] = failure.host
    write_whole(epath.Path(folder) / "failure.json", json.dumps(record, indent=2) + "\n")


def clear_failure(folder: Path) -> None:
    """Removes the `failure.json` of an earlier attempt, if there is one."""
    (folder / "failure.json").unlink(missing_ok=True)
