"""Launchers whose resolver does not answer, or whose files have run out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT, wide
from job_helpers import CONFIG, ENVIRON

from launcher.rendezvous.address import connect_to, own_address

# `gone.example` takes a minute to resolve, and no connection finds a free descriptor.
LAUNCHER = """
import atexit, errno, os, socket, sys, time
ask, accepts = socket.getaddrinfo, []
def resolve(host, *arguments, **options):
    if host == "gone.example":
        print("asked", flush=True)
        time.sleep(60)
    return ask(host, *arguments, **options)
def accept(listening):
    accepts.append(1)
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
socket.getaddrinfo, socket.socket.accept = resolve, accept
atexit.register(lambda: print("accepts:", len(accepts), flush=True))
from launcher.__main__ import main
main()
"""


@pytest.fixture
def begin(tmp_path):
    started = []

    def begin_rank(rank, *arguments, host="gone.example", port=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = port or probe.getsockname()[1]
        where = f"--coordinator_address={host}:{port}"
        which = ["--num_processes=2", f"--process_id={rank}"]
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, CONFIG, where, *which, *arguments,
             f"--workdir={tmp_path}/run"],
            cwd=ROOT,
            env={**os.environ, **ENVIRON},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield begin_rank
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("rank", [0, wide(1)])
def test_a_resolver_that_does_not_answer_does_not_keep_a_launcher_from_stopping(begin, rank):
    process = begin(rank)
    assert "asked\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)  # and not a minute
    assert process.returncode == 42, out + err
    assert "SIGTERM to the launcher of rank" in err


@pytest.mark.parametrize("rank", [wide(0), 1])
def test_a_name_that_does_not_resolve_in_time_is_named(begin, rank):
    process = begin(rank, "--rendezvous_timeout_secs=1")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 42, err
    assert "the name gone.example " in err
    assert "Traceback" not in err


def test_a_name_without_an_address_is_named():
    with pytest.raises(OSError, match=r"the name no\.\.such\.name does not resolve: "):
        connect_to("no..such.name", 1)
    assert own_address("no..such.name") == ""


def test_a_server_without_a_free_file_waits_and_says_so(begin):
    port = None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = begin(0, "--rendezvous_timeout_secs=3", host="127.0.0.1", port=port)
    with socket.socket() as client:
        while client.connect_ex(("127.0.0.1", port)):
            assert process.poll() is None, process.communicate()
        out, err = process.communicate(timeout=30)
    assert process.returncode == 42, out + err
    assert out.count("warning: no other rank can connect: Too many open files") == 1
    assert int(out.rpartition("accepts: ")[2]) < 10
