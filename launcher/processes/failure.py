"""Failures of ranks: which of several came first, how it is told, and `failure.json`."""

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
from trainer.workdir.paths import write_whole


@dataclass(frozen=True)
class Failure:
    """The end of one rank that ended the job.

    Attributes:
        rank: which.
        host: where it ran; empty on this machine alone.
        exit_code: what the job ends with.
        message: what happened, for a person.
        trace: its traceback, if the program raised.
        step: at which, if known.
        log: path of the rank's log.
        weight: how likely it is the cause rather than a consequence: 0 the likeliest.
        wants_stacks: whether all ranks' stacks belong into their logs.
        count: of a rank that hangs, how often it has told of progress; else None.
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
        """The inverse; what another version may have added is left out."""
        return cls(
            **{field.name: values[field.name] for field in fields(cls) if field.name in values}
        )

    def tell(self, *, brief: bool = False) -> str:
        """The failure as a person reads it, with its traceback before it unless `brief`."""
        where = f" (host {self.host})" if self.host else ""
        log = f"\n  full log: {self.log}{where}" if self.log else ""
        return f"{'' if brief else self.trace}error: {self.message}{log}"


CAUSE, ABORT, CONSEQUENCE = 0, 1, 2


def failure_from_outcome(outcome: Outcome, rank: int, log: str) -> Failure:
    """What a worker has told of itself."""
    return Failure(
        rank,
        outcome.exit_code,
        outcome.message,
        trace=outcome.trace,
        step=outcome.step,
        log="" if outcome.exit_code == exit_codes.USAGE else log,
        weight=CONSEQUENCE if outcome.lost_peer else CAUSE,
    )


# Signals that only the program itself brings about.
_FAULTS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGSYS", "SIGTRAP")
# jax's last words before it aborts a process whose peer is gone.
_FATAL_WORDS = "distributed service detected fatal errors"


def failure_from_exit(
    returncode: int, rank: int, step: int, log: str, log_tail: str, out_of_memory: bool
) -> Failure:
    """What is known of a worker that ended without a word.

    Args:
        returncode: as `subprocess` gives it, negative for a signal.
        rank: of the worker.
        step: the last it told.
        log: path of its log.
        log_tail: the end of it.
        out_of_memory: whether the kernel has killed something for memory since it started.
    """
    weight = CAUSE
    if returncode >= 0:
        code = exit_codes.FAILED
        message = f"rank {rank} exited with code {returncode} without a word, around step {step}"
    else:
        try:
            name = signal.Signals(-returncode).name
        except ValueError:
            name = f"signal {-returncode}"
        code = exit_codes.FAILED if name in _FAULTS else exit_codes.RETRY
        message = f"rank {rank} was killed by {name} around step {step}"
        if name == "SIGKILL" and out_of_memory:
            message += ": the kernel ran out of memory"
        elif name == "SIGKILL":
            message += ": out of memory?"
        if name == "SIGABRT":
            weight = ABORT
            if _FATAL_WORDS in log_tail:
                code, weight = exit_codes.RETRY, CONSEQUENCE
                message = f"rank {rank} gave up around step {step}: jax lost contact to its peers"
    return Failure(rank, code, message, step=step, log=log, weight=weight)


# Messages of jax, gloo and NCCL when another process went away or does not answer.
_LOST_PEER = (
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
    """By the words: jax raises several types for it, ValueError among them."""
    return any(sign in message.lower() for sign in _LOST_PEER)


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
    """Removes `failure.json` of an earlier attempt."""
    (folder / "failure.json").unlink(missing_ok=True)
