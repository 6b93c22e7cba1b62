"""What the launchers of a job send each other, and what a rendezvous tells its launcher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from launcher.processes.failure import Failure
from launcher.rendezvous.late import Idle

# To be raised with every change that older launchers do not understand.
PROTOCOL = 3
HEARTBEAT_SECS = 1.0


@dataclass(frozen=True)
class Hello:
    """How a launcher introduces itself.

    Attributes:
        rank: of its worker.
        size: number of ranks that it expects.
        host: where it runs.
        job: identifies the job.
        config: the config, as JSON.
        versions: of the packages and the code, as one line.
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
    """What the server sends when all ranks have joined.

    Attributes:
        coordinator: `HOST:PORT` for jax's coordinator; empty for a job of one process.
        attempt: the number of this attempt.
        address: this launcher's own address, as rank 0 sees it.
    """

    coordinator: str
    attempt: int
    address: str


@dataclass(frozen=True)
class Listener:
    """Callbacks of a rendezvous into its launcher.

    Attributes:
        on_start: all ranks have joined.
        on_end: the job is over, for this reason.
        on_stopping: another launcher was asked to stop; gets a line that says which.
        on_wait: ranks are missing or late; gets a line that names them, now and then. Also gets
            other lines about the rendezvous.
    """

    on_start: Callable[[Start], None]
    on_end: Callable[[Failure], None]
    on_stopping: Callable[[str], None]
    on_wait: Callable[[str], None]


class Rendezvous(Protocol):
    """A launcher's side of the rendezvous of one attempt."""

    @property
    def all_done(self) -> bool:
        """Whether every launcher may leave."""

    def open(self) -> None:
        """Begins; `Listener.on_start` follows when all ranks have joined."""

    def report(self, failure: Failure) -> None:
        """Reports a failure; `Listener.on_end` follows, with this one or with its root cause."""

    def idle(self, idle: Idle) -> None:
        """Reports that a rank is idle, in case that all others wait for it."""

    def abandon(self, failure: Failure) -> None:
        """Ends the job for the others; this launcher ends now and waits for nothing."""

    def stopping(self, line: str) -> None:
        """Tells the others that this launcher was asked to stop."""

    def done(self) -> None:
        """Tells the others that the workers of this launcher have ended as they should."""

    def leave(self) -> None:
        """Closes everything; the last call."""
