"""The meeting, for the launcher of rank 0."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.exit_codes import RETRY, USAGE
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure
from launcher.rendezvous.address import hold_port, join_address
from launcher.rendezvous.connection import Connection
from launcher.rendezvous.protocol import HEARTBEAT_SECS, PROTOCOL, Hello, Listener, Start
from launcher.rendezvous.root_cause import MakeRootCause
from trainer.config.keys import flatten

# For a caller to say who it is.
_INTRODUCTION_SECS = 10.0


@dataclass(frozen=True)
class _Refusal:
    """Why a launcher cannot take part.

    Attributes:
        reason: for a person.
        exit_code: which it is to end with.
        ends_the_job: whether the others end too, since the ranks contradict each other.
    """

    reason: str
    exit_code: int
    ends_the_job: bool


class _Caller:
    """A launcher that has called: first a stranger, then the one of a rank."""

    def __init__(self, meeting: Server, loop: EventLoop, connection: socket.socket) -> None:
        self.card: Hello | None = None
        self.has_left = False
        self.local_address = str(connection.getsockname()[0])
        self._meeting = meeting
        self._loop = loop
        self.link = Connection(loop, connection, self._take, self._lost)
        loop.call_later(_INTRODUCTION_SECS, self._expect_card)

    def _expect_card(self) -> None:
        if self.card is None:
            self.link.close()

    def _take(self, message: dict[str, Any]) -> None:
        if self.card is not None:
            return self._meeting.take(self, self.card, message)
        card = Hello(**message["card"])
        refusal = self._meeting.refusal_of(card, message["protocol"])
        if refusal is not None:
            failure = Failure(card.rank, refusal.exit_code, refusal.reason)
            self.link.send("end", failure=failure.to_json())
            self._loop.call_later(1.0, self.link.close)
            return self._meeting.end_everywhere(failure) if refusal.ends_the_job else None
        self.card = card
        return self._meeting.admit(self, card)

    def _lost(self, reason: str) -> None:
        if self.card is not None:
            self._meeting.lost(self, self.card, reason)


class Server:
    """The meeting, as rank 0's launcher holds it.

    Args:
        loop: of this launcher.
        card: its own.
        port: where to listen.
        address: on which of this machine's addresses; all of them where empty.
        claim_attempt: gives the number of this attempt, once all are there.
        listener: whom to tell.
        make_verdict: of what decides which failure is the story.
        rendezvous_timeout: seconds until all must have come.
        heartbeat_timeout: seconds of silence after which one is lost.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        loop: EventLoop,
        card: Hello,
        port: int,
        address: str,
        claim_attempt: Callable[[], int],
        listener: Listener,
        make_verdict: MakeRootCause,
        rendezvous_timeout: float,
        heartbeat_timeout: float,
    ) -> None:
        self._loop = loop
        self._card = card
        self._claim_attempt = claim_attempt
        self._listener = listener
        self._verdict = make_verdict(self.end_everywhere)
        self._heartbeat_timeout = heartbeat_timeout
        self._callers: dict[int, _Caller] = {}
        self._has_started = self._is_over = self._is_done = False
        self._held_port: socket.socket | None = None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._address = address
        self._server = socket.socket(family, socket.SOCK_STREAM)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind((address, port))
        self._server.listen(128)
        self._server.setblocking(False)
        loop.add_reader(self._server, self._accept)
        self._began = loop.time()
        self._deadline = loop.call_later(rendezvous_timeout, self._give_up)
        loop.call_later(HEARTBEAT_SECS, self._beat)
        loop.call_later(10, self._remind)

    def open(self) -> None:
        """Begins at once if nobody else is expected."""
        self._start_if_complete()

    def report(self, failure: Failure) -> None:
        """A failure was seen here."""
        self._verdict.add(failure)

    def abandon(self, failure: Failure) -> None:
        """This launcher ends now; the others end for this reason."""
        self._is_over = True
        self._send("end", failure=failure.to_json())

    def end_everywhere(self, failure: Failure) -> None:
        """Ends the job for all, with this story."""
        if not self._is_over:
            self.abandon(failure)
            self._listener.on_end(failure)

    def stopping(self, line: str) -> None:
        """Tells everyone that this launcher was asked to stop."""
        self._tell_stopping(line, None)

    def done(self) -> None:
        """This launcher's workers have ended as they should."""
        self._is_done = True

    @property
    def all_done(self) -> bool:
        """Whether every other launcher has said goodbye, or is lost."""
        return all(caller.has_left for caller in self._callers.values())

    def leave(self) -> None:
        """Closes everything; says goodbye only if all went as it should."""
        if self._is_done:
            self._send("bye")
        self._is_over = True
        self._deadline.cancel()
        for caller in self._callers.values():
            caller.link.close()
        self._loop.remove_reader(self._server)
        self._server.close()
        if self._held_port is not None:
            self._held_port.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            _Caller(self, self._loop, connection)

    def admit(self, caller: _Caller, card: Hello) -> None:
        """Takes up a launcher that `refusal_of` has no objection to."""
        self._callers[card.rank] = caller
        self._start_if_complete()

    def refusal_of(self, card: Hello, protocol: Any) -> _Refusal | None:
        """Why a launcher cannot be taken up, if it cannot."""
        if protocol != PROTOCOL:
            return _Refusal("another version of podlift holds this port", USAGE, False)
        if card.job != self._card.job:
            return _Refusal(
                f"rank {card.rank} on {card.host} belongs to another job ({card.job}) than rank 0 "
                f"on {self._card.host} ({self._card.job})\n  HINT: two jobs use the same port; "
                "give them different ones",
                USAGE,
                False,
            )
        if self._has_started:
            # Perhaps in place of one that is lost, which is about to be noticed.
            late = f"rank {card.rank} on {card.host} came after the job had started"
            return _Refusal(late, RETRY, False)
        contradiction = self._contradiction(card)
        return _Refusal(contradiction, USAGE, True) if contradiction else None

    def _contradiction(self, card: Hello) -> str:
        mine = self._card
        who = f"rank {card.rank} on {card.host}"
        if card.size != mine.size:
            return (
                f"{who} was told of {card.size} processes, rank 0 on {mine.host} of {mine.size}"
                "\n  HINT: all need the same --num_processes"
            )
        cards = {0: mine, **{rank: caller.card for rank, caller in self._callers.items()}}
        taken = cards.get(card.rank)
        if taken is not None:
            other = taken.host
            return (
                f"rank {card.rank} is there twice, on {other} and on {card.host}"
                "\n  HINT: each needs a --process_id of its own; is another job using this port?"
            )
        if not 0 <= card.rank < mine.size:
            return f"{who}: there are only the ranks 0 to {mine.size - 1}"
        differing = _first_difference(card, mine)
        if differing is not None:
            what, theirs, ours = differing
            return (
                f"{who} has {what} {theirs}, rank 0 on {mine.host} {ours}"
                "\n  HINT: start the same command, from the same code, for every rank"
            )
        if card.sees_run != mine.sees_run:
            sees, other = (who, f"rank 0 on {mine.host}")
            sees, other = (sees, other) if card.sees_run else (other, sees)
            return (
                f"{sees} finds a run in {mine.workdir} and {other} does not"
                "\n  HINT: --workdir must be a folder that all hosts share"
            )
        return ""

    def _missing(self) -> str:
        missing = [r for r in range(1, self._card.size) if r not in self._callers]
        shown = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
        return f"rank{'s' * (len(missing) > 1)} {shown} of {self._card.size}"

    def _start_if_complete(self) -> None:
        if self._has_started or len(self._callers) < self._card.size - 1:
            return
        self._has_started = True
        self._deadline.cancel()
        self._held_port = hold_port(self._address)
        port = self._held_port.getsockname()[1]
        # Listening everywhere: the address that the others have found this machine at.
        address = self._address or next(c.local_address for c in self._callers.values())
        coordinator = join_address(address, port)
        attempt = self._claim_attempt()
        self._send("start", coordinator=coordinator, attempt=attempt)
        self._listener.on_start(Start(coordinator, attempt, address))

    def _send(self, kind: str, **values: Any) -> None:
        for caller in list(self._callers.values()):
            caller.link.send(kind, **values)

    def _give_up(self) -> None:
        if self._has_started or self._is_over:
            return
        waited = self._loop.time() - self._began
        failure = Failure(
            self._card.rank,
            RETRY,
            f"{self._missing()} did not come within {waited:.0f} s\n  HINT: were all started, and "
            "can they reach this host? --rendezvous_timeout_secs waits longer",
        )
        self.end_everywhere(failure)

    def _remind(self) -> None:
        if not self._has_started and not self._is_over:
            waited = self._loop.time() - self._began
            self._listener.on_wait(f"waiting for {self._missing()} ({waited:.0f} s)")
            self._loop.call_later(10, self._remind)

    def _beat(self) -> None:
        self._send("beat")
        for caller in list(self._callers.values()):
            caller.link.check(self._heartbeat_timeout)
        if not self._is_over:
            self._loop.call_later(HEARTBEAT_SECS, self._beat)

    def take(self, caller: _Caller, card: Hello, message: dict[str, Any]) -> None:
        """A message of a launcher that was admitted."""
        if message["kind"] == "bye":
            caller.has_left = True
        elif message["kind"] == "failed":
            self._verdict.add(Failure.from_json({**message["failure"], "host": card.host}))
        elif message["kind"] == "abandoned":
            self.end_everywhere(Failure.from_json({**message["failure"], "host": card.host}))
        elif message["kind"] == "stopping":
            self._tell_stopping(str(message["line"]), card.rank)
            self._listener.on_stopping(str(message["line"]))

    def lost(self, caller: _Caller, card: Hello, reason: str) -> None:
        """The connection to a launcher is gone."""
        if not self._has_started:
            self._callers.pop(card.rank, None)  # it may come again
        elif not caller.has_left and not self._is_over:
            message = f"lost rank {card.rank} on {card.host}: {reason}"
            self._verdict.add(Failure(card.rank, RETRY, message, host=card.host))
        caller.has_left = True

    def _tell_stopping(self, line: str, source: int | None) -> None:
        for rank, caller in self._callers.items():
            if rank != source:
                caller.link.send("stopping", line=line)


def _first_difference(theirs: Hello, ours: Hello) -> tuple[str, Any, Any] | None:
    """What two launchers were told differently, with both values."""
    if theirs.workdir != ours.workdir:
        return "--workdir", theirs.workdir, ours.workdir
    if theirs.versions != ours.versions:
        return "the versions", theirs.versions, ours.versions
    if theirs.config == ours.config:
        return None
    try:
        a, b = flatten(json.loads(theirs.config)), flatten(json.loads(ours.config))
    except (ValueError, TypeError, AttributeError):
        return "a config that cannot be read,", theirs.config[:80], ours.config[:80]
    key = next(key for key in [*a, *b] if a.get(key) != b.get(key))
    return f"config.{key}", a.get(key), b.get(key)
