"""The rendezvous of every launcher except that of rank 0."""

from __future__ import annotations

import functools
import socket
from dataclasses import asdict
from typing import Any

from launcher.exit_codes import RETRY, USAGE
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure
from launcher.rendezvous.address import connect_to, join_address
from launcher.rendezvous.connection import Connection
from launcher.rendezvous.handshake import Handshake, new_nonce
from launcher.rendezvous.late import Idle
from launcher.rendezvous.protocol import HEARTBEAT_SECS, PROTOCOL, Hello, Listener, Start
from launcher.rendezvous.pulse import Pulse
from launcher.rendezvous.secret import VARIABLE, JobSecret

# For what answers at the address of rank 0 to prove that it is; files may be late on other hosts.
_DOUBT_SECS = 10.0


class Client:
    """The side of a launcher that connects to rank 0's.

    Args:
        loop: of this launcher.
        hello: its own.
        host: of rank 0.
        port: where the launcher of rank 0 listens.
        listener: gets the events.
        rendezvous_timeout: seconds until rank 0 must have answered.
        heartbeat_timeout: seconds of silence after which rank 0 is lost.
        answer_timeout: seconds until rank 0 must have answered a reported failure; then the failure
            ends this launcher.
        secret: of the job; read in a thread, once rank 0 has answered.
    """

    def __init__(
        self,
        loop: EventLoop,
        hello: Hello,
        host: str,
        port: int,
        listener: Listener,
        rendezvous_timeout: float,
        heartbeat_timeout: float,
        answer_timeout: float,
        secret: JobSecret,
    ) -> None:
        self._loop = loop
        self._hello = hello
        self._target = (host, port)
        self._listener = listener
        self._rendezvous_timeout = rendezvous_timeout
        self._heartbeat_timeout = heartbeat_timeout
        self._answer_timeout = answer_timeout
        self._began = loop.time()
        self._secret = secret
        self._pulse = Pulse(loop.time, heartbeat_timeout)
        self._connection: Connection | None = None
        self._is_trying = False  # in a thread: to connect, then to read the secret
        self._nonce = ""
        self._handshake: Handshake | None = None
        self._is_proven = False  # whether it is rank 0 of this job that answers
        self._doubted_since: float | None = None
        self._has_started = self._is_over = self._is_done = False
        self._reason = ""
        loop.call_later(HEARTBEAT_SECS, self._beat)
        loop.call_later(10, self._remind)
        loop.call_later(rendezvous_timeout, self._end_try)

    def open(self) -> None:
        """Connects to rank 0, and tries again until it answers.

        A resolver or a host that does not answer blocks a thread, and nothing else.
        """
        if self._is_over:
            return
        if self._loop.time() - self._began > self._rendezvous_timeout:
            return self._give_up()
        self._is_trying = True
        self._reason = self._reason or f"the name {self._target[0]} is not resolved yet"
        connect = functools.partial(connect_to, *self._target)
        self._loop.call_in_thread(connect, self._on_connected, self._on_no_connection)

    def _give_up(self) -> None:
        waited = self._loop.time() - self._began
        message = (
            f"rank 0 has not answered at {join_address(*self._target)} for {waited:.0f} s "
            f"({self._reason})\n  HINT: was it started, and can this host reach it there?"
        )
        self._end(Failure(self._hello.rank, RETRY, message))

    def _end_try(self) -> None:
        """Gives up if rank 0 is not found when the time is over, whatever it waits for."""
        if self._is_trying or not self._is_proven:
            self._give_up()

    def _on_no_connection(self, error: Exception) -> None:
        self._is_trying = False
        waited = self._loop.time() - self._began
        self._reason = getattr(error, "strerror", None) or str(error)
        self._doubted_since = None
        self._loop.call_later(min(2.0, 0.1 + waited / 10), self.open)

    def _on_connected(self, connected: socket.socket) -> None:
        self._is_trying = False
        if self._is_over:
            return connected.close()
        self._reason = "it accepts connections and says nothing"
        self._address = connected.getsockname()[0]
        self._connection = Connection(self._loop, connected, self._handle, self._on_loss)
        self._nonce, self._handshake, self._is_proven = new_nonce(), None, False
        self._connection.send("join", protocol=PROTOCOL, nonce=self._nonce)
        return None

    def report(self, failure: Failure) -> None:
        """Reports a failure to rank 0's launcher, which decides on the root cause."""
        if self._connection is None or not self._is_proven:
            self._end(failure)
            return
        self._connection.send("failed", failure=failure.to_json())
        self._loop.call_later(self._answer_timeout, lambda: self._end(failure))

    def idle(self, idle: Idle) -> None:
        """Tells rank 0's launcher that a rank is idle."""
        if self._connection is not None and self._is_proven:
            self._connection.send("idle", idle=idle.to_json())

    def abandon(self, failure: Failure) -> None:
        """Ends the job for the others; this launcher ends now."""
        self._is_over = True
        if self._connection is not None and self._is_proven:
            self._connection.send("abandoned", failure=failure.to_json())

    def stopping(self, line: str) -> None:
        """Tells the others that this launcher was asked to stop."""
        if self._connection is not None and self._is_proven:
            self._connection.send("stopping", line=line)

    def done(self) -> None:
        """Tells rank 0 that the workers of this launcher have ended as they should."""
        self._is_done = True
        if self._connection is not None and self._is_proven:
            self._connection.send("bye")

    @property
    def all_done(self) -> bool:
        """Whether rank 0's launcher has said bye, which it does last."""
        return self._is_over

    def leave(self) -> None:
        """Closes the connection."""
        self._is_over = True
        if self._connection is not None:
            self._connection.close()

    def _end(self, failure: Failure) -> None:
        if not self._is_over:
            self._is_over = True
            self._listener.on_end(failure)

    def _handle(self, message: dict[str, Any]) -> None:
        if not self._is_proven:
            return self._authenticate(message)
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
        return None

    def _authenticate(self, message: dict[str, Any]) -> None:
        """Proves to the other side that this launcher is of the job, and expects the same."""
        assert self._connection is not None
        kind = message["kind"]
        if kind == "challenge" and self._handshake is None and not self._is_trying:
            self._is_trying, self._reason = True, f"{self._secret.source} is not read yet"
            ours, theirs = self._nonce, message["nonce"]
            return self._loop.call_in_thread(
                lambda: Handshake(self._secret.read(), ours, theirs), self._prove, self._prove
            )
        if kind == "welcome" and self._handshake is not None:
            if not self._handshake.proves("server", message["proof"]):
                return self._doubt(f"it does not have the secret in {self._secret.source}")
            self._is_proven, self._doubted_since = True, None
            self._connection.trust()
            return self._connection.send("hello", hello=asdict(self._hello))
        if kind == "end":  # of an older podlift, or to one
            return self._doubt("another version of podlift holds this port")
        return self._doubt(f"it does not accept the secret in {self._secret.source}")

    def _prove(self, handshake: Handshake | Exception) -> None:
        """Answers a challenge, once the secret is read or cannot be."""
        self._is_trying = False
        if self._is_over:
            return None
        if self._connection is None:  # the other side has not waited for that
            return self._on_loss(self._reason)
        if isinstance(handshake, Exception):
            self._connection.send("proof", proof="")
            return self._doubt(str(handshake))
        self._handshake = handshake
        return self._connection.send("proof", proof=handshake.proof("client"))

    def _doubt(self, reason: str) -> None:
        """Tries again, as a file may be late on another host; gives up after a while."""
        assert self._connection is not None
        self._connection.close()
        now = self._loop.time()
        self._doubted_since = self._doubted_since or now
        if now - self._doubted_since < _DOUBT_SECS:
            return self._on_loss(reason)
        message = (
            f"rank {self._hello.rank} on {self._hello.host} does not find rank 0 of this job at "
            f"{join_address(*self._target)}: {reason}\n  HINT: is another job using this port? "
            f"All ranks need the same --workdir, in a folder that all hosts share, and the same "
            f"{VARIABLE}, if any"
        )
        return self._end(Failure(self._hello.rank, USAGE, message))

    def _on_loss(self, reason: str) -> None:
        if self._has_started or self._is_over:
            host = join_address(*self._target)
            lost = Failure(0, RETRY, f"lost rank 0 at {host}: {reason}", host=host)
            self._end(self._pulse.given_up(self._hello) or lost)
            return
        # It may be a proxy in front of a pod that is not up yet: try again.
        self._connection = None
        if not self._is_trying:  # else once the secret is read
            self._reason = reason
            self._loop.call_later(1.0, self.open)

    def _remind(self) -> None:
        if not self._has_started and not self._is_over:
            waited = self._loop.time() - self._began
            where = join_address(*self._target)
            is_found = self._connection is not None and self._is_proven
            what = f"the other ranks at {where}" if is_found else f"rank 0 at {where}"
            because = "" if is_found else f": {self._reason}"
            self._listener.on_wait(f"waiting for {what} ({waited:.0f} s{because})")
            self._loop.call_later(10, self._remind)

    def _beat(self) -> None:
        if self._is_over:
            return
        was_suspended = self._pulse.beat()
        if self._connection is not None:
            self._connection.send("heartbeat")
            if not was_suspended:  # else what has arrived meanwhile is still to be read
                self._connection.check(self._heartbeat_timeout)
        self._loop.call_later(HEARTBEAT_SECS, self._beat)
