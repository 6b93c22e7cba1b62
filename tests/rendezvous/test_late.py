"""Which rank the others wait for, in one launcher and across launchers."""

from __future__ import annotations

import pytest

from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure
from launcher.rendezvous.client import Client
from launcher.rendezvous.late import Idle, Late
from launcher.rendezvous.protocol import Hello, Listener
from launcher.rendezvous.root_cause import RootCause
from launcher.rendezvous.secret import VARIABLE, JobSecret
from launcher.rendezvous.server import Server


def idle(rank, count, seconds, doing="loads its data"):
    return Idle(Failure(rank, 42, f"rank {rank} hangs", count=count), doing, seconds)


def test_the_rank_that_all_wait_for_is_named_now_and_then():
    clock = [100.0]
    late = Late(3, fresh_secs=11, now=lambda: clock[0])

    def add(*idles):
        return next(filter(None, [late.add(each) for each in idles]), None)

    assert add(idle(0, 2, 99), idle(2, 2, 99)) is None  # rank 1 makes progress
    assert add(idle(1, 2, 30)) is None  # all do the same
    assert add(idle(2, 3, 19), idle(0, 3, 21), idle(1, 2, 21)) is None  # not yet
    text = "waiting for rank 1 for 20 s: it loads its data"
    assert add(idle(1, 2, 22), idle(0, 3, 21), idle(2, 3, 20)) == text
    assert add(idle(2, 3, 39), idle(0, 3, 39), idle(1, 2, 42)) is None
    # One that is suspended is waited for, however far it has come.
    text = "waiting for ranks 0, 2 for 40 s: rank 0 is suspended"
    suspended = [idle(0, -1, 41, "is suspended"), idle(2, -1, 40, "is suspended")]
    assert add(*suspended, idle(1, 2, 43)) == text
    clock[0] += 12  # what ranks 0 and 2 have said is too old: they make progress
    assert add(idle(1, 2, 99)) is None
    assert [hang.rank for hang in late.hangs()] == [1]


@pytest.mark.parametrize("late_rank", [0, 1])
def test_a_rank_that_has_more_time_than_the_one_that_waits_for_it_is_named(late_rank):
    """The launcher of the other reports the hang, since training has less time than a save."""
    failures = []
    listener = Listener(lambda start: None, failures.append, lambda line: None, lambda line: None)
    hellos = [Hello(rank, 2, "host", "job", "{}", "", "run", False) for rank in (0, 1)]
    with EventLoop() as loop:

        def make_root_cause(on_decision):
            return RootCause(loop, on_decision, consequence_secs=0.2, hang_secs=0.2)

        late = Late(2, 60, loop.time)
        secret = JobSecret("run", {VARIABLE: "s" * 16})
        server = Server(
            loop,
            hellos[0],
            0,
            "127.0.0.1",
            lambda: 1,
            listener,
            make_root_cause,
            late,
            60,
            60,
            secret,
        )
        port = server._socket.getsockname()[1]
        client = Client(loop, hellos[1], "127.0.0.1", port, listener, 60, 60, 60, secret)
        client.open()
        loop.run(lambda: server._has_started and client._has_started)
        sides = [server, client]
        for rank, side in enumerate(sides):
            side.idle(idle(rank, 4 if rank == late_rank else 9, 7))
        loop.run(lambda: len(late.hangs()) == 2)
        sides[1 - late_rank].report(Failure(1 - late_rank, 42, "hangs", count=9))
        loop.run(lambda: len(failures) == 2)
        for side in sides:
            side.leave()
    assert [failure.rank for failure in failures] == [late_rank] * 2
