"""The meeting, for the launchers of all ranks but 0."""

from __future__ import annotations

import socket
from dataclasses import asdict
from typing import Any

from launcher.exit_codes import RETRY
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure
from launcher.rendezvous.address import join_address
from launcher.rendezvous.connection import Connection
from launcher.rendezvous.protocol import HEARTBEAT_SECS, PROTOCOL, Hello, Listener, Start


class Client:
    """The meeting, as the launcher of any other rank takes part in it.

    Args:
        loop: of this launcher.
        card: its own.
        host: of rank 0.
        port: where its launcher listens.
        listener: whom to tell.
        rendezvous_timeout: seconds until rank 0 must have answered.
        heartbeat_timeout: seconds of silence after which it is lost.
        patience_secs: for its answer to a report, after which this launcher decides alone.
    """

    def __init__(
        self,
        loop: EventLoop,
        card: Hello,
        host: str,
        port: int,
        listener: Listener,
        rendezvous_timeout: float,
        heartbeat_timeout: float,
        patience_secs: float,
    ) -> None:
        self._loop = loop
        self._card = card
        self._target = (host, port)
        self._listener = listener
        self._rendezvous_timeout = rendezvous_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._patience_secs = patience_secs
        self._began = loop.time()
        self._link: Connection | None = None
        self._has_started = self._is_over = self._is_done = False
        self._reason = ""
        loop.call_later(HEARTBEAT_SECS, self._beat)
        loop.call_later(10, self._remind)

    def open(self) -> None:
        """Calls rank 0, again and again until it answers."""
        if self._is_over:
            return
        waited = self._loop.time() - self._began
        if waited > self._rendezvous_timeout:
            message = (
                f"rank 0 does not answer at {join_address(*self._target)} for {waited:.0f} s "
                f"({self._reason})\n  HINT: was it started, and can this host reach it there?"
            )
            return self._end(Failure(self._card.rank, RETRY, message))
        try:
            connection = socket.create_connection(self._target, timeout=2.0)
        except OSError as error:
            self._reason = error.strerror or str(error)
            self._loop.call_later(min(2.0, 0.1 + waited / 10), self.open)
            return None
        self._address = connection.getsockname()[0]
        self._link = Connection(self._loop, connection, self._take, self._lost)
        self._link.send("join", protocol=PROTOCOL, card=asdict(self._card))
        return None

    def report(self, failure: Failure) -> None:
        """Tells rank 0's launcher, which decides whose failure is the story; unless it cannot."""
        if self._link is None:
            self._end(failure)
            return
        self._link.send("failed", failure=failure.to_json())
        self._loop.call_later(self._patience_secs, lambda: self._end(failure))

    def abandon(self, failure: Failure) -> None:
        """This launcher ends now; the others end for this reason."""
        self._is_over = True
        if self._link is not None:
            self._link.send("abandoned", failure=failure.to_json())

    def stopping(self, line: str) -> None:
        """Tells everyone that this launcher was asked to stop."""
        if self._link is not None:
            self._link.send("stopping", line=line)

    def done(self) -> None:
        """This launcher's workers have ended as they should."""
        self._is_done = True
        if self._link is not None:
            self._link.send("bye")

    @property
    def all_done(self) -> bool:
        """Whether rank 0's launcher has said goodbye, which it does last."""
        return self._is_over

    def leave(self) -> None:
        """Closes the connection, without a goodbye unless all went as it should."""
        self._is_over = True
        if self._link is not None:
            self._link.close()

    def _end(self, failure: Failure) -> None:
        if not self._is_over:
            self._is_over = True
            self._listener.on_end(failure)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "start":
            self._has_started = True
            self._listener.on_start(
                Start(str(message["coordinator"]), int(message["attempt"]), self._address)
            )
        elif kind == "end":
            self._end(Failure.from_json(message["failure"]))
        elif kind == "stopping":
            self._listener.on_stopping(str(message["line"]))
        elif kind == "bye" and self._is_done:
            self._is_over = True

    def _lost(self, reason: str) -> None:
        if self._has_started or self._is_over:
            host = join_address(*self._target)
            self._end(Failure(0, RETRY, f"lost rank 0 at {host}: {reason}", host=host))
            return
        # A proxy in front of a pod that is not up yet, or something else that listens there.
        self._link = None
        self._reason = reason
        self._loop.call_later(1.0, self.open)

    def _remind(self) -> None:
        if not self._has_started and not self._is_over:
            waited = self._loop.time() - self._began
            where = join_address(*self._target)
            what = f"the other ranks at {where}" if self._link else f"rank 0 at {where}"
            because = f": {self._reason}" if self._link is None else ""
            self._listener.on_wait(f"waiting for {what} ({waited:.0f} s{because})")
            self._loop.call_later(10, self._remind)

    def _beat(self) -> None:
        if self._is_over:
            return
        if self._link is not None:
            self._link.send("beat")
            self._link.check(self._heartbeat_timeout)
        self._loop.call_later(HEARTBEAT_SECS, self._beat)
