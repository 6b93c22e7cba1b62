"""The rendezvous of rank 0's launcher."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from launcher.exit_codes import RETRY
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure
from launcher.rendezvous.address import hold_port, join_address
from launcher.rendezvous.admission import Refusal, check_hello, check_protocol
from launcher.rendezvous.connection import Connection
from launcher.rendezvous.late import Idle, Late
from launcher.rendezvous.protocol import HEARTBEAT_SECS, Hello, Listener, Start
from launcher.rendezvous.pulse import Pulse
from launcher.rendezvous.root_cause import MakeRootCause

# From the connection of a client to its hello.
_HELLO_SECS = 10.0


class _Session:
    """The server's side of one connection: unknown until its hello is admitted, then a rank's."""

    def __init__(self, server: Server, loop: EventLoop, connected: socket.socket) -> None:
        self.hello: Hello | None = None
        self.has_left = False
        self.local_address = str(connected.getsockname()[0])
        self._server = server
        self._loop = loop
        self.connection = Connection(loop, connected, self._handle, self._on_loss)
        loop.call_later(_HELLO_SECS, self._expect_hello)

    def _expect_hello(self) -> None:
        if self.hello is None:
            self.connection.close()

    def _handle(self, message: dict[str, Any]) -> None:
        if self.hello is not None:
            return self._server.handle(self, self.hello, message)
        refusal = check_protocol(message["protocol"])
        if refusal is not None:
            return self._refuse(Failure(0, refusal.exit_code, refusal.reason))
        hello = Hello(**message["hello"])
        refusal = self._server.check(hello)
        if refusal is not None:
            failure = Failure(hello.rank, refusal.exit_code, refusal.reason)
            self._refuse(failure)
            return self._server.end_everywhere(failure) if refusal.ends_the_job else None
        self.hello = hello
        return self._server.admit(self, hello)

    def _refuse(self, failure: Failure) -> None:
        self.connection.send("end", failure=failure.to_json())
        self._loop.call_later(1.0, self.connection.close)

    def _on_loss(self, reason: str) -> None:
        if self.hello is not None:
            self._server.on_loss(self, self.hello, reason)


class Server:
    """The side of rank 0's launcher, which the others connect to.

    Args:
        loop: of this launcher.
        hello: its own.
        port: where to listen.
        address: which of this machine's addresses to listen on; empty for all of them.
        claim_attempt: returns the number of this attempt; called once all ranks have joined.
        listener: gets the events.
        make_root_cause: makes what decides which failure came first.
        late: finds out which rank is late.
        rendezvous_timeout: seconds until all ranks must have joined.
        heartbeat_timeout: seconds of silence after which a launcher is lost.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        loop: EventLoop,
        hello: Hello,
        port: int,
        address: str,
        claim_attempt: Callable[[], int],
        listener: Listener,
        make_root_cause: MakeRootCause,
        late: Late,
        rendezvous_timeout: float,
        heartbeat_timeout: float,
    ) -> None:
        self._loop = loop
        self._hello = hello
        self._claim_attempt = claim_attempt
        self._listener = listener
        self._late = late
        self._is_stopping = False
        self._root_cause = make_root_cause(self.end_everywhere)
        self._heartbeat_timeout = heartbeat_timeout
        self._sessions: dict[int, _Session] = {}
        self._has_started = self._is_over = self._is_done = False
        self._held_port: socket.socket | None = None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._address = address
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, port))
        self._socket.listen(128)
        self._socket.setblocking(False)
        loop.add_reader(self._socket, self._accept)
        self._began = loop.time()
        self._pulse = Pulse(loop.time, heartbeat_timeout)
        self._deadline = loop.call_later(rendezvous_timeout, self._give_up)
        loop.call_later(HEARTBEAT_SECS, self._beat)
        loop.call_later(10, self._remind)

    def open(self) -> None:
        """Starts at once if no other rank is expected."""
        self._start_if_complete()

    def report(self, failure: Failure) -> None:
        """Reports a failure."""
        self._root_cause.add(failure)
        if failure.count is not None and not self._is_stopping:
            # The launcher of the rank that holds up this one may allow it more time.
            for hang in self._late.hangs():
                self._root_cause.add(hang)

    def idle(self, idle: Idle) -> None:
        """Tells the user which rank is late."""
        line = self._late.add(idle)
        if line is not None:
            self._listener.on_wait(line)

    def abandon(self, failure: Failure) -> None:
        """Ends the job for the others; this launcher ends now."""
        self._is_over = True
        self._broadcast("end", failure=failure.to_json())

    def end_everywhere(self, failure: Failure) -> None:
        """Ends the job on all launchers, with this root cause."""
        if not self._is_over:
            self.abandon(failure)
            self._listener.on_end(failure)

    def stopping(self, line: str) -> None:
        """Tells the others that this launcher was asked to stop."""
        self._is_stopping = True
        self._broadcast("stopping", line=line)

    def done(self) -> None:
        """The workers of this launcher have ended as they should."""
        self._is_done = True

    @property
    def all_done(self) -> bool:
        """Whether every other launcher has said bye, or is lost."""
        return all(session.has_left for session in self._sessions.values())

    def leave(self) -> None:
        """Closes everything; says bye only after `done`."""
        if self._is_done:
            self._broadcast("bye")
        self._is_over = True
        self._deadline.cancel()
        for session in self._sessions.values():
            session.connection.close()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        if self._held_port is not None:
            self._held_port.close()

    def check(self, hello: Hello) -> Refusal | None:
        """Why a launcher cannot join; None if it can."""
        admitted = {0: self._hello}
        admitted |= {rank: s.hello for rank, s in self._sessions.items() if s.hello is not None}
        return check_hello(hello, admitted, has_started=self._has_started)

    def admit(self, session: _Session, hello: Hello) -> None:
        """Adds a launcher that `check` does not refuse."""
        self._sessions[hello.rank] = session
        self._start_if_complete()

    def handle(self, session: _Session, hello: Hello, message: dict[str, Any]) -> None:
        """Handles a message of an admitted launcher."""
        kind = message["kind"]
        if kind == "bye":
            session.has_left = True
        elif kind == "failed":
            self.report(Failure.from_json({**message["failure"], "host": hello.host}))
        elif kind == "idle":
            idle = Idle.from_json(message["idle"])
            self.idle(replace(idle, hang=replace(idle.hang, host=hello.host)))
        elif kind == "abandoned":
            self.end_everywhere(Failure.from_json({**message["failure"], "host": hello.host}))
        elif kind == "stopping":
            self._is_stopping = True
            line = str(message["line"])
            self._broadcast("stopping", except_rank=hello.rank, line=line)
            self._listener.on_stopping(line)

    def on_loss(self, session: _Session, hello: Hello, reason: str) -> None:
        """Handles the loss of the connection to an admitted launcher."""
        if not self._has_started:
            self._sessions.pop(hello.rank, None)  # it may join again
        elif not session.has_left and not self._is_over:
            message = f"lost rank {hello.rank} on {hello.host}: {reason}"
            lost = Failure(hello.rank, RETRY, message, host=hello.host)
            self._root_cause.add(self._pulse.given_up(self._hello) or lost)
        session.has_left = True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connected, _ = self._socket.accept()
            _Session(self, self._loop, connected)

    def _start_if_complete(self) -> None:
        if self._has_started or len(self._sessions) < self._hello.size - 1:
            return
        self._has_started = True
        self._deadline.cancel()
        self._held_port = hold_port(self._address)
        port = self._held_port.getsockname()[1]
        # A server that listens on all addresses takes the one at which the others have reached it.
        address = self._address or next(s.local_address for s in self._sessions.values())
        coordinator = join_address(address, port)
        attempt = self._claim_attempt()
        self._broadcast("start", coordinator=coordinator, attempt=attempt)
        self._listener.on_start(Start(coordinator, attempt, address))

    def _broadcast(self, kind: str, *, except_rank: int | None = None, **values: Any) -> None:
        for rank, session in list(self._sessions.items()):
            if rank != except_rank:
                session.connection.send(kind, **values)

    def _missing(self) -> str:
        missing = [r for r in range(1, self._hello.size) if r not in self._sessions]
        shown = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
        return f"rank{'s' * (len(missing) > 1)} {shown} of {self._hello.size}"

    def _give_up(self) -> None:
        if self._has_started or self._is_over:
            return
        waited = self._loop.time() - self._began
        failure = Failure(
            self._hello.rank,
            RETRY,
            f"{self._missing()} did not join within {waited:.0f} s\n  HINT: were all started, and "
            "can they reach this host? --rendezvous_timeout_secs waits longer",
        )
        self.end_everywhere(failure)

    def _remind(self) -> None:
        if not self._has_started and not self._is_over:
            waited = self._loop.time() - self._began
            self._listener.on_wait(f"waiting for {self._missing()} ({waited:.0f} s)")
            self._loop.call_later(10, self._remind)

    def _beat(self) -> None:
        was_suspended = self._pulse.beat()
        self._broadcast("heartbeat")
        for session in list(self._sessions.values()):
            if not was_suspended:  # else what has arrived meanwhile is still to be read
                session.connection.check(self._heartbeat_timeout)
        if not self._is_over:
            self._loop.call_later(HEARTBEAT_SECS, self._beat)
