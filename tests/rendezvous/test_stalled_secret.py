"""Launchers go on while an object store or a network file system stalls on their secret."""

from __future__ import annotations

import threading

import pytest
from rendezvous_job import Job, job_opener, starts  # noqa: F401 (a fixture)

from launcher.exit_codes import RETRY
from launcher.processes.event_loop import EventLoop
from launcher.processes.failure import Failure
from launcher.rendezvous import client as client_module
from launcher.rendezvous import server as server_module
from launcher.rendezvous.secret import JobSecret
from trainer.errors import UserError


class StalledSecret(JobSecret):
    """Reads and publishes once `released` is set."""

    def __init__(self, workdir):
        super().__init__(str(workdir), {})
        self.released, self.is_publishing = threading.Event(), threading.Event()
        self.reads = 0

    def read(self):
        self.reads += 1
        self.released.wait(60)
        return super().read()

    def _publish_local(self):
        self.is_publishing.set()
        self.released.wait(60)
        return super()._publish_local()


@pytest.fixture
def stalled(tmp_path):
    secret = StalledSecret(tmp_path / "runs/run")
    yield secret
    secret.released.set()


def test_a_client_goes_on_while_its_secret_is_not_read(open_job, monkeypatch, stalled):
    """The server turns it away meanwhile; it does not read twice at once, and joins afterwards."""
    monkeypatch.setattr(server_module, "_HELLO_SECS", 0.2)
    monkeypatch.setattr(client_module, "HEARTBEAT_SECS", 0.1)
    job = open_job()
    late = job.join(1, {}, secret=stalled)
    job.loop.run(lambda: job.server._strangers == 1)
    passed = []
    job.loop.call_later(1.5, lambda: passed.append(True))  # a try per second if it did not wait
    job.loop.run(lambda: bool(passed))
    assert (stalled.reads, late.ends, job.server._strangers) == (1, [], 1)
    stalled.released.set()
    starts(job, late)


@pytest.mark.parametrize("how", ["the timeout", "a stop"])
def test_a_client_ends_while_its_secret_is_not_read(open_job, stalled, how):
    job = open_job()
    late = job.join(1, {}, secret=stalled, seconds=1.0 if how == "the timeout" else 60)
    job.loop.run(lambda: stalled.reads == 1)
    if how == "a stop":
        job.clients[0].report(Failure(1, RETRY, "stopped"))
    job.loop.run(lambda: bool(late.ends))
    stalled.released.set()  # nobody waits for it any more
    starts(job, job.join(1, {}))
    (failure,) = late.ends
    unread = f"({stalled.source} is not read yet)"
    assert unread in failure.message if how == "the timeout" else failure.message == "stopped"
    assert (failure.exit_code, late.starts) == (RETRY, [])


def test_launchers_wait_for_a_secret_that_is_not_published(open_job, monkeypatch, stalled):
    """However long it takes: they do not take rank 0 for another job's."""
    monkeypatch.setattr(client_module, "_DOUBT_SECS", 0.0)
    job = open_job(secret=stalled)
    one = job.join(1, {})
    passed = []
    job.loop.call_later(0.5, lambda: passed.append(True))
    job.loop.run(lambda: bool(passed))
    job.server._give_up()
    (failure,) = job.first.ends
    assert f"{stalled.source}, the secret of the ranks, is not written yet" in failure.message
    job.first.ends.clear()
    job.server._is_over = False
    stalled.released.set()
    starts(job, one)


def test_leaving_waits_for_a_stalled_secret_for_a_while_only(tmp_path, monkeypatch, stalled):
    """What is published later is withdrawn all the same."""
    monkeypatch.setattr(server_module, "_WITHDRAW_SECS", 0.2)
    with EventLoop() as loop:
        job = Job(loop, tmp_path / "runs/run", 2, {}, secret=stalled)
        assert stalled.is_publishing.wait(60)
        job.leave()
    assert not stalled.released.is_set()
    stalled.released.set()
    for thread in threading.enumerate():
        if thread.name == "podlift-blocking":
            thread.join(60)
    assert list(tmp_path.iterdir()) == []


def test_a_secret_that_cannot_be_published_is_the_users_error(open_job, tmp_path):
    (tmp_path / "runs").write_text("")
    job = open_job()
    with pytest.raises(UserError, match="which holds the secret of the ranks, cannot be written"):
        job.loop.run(lambda: False)
