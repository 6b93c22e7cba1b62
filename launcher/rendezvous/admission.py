"""Which launchers the server admits to the job: their hellos must agree with that of rank 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.exit_codes import RETRY, USAGE
from launcher.rendezvous.protocol import PROTOCOL, Hello
from trainer.config.keys import flatten


@dataclass(frozen=True)
class Refusal:
    """Why the server refuses a launcher.

    Attributes:
        reason: for the user.
        exit_code: of the refused launcher.
        ends_the_job: whether the other launchers end too, because the ranks contradict each other.
    """

    reason: str
    exit_code: int
    ends_the_job: bool = False


def check_protocol(protocol: Any) -> Refusal | None:
    """Refuses a launcher of another version, whose hello may have other fields."""
    if protocol == PROTOCOL:
        return None
    return Refusal("another version of podlift holds this port", USAGE)


def check_hello(
    hello: Hello, admitted: Mapping[int, Hello], *, has_started: bool
) -> Refusal | None:
    """Refuses a launcher of another job, one that is late, or one that contradicts the others.

    Args:
        hello: of the launcher.
        admitted: the hellos of the ranks that have joined, that of rank 0 among them.
        has_started: whether the job has started.
    """
    server = admitted[0]
    if hello.job != server.job:
        return Refusal(
            f"rank {hello.rank} on {hello.host} belongs to another job ({hello.job}) than rank 0 "
            f"on {server.host} ({server.job})\n  HINT: two jobs use the same port; "
            "give them different ones",
            USAGE,
        )
    if has_started:
        # It may replace a launcher whose loss has not been noticed yet.
        late = f"rank {hello.rank} on {hello.host} joined after the job had started"
        return Refusal(late, RETRY)
    contradiction = _contradiction(hello, admitted)
    return Refusal(contradiction, USAGE, ends_the_job=True) if contradiction else None


def _contradiction(hello: Hello, admitted: Mapping[int, Hello]) -> str:
    server = admitted[0]
    who, rank_0 = f"rank {hello.rank} on {hello.host}", f"rank 0 on {server.host}"
    if hello.size != server.size:
        return (
            f"{who} expects {hello.size} processes, {rank_0} expects {server.size}"
            "\n  HINT: all need the same --num_processes"
        )
    if hello.rank in admitted:
        return (
            f"rank {hello.rank} joined twice, from {admitted[hello.rank].host} and from "
            f"{hello.host}\n  HINT: each process needs its own --process_id; is another job using "
            "this port?"
        )
    if not 0 <= hello.rank < server.size:
        return f"{who}: there are only the ranks 0 to {server.size - 1}"
    difference = _first_difference(hello, server)
    if difference is not None:
        what, theirs, ours = difference
        return (
            f"{who} has {what} {theirs}, {rank_0} {ours}"
            "\n  HINT: start the same command, from the same code, for every rank"
        )
    if hello.sees_run != server.sees_run:
        finds, does_not = (who, rank_0) if hello.sees_run else (rank_0, who)
        return (
            f"{finds} finds a run in {server.workdir} and {does_not} does not"
            "\n  HINT: --workdir must be a folder that all hosts share"
        )
    return ""


def _first_difference(theirs: Hello, ours: Hello) -> tuple[str, Any, Any] | None:
    """The first setting in which two launchers differ, with both values."""
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
