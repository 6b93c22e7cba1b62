"""The rendezvous of rank 0's launcher."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from launcher.exit_codes import RETRY
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure
from launcher.rendezvous.address import hold_port, join_address
from launcher.rendezvous.admission import Refusal, check_hello, check_protocol
from launcher.rendezvous.connection import NO_LAUNCHER, Connection
from launcher.rendezvous.handshake import Handshake, new_nonce
from launcher.rendezvous.late import Idle, Late
from launcher.rendezvous.protocol import HEARTBEAT_SECS, Hello, Listener, Start
from launcher.rendezvous.pulse import Pulse
from launcher.rendezvous.root_cause import MakeRootCause
from launcher.rendezvous.secret import JobSecret

# Open files, or memory, of this process or machine are used up.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# From the connection of a client to its hello.
_HELLO_SECS = 10.0
# Connections that have not proved to belong to the job. One more closes the oldest: launchers need
# it for milliseconds only, and try again.
_MAX_STRANGERS = 256
# For an object store to remove the secret of a job that was refused.
_WITHDRAW_SECS = 5.0


class _Session:
    """The server's side of one connection: a stranger's until its proof, then a rank's."""

    def __init__(
        self, server: Server, loop: EventLoop, connected: socket.socket, address: str
    ) -> None:
        self.hello: Hello | None = None
        self.has_left = False
        self.address = address
        self.local_address = str(connected.getsockname()[0])
        self.is_stranger = True
        self._handshake: Handshake | None = None
        self._server = server
        self._loop = loop
        self._is_refused = False
        self.connection = Connection(loop, connected, self._handle, self._on_loss)
        self._deadline = loop.call_later(_HELLO_SECS, self._turn_away_late)

    def _handle(self, message: dict[str, Any]) -> None:
        if self.hello is not None:
            return self._server.handle(self, self.hello, message)
        if self._is_refused:
            return None
        if self.is_stranger:
            return self._authenticate(message)
        hello = Hello(**message["hello"])
        refusal = self._server.check(hello)
        if refusal is not None:
            failure = Failure(hello.rank, refusal.exit_code, refusal.reason)
            self._refuse(failure)
            return self._server.end_everywhere(failure) if refusal.ends_the_job else None
        self.hello = hello
        self._deadline.cancel()
        return self._server.admit(self, hello)

    def _authenticate(self, message: dict[str, Any]) -> None:
        if self._handshake is None:
            refusal = check_protocol(message["protocol"])
            if refusal is not None:
                self._refuse(Failure(0, refusal.exit_code, refusal.reason))
                return self._server.note_stranger(self.address, "it is of another podlift")
            assert self._server.secret is not None  # else the server does not accept yet
            self._handshake = Handshake(self._server.secret, message["nonce"], new_nonce())
            return self.connection.send("challenge", nonce=self._handshake.server)
        if not self._handshake.proves("client", message["proof"]):
            self.connection.send("stranger")
            return self._turn_away("it does not have the secret of this job")
        self.is_stranger = False
        self.connection.trust()
        return self.connection.send("welcome", proof=self._handshake.proof("server"))

    def _turn_away(self, why: str) -> None:
        self.close()
        self._server.note_stranger(self.address, why)

    def _turn_away_late(self) -> None:
        self._turn_away(f"it did not introduce itself within {_HELLO_SECS:.0f} s")

    def _refuse(self, failure: Failure) -> None:
        self._is_refused = True
        self.connection.send("end", failure=failure.to_json())
        self._deadline.cancel()
        self._deadline = self._loop.call_later(1.0, self.close)  # once it has read that

    def close(self) -> None:
        """Closes the connection."""
        self.has_left = True
        self._deadline.cancel()
        self.connection.close()

    def _on_loss(self, reason: str) -> None:
        self._deadline.cancel()
        if self.hello is not None:
            self._server.on_loss(self, self.hello, reason)
        elif reason == NO_LAUNCHER and not self._is_refused:
            self._server.note_stranger(self.address, reason)
        self.has_left = True


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
        secret: of the job; published in a thread, once the port is this launcher's. A UserError
            of `publish` is raised to whoever runs the loop.

    Attributes:
        secret: the same, as bytes; None until it is published. Until then connections wait.

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
        secret: JobSecret,
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
        self._unknown: list[_Session] = []
        self._strangers = 0
        self._last_stranger = ""
        self._has_started = self._is_over = self._is_done = self._is_exhausted = False
        self._held_port: socket.socket | None = None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._address = address
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, port))
        self._socket.listen(128)
        self._socket.setblocking(False)
        self._secret = secret
        self.secret: bytes | None = None
        loop.call_in_thread(secret.publish, self._on_published, self._on_not_published)
        self._began = loop.time()
        self._pulse = Pulse(loop.time, heartbeat_timeout)
        self._deadline = loop.call_later(rendezvous_timeout, self._give_up)
        loop.call_later(HEARTBEAT_SECS, self._beat)
        loop.call_later(10, self._remind)

    def _on_published(self, secret: bytes) -> None:
        self.secret = secret
        self._resume_accepting()

    def _on_not_published(self, error: Exception) -> None:
        if not (self._is_over or self._has_started):  # it starts without one if it is alone
            raise error

    def open(self) -> None:
        """Starts at once if no other rank is expected."""
        if not self._address:
            port = self._socket.getsockname()[1]
            self._listener.on_wait(
                f"listening on all addresses of this machine (0.0.0.0:{port}): the name of rank "
                "0's host stands for none of them here"
            )
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
        for session in (*self._sessions.values(), *self._unknown):
            session.close()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        if self._held_port is not None:
            self._held_port.close()
        is_withdrawn: list[object] = []
        self._loop.call_in_thread(self._secret.withdraw, is_withdrawn.append, is_withdrawn.append)
        timer = self._loop.call_later(_WITHDRAW_SECS, lambda: is_withdrawn.append(None))
        self._loop.run(lambda: bool(is_withdrawn))
        timer.cancel()

    def check(self, hello: Hello) -> Refusal | None:
        """Why a launcher cannot join; None if it can."""
        admitted = {0: self._hello}
        admitted |= {rank: s.hello for rank, s in self._sessions.items() if s.hello is not None}
        return check_hello(hello, admitted, has_started=self._has_started)

    def admit(self, session: _Session, hello: Hello) -> None:
        """Adds a launcher that `check` does not refuse."""
        self._unknown.remove(session)
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

    def note_stranger(self, address: str, why: str) -> None:
        """Counts a connection that was turned away, and tells of the first."""
        self._strangers += 1
        self._last_stranger = f"from {address}: {why}"
        if self._strangers == 1:
            self._listener.on_wait(f"turned away a connection {self._last_stranger}")

    def _accept(self) -> None:
        try:
            connected, peer = self._socket.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:  # the connection stays readable: do not spin
                self._pause_accepting(error)
            return
        self._unknown = [session for session in self._unknown if not session.has_left]
        strangers = [session for session in self._unknown if session.is_stranger]
        if len(strangers) >= _MAX_STRANGERS:
            strangers[0].close()
        self._unknown.append(_Session(self, self._loop, connected, str(peer[0])))

    def _pause_accepting(self, error: OSError) -> None:
        if not self._is_exhausted:
            reason = f"{error.strerror}; trying again every second"
            self._listener.on_wait(f"warning: no other rank can connect: {reason}")
        self._is_exhausted = True
        self._loop.remove_reader(self._socket)
        self._loop.call_later(1.0, self._resume_accepting)

    def _resume_accepting(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.add_reader(self._socket, self._accept)

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

    def _because(self) -> str:
        if self.secret is None:
            return f"; {self._secret.source}, the secret of the ranks, is not written yet"
        if not self._strangers:
            return ""
        return f"; connections turned away: {self._strangers}, the last {self._last_stranger}"

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
            f"{self._missing()} did not join within {waited:.0f} s{self._because()}\n  HINT: "
            "were all started, and can they reach this host? --rendezvous_timeout_secs waits "
            "longer",
        )
        self.end_everywhere(failure)

    def _remind(self) -> None:
        if not self._has_started and not self._is_over:
            waited = self._loop.time() - self._began
            because = self._because()
            self._listener.on_wait(f"waiting for {self._missing()} ({waited:.0f} s{because})")
            self._loop.call_later(10, self._remind)

    def _beat(self) -> None:
        was_suspended = self._pulse.beat()
        self._broadcast("heartbeat")
        for session in list(self._sessions.values()):
            if not was_suspended:  # else what has arrived meanwhile is still to be read
                session.connection.check(self._heartbeat_timeout)
        if not self._is_over:
            self._loop.call_later(HEARTBEAT_SECS, self._beat)
