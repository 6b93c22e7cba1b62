"""Only launchers of the job take part in its rendezvous, and strangers do it no harm."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
from object_store import BUCKET, object_store  # noqa: F401 (a fixture)
from rendezvous_job import job_opener, secret_of, starts  # noqa: F401 (a fixture)

from launcher.exit_codes import USAGE
from launcher.rendezvous import client as client_module
from launcher.rendezvous import server as server_module
from launcher.rendezvous.handshake import Handshake, new_nonce
from launcher.rendezvous.protocol import PROTOCOL
from launcher.rendezvous.secret import NAME, VARIABLE, JobSecret, NoSecret
from trainer.errors import UserError


class Stranger:
    """A connection that anybody may open; `received` is all that the other side has said."""

    def __init__(self, loop, connected):
        self.loop = loop
        self.socket = connected
        self.received = b""
        self.is_closed = False
        loop.add_reader(connected, self._read)

    def _read(self):
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        self.received += data
        if not data:
            self.is_closed = True
            self.loop.remove_reader(self.socket)

    def say(self, *messages):
        for message in messages:
            line = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
            with contextlib.suppress(ConnectionError):
                self.socket.sendall(line)

    def hear(self):
        """Waits for one more message; the last one."""
        before = self.received.count(b"\n")
        self.loop.run(lambda: self.is_closed or self.received.count(b"\n") > before)
        return json.loads(self.received.splitlines()[-1]) if self.received else None

    def close(self):
        self.loop.remove_reader(self.socket)
        self.socket.close()


@pytest.fixture
def knock():
    with contextlib.ExitStack() as stack:

        def connect(job):
            stranger = Stranger(job.loop, socket.create_connection(("127.0.0.1", job.port)))
            stack.callback(stranger.close)
            return stranger

        yield connect


def handshake_of(stranger, secret, nonce=None):
    """The messages by which the right client introduces itself."""
    join = {"kind": "join", "protocol": PROTOCOL, "nonce": nonce or new_nonce()}
    stranger.say(join)
    challenge = stranger.hear()
    proof = Handshake(secret, join["nonce"], challenge["nonce"]).proof("client")
    return join, {"kind": "proof", "proof": proof}


FAILURE = {"rank": 1, "exit_code": 1, "message": "\x1b[2Jfake"}
JOIN = {"kind": "join", "protocol": PROTOCOL, "nonce": "0" * 64}
HELLO = {"rank": 1, "size": 9, "host": "h", "job": "j", "config": "{}", "versions": "v"}
GARBAGE = {
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "bytes": b"\xff\xfe\n",
    "list": b"[]\n",
    "deep": b"[" * 60_000 + b"\n",
    "a line without an end": b"x" * 70_000,
    "heartbeats without an end": b'{"kind": "heartbeat"}\n' * 4000,
    "a hello without a handshake": {"kind": "hello", "protocol": PROTOCOL, "hello": HELLO},
    "an end": {"kind": "end", "protocol": PROTOCOL, "failure": FAILURE},
    "abandoned": {"kind": "abandoned", "protocol": PROTOCOL, "failure": FAILURE},
    "a nonce of its own kind": {**JOIN, "nonce": ["0" * 64]},
}


def test_a_stranger_cannot_end_a_job_and_learns_nothing(open_job, knock):
    job = open_job(size=3)
    one = job.join(1, {})
    for text in GARBAGE.values():
        stranger = knock(job)
        stranger.say(text)
        job.loop.run(lambda s=stranger: s.is_closed)
        assert stranger.received == b""
    silent = knock(job)
    starts(job, one, job.join(2, {}))
    assert job.server._strangers == len(GARBAGE)
    (line,) = job.first.lines
    assert line == (
        "turned away a connection from 127.0.0.1: what it sends is not the protocol of a launcher"
    )
    assert not silent.is_closed


@pytest.mark.parametrize("proof", ["", "\ud800", None, 7, "0" * 64, "another secret", "as server"])
def test_the_wrong_proof_is_turned_away(open_job, knock, proof):
    job = open_job()
    stranger = knock(job)
    join, _ = handshake_of(stranger, b"")
    challenge = json.loads(stranger.received)
    if proof == "another secret":
        proof = Handshake(b"another secret", join["nonce"], challenge["nonce"]).proof("client")
    elif proof == "as server":
        secret = secret_of(job)
        proof = Handshake(secret, join["nonce"], challenge["nonce"]).proof("server")
    stranger.say({"kind": "proof", "proof": proof}, {"kind": "hello", "hello": HELLO})
    job.loop.run(lambda: stranger.is_closed)
    assert json.loads(stranger.received.splitlines()[-1]) == {"kind": "stranger"}
    assert job.first.lines == [
        "turned away a connection from 127.0.0.1: it does not have the secret of this job"
    ]
    starts(job, job.join(1, {}))


def test_a_recorded_handshake_is_worth_nothing(open_job, knock):
    job = open_job()
    secret = secret_of(job)
    launcher = knock(job)
    join, proof = handshake_of(launcher, secret)
    launcher.say(proof)
    welcome = launcher.hear()
    assert welcome["kind"] == "welcome"
    nonce = json.loads(launcher.received.splitlines()[0])["nonce"]
    assert Handshake(secret, join["nonce"], nonce).proves("server", welcome["proof"])
    replay = knock(job)
    replay.say(join)
    assert replay.hear()["kind"] == "challenge"
    replay.say(proof)
    assert replay.hear() == {"kind": "stranger"}


@pytest.mark.parametrize("how", ["reflect", "silence the proof", "older", "own secret"])
def test_what_is_not_rank_0_learns_nothing_and_is_named(open_job, knock, monkeypatch, how):
    """Whoever holds its port. The launcher tries again for a while: a file may be late."""
    monkeypatch.setattr(client_module, "_DOUBT_SECS", 0.5)
    job = open_job()
    heard = b""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        launcher = job.join(1, {}, port=impostor.getsockname()[1])
        began = job.loop.time()
        while not launcher.ends:
            assert job.loop.time() - began < 20
            impostor.settimeout(5)
            other = Stranger(job.loop, impostor.accept()[0])
            nonce = other.hear()["nonce"]
            if how == "older":
                failure = {"rank": 0, "exit_code": 0, "message": "\x1b[2J"}
                other.say({"kind": "end", "failure": failure})
            else:
                other.say({"kind": "challenge", "nonce": nonce})
                proof = other.hear()["proof"]
                if how == "own secret":
                    proof = Handshake(b"my own", nonce, nonce).proof("server")
                other.say({"kind": "welcome", "proof": "" if "silence" in how else proof})
            job.loop.run(lambda o=other: o.is_closed or b'"hello"' in o.received)
            heard += other.received
            assert b'"hello"' not in heard
            other.close()
            due = []
            job.loop.call_later(1.1, lambda d=due: d.append(True))
            job.loop.run(lambda d=due: bool(launcher.ends or d))
    (failure,) = launcher.ends
    assert failure.exit_code == USAGE
    assert failure.message.startswith(
        f"rank 1 on n1 does not find rank 0 of this job at 127.0.0.1:{impostor_port(failure)}: "
    )
    expected = "another version" if how == "older" else "it does not have the secret in"
    assert expected in failure.message
    assert "HINT: is another job using this port?" in failure.message
    assert b"workdir" not in heard
    assert not launcher.starts


def impostor_port(failure):
    return failure.message.split("127.0.0.1:")[1].split(":")[0]


def test_a_launcher_that_sees_another_folder_says_so(open_job, monkeypatch, tmp_path):
    monkeypatch.setattr(client_module, "_DOUBT_SECS", 0.5)
    job = open_job()
    (tmp_path / "other").mkdir()
    lost = job.join(1, {}, workdir=str(tmp_path / "other"))
    job.loop.run(lambda: bool(lost.ends))
    assert f"this host sees no {tmp_path}/other/{NAME}" in lost.ends[0].message
    assert lost.ends[0].exit_code == USAGE
    assert not job.first.ends
    starts(job, job.join(1, {}))


def test_a_secret_of_the_environment_needs_no_file(open_job, monkeypatch):
    monkeypatch.setattr(client_module, "_DOUBT_SECS", 0.0)
    given, other = ({VARIABLE: letter * 16} for letter in "ab")
    job = open_job(environ=given)
    wrong, without = job.join(1, other), job.join(1, {})
    job.loop.run(lambda: bool(wrong.ends and without.ends))
    assert f"it does not accept the secret in {VARIABLE}" in wrong.ends[0].message
    starts(job, job.join(1, given))
    assert not job.workdir.exists()
    with pytest.raises(UserError, match="PODLIFT_SECRET is shorter than 16 characters"):
        JobSecret("run", {VARIABLE: "short"})


def test_a_crowd_of_strangers_does_not_keep_launchers_out(open_job, knock, monkeypatch):
    monkeypatch.setattr(server_module, "_MAX_STRANGERS", 3)
    job = open_job(size=3)
    crowd = [knock(job) for _ in range(5)]
    one, two = job.join(1, {}), job.join(2, {})
    starts(job, one, two)
    assert sum(not session.has_left for session in job.server._unknown) <= 3
    job.loop.run(lambda: sum(stranger.is_closed for stranger in crowd) >= 2)


def test_who_says_nothing_is_turned_away_in_time(open_job, knock, monkeypatch):
    monkeypatch.setattr(server_module, "_HELLO_SECS", 0.2)
    job = open_job()
    for first in (b"", b"{", json.dumps(JOIN).encode() + b"\n"):
        stranger = knock(job)
        stranger.say(first)
        job.loop.run(lambda s=stranger: s.is_closed)
    assert job.server._strangers == 3
    assert "it did not introduce itself within" in job.first.lines[0]
    starts(job, job.join(1, {}))


def test_a_server_that_listens_everywhere_says_so(open_job):
    job = open_job(address="")
    assert job.first.lines == [
        f"listening on all addresses of this machine (0.0.0.0:{job.port}): the name of rank 0's "
        "host stands for none of them here"
    ]
    starts(job, job.join(1, {}))


# The file of the secret


def test_the_secret_stays_with_a_run_and_with_nothing_else(tmp_path):
    workdir = tmp_path / "runs/run"
    before = os.umask(0)
    try:
        secret = JobSecret(str(workdir), {})
        first = secret.publish()
    finally:
        os.umask(before)
    assert (workdir / NAME).stat().st_mode & 0o777 == 0o600
    assert JobSecret(str(workdir), {}).read() == JobSecret(str(workdir), {}).publish() == first
    secret.withdraw()  # the job was refused
    assert list(tmp_path.iterdir()) == []
    secret = JobSecret(str(workdir), {})
    second = secret.publish()
    assert second != first
    (workdir / "config.json").write_text("{}")
    secret.withdraw()
    assert JobSecret(str(workdir), {}).publish() == second


def a_link(place: Path):
    place.with_name("elsewhere").write_text("0" * 64 + "\n")
    place.symlink_to("elsewhere")


def readable_by_others(place: Path):
    place.write_text("0" * 64 + "\n")
    place.chmod(0o644)


def damaged(place: Path):
    place.write_text("")
    place.chmod(0o600)


@pytest.mark.parametrize("plant", [a_link, readable_by_others, damaged, os.mkfifo])
def test_a_secret_that_others_may_know_is_replaced(tmp_path, plant):
    plant(tmp_path / NAME)
    secret = JobSecret(str(tmp_path), {}).publish()
    assert secret != b"0" * 64
    assert JobSecret(str(tmp_path), {}).read() == secret
    if plant is a_link:
        assert (tmp_path / "elsewhere").read_text() == "0" * 64 + "\n"


def test_in_an_object_store(object_store):  # noqa: F811
    workdir = f"gs://{BUCKET}/run"
    secret = JobSecret(workdir, {})
    with pytest.raises(NoSecret, match=f"this host sees no {workdir}/{NAME}"):
        secret.read()
    known = secret.publish()
    assert JobSecret(workdir, {}).read() == known
    secret.withdraw()
    assert object_store.objects == {}
