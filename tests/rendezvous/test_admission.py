"""Which launchers the server admits."""

from __future__ import annotations

import dataclasses
import json
import socket

import pytest

from launcher.exit_codes import RETRY, USAGE
from launcher.processes.event_loop import EventLoop
from launcher.rendezvous.admission import check_hello
from launcher.rendezvous.late import Late
from launcher.rendezvous.protocol import Hello, Listener
from launcher.rendezvous.root_cause import RootCause
from launcher.rendezvous.secret import JobSecret
from launcher.rendezvous.server import Server

RANK_0 = Hello(0, 3, "n0", "job", '{"seed": 0}', "podlift 1", "/run", False)
RANK_1 = dataclasses.replace(RANK_0, rank=1, host="n1")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": 2}, "rank 2 on n2 expects 2 processes, rank 0 on n0 expects 3"),
        ({"rank": 1}, "rank 1 joined twice, from n1 and from n2"),
        ({"rank": 3}, "there are only the ranks 0 to 2"),
        ({"config": '{"seed": 1}'}, "rank 2 on n2 has config.seed 1, rank 0 on n0 0"),
        ({"config": "{"}, "has a config that cannot be read, {"),
        ({"versions": "podlift 2"}, "has the versions podlift 2"),
        ({"workdir": "/other"}, "has --workdir /other"),
        ({"sees_run": True}, "rank 2 on n2 finds a run in /run and rank 0 on n0 does not"),
    ],
)
def test_a_contradiction_ends_the_job(changes, text):
    hello = dataclasses.replace(RANK_1, **{"rank": 2, "host": "n2", **changes})
    refusal = check_hello(hello, {0: RANK_0, 1: RANK_1}, has_started=False)
    assert text in refusal.reason
    assert (refusal.exit_code, refusal.ends_the_job) == (USAGE, True)


def test_a_launcher_of_another_job_or_a_late_one_does_not_end_the_job():
    other = dataclasses.replace(RANK_1, job="other", size=9)
    refusal = check_hello(other, {0: RANK_0}, has_started=True)
    assert "belongs to another job (other) than rank 0 on n0 (job)" in refusal.reason
    assert (refusal.exit_code, refusal.ends_the_job) == (USAGE, False)
    refusal = check_hello(RANK_1, {0: RANK_0}, has_started=True)
    assert "joined after the job had started" in refusal.reason
    assert (refusal.exit_code, refusal.ends_the_job) == (RETRY, False)
    assert check_hello(RANK_1, {0: RANK_0}, has_started=False) is None


def test_a_launcher_of_another_version_gets_a_clear_error(tmp_path):
    """Whatever its hello holds."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def fail(*_):
        raise AssertionError

    lines = []
    listener = Listener(fail, fail, fail, lines.append)
    with EventLoop() as loop:
        server = Server(
            loop,
            RANK_0,
            port,
            "127.0.0.1",
            fail,
            listener,
            lambda decide: RootCause(loop, decide, consequence_secs=0, hang_secs=0),
            Late(2, 60, loop.time),
            60,
            60,
            JobSecret(str(tmp_path / "run"), {}),
        )
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b'{"kind": "join", "protocol": 1, "card": "%s"}\n' % (b"x" * 9000))
            received = []
            loop.add_reader(client, lambda: received.append(client.recv(1000)))
            loop.run(lambda: b"" in received)  # the connection is closed a second later
            loop.remove_reader(client)
        server.leave()
    message = json.loads(received[0])
    assert message["kind"] == "end"
    assert message["failure"]["message"] == "another version of podlift holds this port"
    assert message["failure"]["exit_code"] == USAGE
    assert lines == ["turned away a connection from 127.0.0.1: it is of another podlift"]
