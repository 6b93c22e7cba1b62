"""The meeting of a launcher that is the only one."""

from __future__ import annotations

import socket

from launcher.processes.failure import Failure
from launcher.rendezvous.address import hold_port
from launcher.rendezvous.protocol import Listener, Start
from launcher.rendezvous.root_cause import MakeRootCause


class SingleLauncher:
    """Starts at once, and decides alone.

    Args:
        attempt: the number of this attempt.
        num_processes: in the job; with one, jax needs no coordinator.
        listener: whom to tell.
        make_verdict: of what decides.
    """

    all_done = True

    def __init__(
        self, attempt: int, num_processes: int, listener: Listener, make_verdict: MakeRootCause
    ) -> None:
        self._attempt = attempt
        self._verdict = make_verdict(listener.on_end)
        self._listener = listener
        self._held_port: socket.socket | None = None
        if num_processes > 1:
            self._held_port = hold_port("127.0.0.1")

    def open(self) -> None:
        """Begins at once."""
        coordinator = ""
        if self._held_port is not None:
            coordinator = f"127.0.0.1:{self._held_port.getsockname()[1]}"
        self._listener.on_start(Start(coordinator, self._attempt, "127.0.0.1"))

    def report(self, failure: Failure) -> None:
        """A failure was seen here."""
        self._verdict.add(failure)

    def abandon(self, failure: Failure) -> None:
        """Nobody is to be told."""

    def stopping(self, line: str) -> None:
        """Nobody is to be told."""

    def done(self) -> None:
        """Nobody waits."""

    def leave(self) -> None:
        """Lets go of the port."""
        if self._held_port is not None:
            self._held_port.close()
