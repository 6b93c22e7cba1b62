"""The launchers of a job in one event loop: what the rendezvous of each is told."""

from __future__ import annotations

import contextlib
import dataclasses
import socket

import pytest

from launcher.processes.event_loop import EventLoop
from launcher.rendezvous.client import Client
from launcher.rendezvous.late import Late
from launcher.rendezvous.protocol import Hello, Listener
from launcher.rendezvous.root_cause import RootCause
from launcher.rendezvous.secret import JobSecret
from launcher.rendezvous.server import Server


class Launcher:
    """What the rendezvous tells one launcher."""

    def __init__(self):
        self.starts, self.ends, self.lines = [], [], []
        self.listener = Listener(
            self.starts.append, self.ends.append, self.lines.append, self.lines.append
        )


class Job:
    """The launchers of a job in one event loop, rank 0 as the server."""

    def __init__(self, loop, workdir, size, environ, address="127.0.0.1", secret=None):
        self.loop = loop
        self.workdir = workdir
        self.hello = Hello(0, size, "n0", "job", "{}", "podlift", str(workdir), sees_run=False)
        self.first = Launcher()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.server = Server(
            loop,
            self.hello,
            self.port,
            address,
            lambda: 1,
            self.first.listener,
            lambda decide: RootCause(loop, decide, consequence_secs=0, hang_secs=0),
            Late(size, 60, loop.time),
            60,
            60,
            secret or JobSecret(str(workdir), environ),
        )
        self.server.open()
        self.clients = []

    def join(self, rank, environ, port=None, secret=None, seconds=60, **changes):
        launcher = Launcher()
        hello = dataclasses.replace(self.hello, **{"rank": rank, "host": f"n{rank}", **changes})
        secret = secret or JobSecret(hello.workdir, environ)
        port = port or self.port
        listener = launcher.listener
        client = Client(self.loop, hello, "127.0.0.1", port, listener, seconds, 60, 5, secret)
        client.open()
        self.clients.append(client)
        return launcher

    def leave(self):
        for rendezvous in (*self.clients, self.server):
            rendezvous.leave()


@pytest.fixture(name="open_job")
def job_opener(tmp_path):
    with EventLoop() as loop, contextlib.ExitStack() as stack:

        def open_one(size=2, environ=None, **settings):
            job = Job(loop, tmp_path / "runs/run", size, environ or {}, **settings)
            stack.callback(job.leave)
            return job

        yield open_one


def secret_of(job):
    job.loop.run(lambda: job.server.secret is not None)
    return job.server.secret


def starts(job, *launchers):
    job.loop.run(lambda: all(launcher.starts for launcher in (job.first, *launchers)))
    assert not any(launcher.ends for launcher in (job.first, *launchers))
