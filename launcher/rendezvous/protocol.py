"""What passes between the launchers of a job, and between a meeting and its launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from launcher.processes.failure import Failure

# Raised when launchers could no longer understand older ones.
PROTOCOL = 1
HEARTBEAT_SECS = 1.0


@dataclass(frozen=True)
class Hello:
    """What a launcher says of itself when it comes.

    Attributes:
        rank: of its worker.
        size: how many ranks it was told there are.
        host: where it runs.
        job: which job it belongs to.
        config: as JSON.
        versions: of what computes, as one line.
        workdir: the run's folder.
        sees_run: whether it finds a run there.
    """

    rank: int
    size: int
    host: str
    job: str
    config: str
    versions: str
    workdir: str
    sees_run: bool


@dataclass(frozen=True)
class Start:
    """What rank 0's launcher answers when all are there.

    Attributes:
        coordinator: `HOST:PORT` for jax's coordinator.
        attempt: the number of this attempt.
        address: this launcher's own address towards rank 0.
    """

    coordinator: str
    attempt: int
    address: str


@dataclass(frozen=True)
class Listener:
    """What a meeting tells its launcher.

    Attributes:
        on_start: all are there.
        on_end: the job is over, for this reason.
        on_stopping: another launcher was asked to stop; called with a line that says which.
        on_wait: called now and then while ranks are missing, with a line that names them.
    """

    on_start: Callable[[Start], None]
    on_end: Callable[[Failure], None]
    on_stopping: Callable[[str], None]
    on_wait: Callable[[str], None]


class Rendezvous(Protocol):
    """What a launcher can say to the others."""

    @property
    def all_done(self) -> bool:
        """Whether every launcher may leave."""

    def open(self) -> None:
        """Begins; `Listener.on_start` follows when all are there."""

    def report(self, failure: Failure) -> None:
        """A failure was seen here; `Listener.on_end` follows, with this one or with its cause."""

    def abandon(self, failure: Failure) -> None:
        """This launcher ends now and waits for nothing; the others end for this reason."""

    def stopping(self, line: str) -> None:
        """This launcher was asked to stop."""

    def done(self) -> None:
        """This launcher's workers have ended as they should."""

    def leave(self) -> None:
        """Closes everything; to be called last."""
