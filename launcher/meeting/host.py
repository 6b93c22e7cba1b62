"""The meeting, for the launcher of rank 0."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

from launcher.exit_codes import RETRY, USAGE
from launcher.failure import Failure
from launcher.meeting.address import hold_port, join_address
from launcher.meeting.link import Link
from launcher.meeting.terms import BEAT_SECS, PROTOCOL, Card, Listener, Start
from launcher.reactor import Reactor
from trainer.settings import flatten


class _Caller:
    """A launcher that has called: first a stranger, then the one of a rank."""

    def __init__(self, meeting: Host, reactor: Reactor, connection: socket.socket) -> None:
        self.card: Card | None = None
        self.has_left = False
        self.local_address = str(connection.getsockname()[0])
        self._meeting = meeting
        self._reactor = reactor
        self.link = Link(reactor, connection, self._take, self._lost)

    def _take(self, message: dict[str, Any]) -> None:
        if self.card is not None:
            return self._meeting.take(self, self.card, message)
        try:
            card = Card(**message["card"])
            problem, is_stranger = self._meeting.problem_with(card, message["protocol"])
        except (KeyError, TypeError):
            return self.link.close()
        if problem:
            self.link.send("end", failure=Failure(0, USAGE, problem).to_json())
            self._reactor.call_in(1.0, self.link.close)
            return None if is_stranger else self._meeting.refuse_all(problem)
        self.card = card
        return self._meeting.admit(self, card)

    def _lost(self, reason: str) -> None:
        if self.card is not None:
            self._meeting.lost(self, self.card, reason)


class Host:
    """The meeting, as rank 0's launcher holds it.

    Args:
        reactor: of this launcher.
        card: its own.
        port: where to listen.
        address: on which of this machine's addresses; all of them where empty.
        attempt: the number of this attempt.
        listener: whom to tell.
        rendezvous_timeout: seconds until all must have come.
        heartbeat_timeout: seconds of silence after which one is lost.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self,
        reactor: Reactor,
        card: Card,
        port: int,
        address: str,
        attempt: int,
        listener: Listener,
        rendezvous_timeout: float,
        heartbeat_timeout: float,
    ) -> None:
        self._reactor = reactor
        self._card = card
        self._attempt = attempt
        self._listener = listener
        self._heartbeat_timeout = heartbeat_timeout
        self._callers: dict[int, _Caller] = {}
        self._has_started = self._is_over = False
        self._held_port: socket.socket | None = None
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._address = address
        self._server = socket.socket(family, socket.SOCK_STREAM)
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server.bind((address, port))
        self._server.listen(128)
        self._server.setblocking(False)
        reactor.watch(self._server, self._accept)
        self._began = reactor.clock()
        self._deadline = reactor.call_in(rendezvous_timeout, self._give_up)
        reactor.call_in(BEAT_SECS, self._beat)
        reactor.call_in(10, self._remind)

    def open(self) -> None:
        """Begins at once if nobody else is expected."""
        self._start_if_complete()

    def end(self, failure: Failure) -> None:
        """Ends the job everywhere."""
        self._is_over = True
        self._send("end", failure=failure.to_json())

    def stopping(self, line: str) -> None:
        """Tells everyone that this launcher was asked to stop."""
        self._tell_stopping(line, None)

    def done(self) -> None:
        """This launcher's worker has ended as it should."""

    @property
    def all_done(self) -> bool:
        """Whether every other launcher has said goodbye, or is lost."""
        return all(caller.has_left for caller in self._callers.values())

    def leave(self) -> None:
        """Says goodbye and closes; call it last."""
        self._is_over = True
        self._deadline.cancel()
        self._send("bye")
        for caller in self._callers.values():
            caller.link.close()
        self._reactor.forget(self._server)
        self._server.close()
        if self._held_port is not None:
            self._held_port.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._server.accept()
            _Caller(self, self._reactor, connection)

    def admit(self, caller: _Caller, card: Card) -> None:
        """Takes up a launcher that `problem_with` has no objection to."""
        self._callers[card.rank] = caller
        self._start_if_complete()

    def problem_with(self, card: Card, protocol: Any) -> tuple[str, bool]:
        """Why a launcher cannot be taken up (empty if it can), and whether it is none of ours."""
        if protocol != PROTOCOL:
            return "another version of podlift holds this port", True
        if card.job != self._card.job:
            return (
                f"rank {card.rank} on {card.host} belongs to another job ({card.job}) than rank 0 "
                f"on {self._card.host} ({self._card.job})\n  HINT: two jobs use the same port; "
                "give them different ones"
            ), True
        return self._contradiction(card), False

    def _contradiction(self, card: Card) -> str:
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
        if self._has_started:
            return f"{who} came after the job had started"
        return ""

    def refuse_all(self, problem: str) -> None:
        """A contradiction among the ranks: ends the job for everyone."""
        if not self._has_started and not self._is_over:
            failure = Failure(self._card.rank, USAGE, problem)
            self.end(failure)
            self._listener.on_end(failure)

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
        self._send("start", coordinator=coordinator, attempt=self._attempt)
        self._listener.on_start(Start(coordinator, self._attempt, address))

    def _send(self, kind: str, **values: Any) -> None:
        for caller in list(self._callers.values()):
            caller.link.send(kind, **values)

    def _give_up(self) -> None:
        if self._has_started or self._is_over:
            return
        waited = self._reactor.clock() - self._began
        failure = Failure(
            self._card.rank,
            RETRY,
            f"{self._missing()} did not come within {waited:.0f} s\n  HINT: were all started, and "
            "can they reach this host? --rendezvous_timeout_secs waits longer",
        )
        self.end(failure)
        self._listener.on_end(failure)

    def _remind(self) -> None:
        if not self._has_started and not self._is_over:
            waited = self._reactor.clock() - self._began
            self._listener.on_wait(f"waiting for {self._missing()} ({waited:.0f} s)")
            self._reactor.call_in(10, self._remind)

    def _beat(self) -> None:
        self._send("beat")
        for caller in list(self._callers.values()):
            caller.link.check(self._heartbeat_timeout)
        if not self._is_over:
            self._reactor.call_in(BEAT_SECS, self._beat)

    def take(self, caller: _Caller, card: Card, message: dict[str, Any]) -> None:
        """A message of a launcher that was admitted."""
        if message["kind"] == "bye":
            caller.has_left = True
        elif message["kind"] == "failed":
            self._listener.on_failure(Failure(**{**message["failure"], "host": card.host}))
        elif message["kind"] == "stopping":
            self._tell_stopping(str(message["line"]), card.rank)
            self._listener.on_stopping(str(message["line"]))
            if not self._has_started:
                failure = Failure(card.rank, RETRY, str(message["line"]))
                self.end(failure)
                self._listener.on_end(failure)

    def lost(self, caller: _Caller, card: Card, reason: str) -> None:
        """The connection to a launcher is gone."""
        if not caller.has_left and not self._is_over:
            message = f"lost rank {card.rank} on {card.host}: {reason}"
            self._listener.on_failure(Failure(card.rank, RETRY, message, host=card.host))
        caller.has_left = True

    def _tell_stopping(self, line: str, source: int | None) -> None:
        for rank, caller in self._callers.items():
            if rank != source:
                caller.link.send("stopping", line=line)


def _first_difference(theirs: Card, ours: Card) -> tuple[str, Any, Any] | None:
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
