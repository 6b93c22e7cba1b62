"""The rendezvous of a job with one launcher."""

from __future__ import annotations

import socket

from launcher.processes.failure import Failure
from launcher.rendezvous.address import hold_port
from launcher.rendezvous.late import Idle, Late
from launcher.rendezvous.protocol import Listener, Start
from launcher.rendezvous.root_cause import MakeRootCause


class SingleLauncher:
    """Starts at once, and decides alone on the root cause.

    Args:
        attempt: the number of this attempt.
        num_processes: number of processes in the job; a single one needs no coordinator.
        listener: gets the events.
        make_root_cause: makes what decides which failure came first.
        late: finds out which rank is late.
    """

    all_done = True

    def __init__(
        self,
        attempt: int,
        num_processes: int,
        listener: Listener,
        make_root_cause: MakeRootCause,
        late: Late,
    ) -> None:
        self._attempt = attempt
        self._root_cause = make_root_cause(listener.on_end)
        self._listener = listener
        self._late = late
        self._held_port: socket.socket | None = None
        if num_processes > 1:
            self._held_port = hold_port("127.0.0.1")

    def open(self) -> None:
        """Starts at once."""
        coordinator = ""
        if self._held_port is not None:
            coordinator = f"127.0.0.1:{self._held_port.getsockname()[1]}"
        self._listener.on_start(Start(coordinator, self._attempt, "127.0.0.1"))

    def report(self, failure: Failure) -> None:
        """Reports a failure."""
        self._root_cause.add(failure)

    def idle(self, idle: Idle) -> None:
        """Tells the user which rank is late."""
        line = self._late.add(idle)
        if line is not None:
            self._listener.on_wait(line)

    def abandon(self, failure: Failure) -> None:
        """Does nothing: there are no others."""

    def stopping(self, line: str) -> None:
        """Does nothing: there are no others."""

    def done(self) -> None:
        """Does nothing: there are no others."""

    def leave(self) -> None:
        """Releases the port."""
        if self._held_port is not None:
            self._held_port.close()
