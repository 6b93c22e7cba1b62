"""Two hosts: network namespaces with their own addresses, and a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, skip_here
from job_helpers import AT_ONCE, CONFIG, HERE, log_of, processes_of, wait_for_line


def _why_not() -> str:
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None:
        return "ip not installed (Debian: iproute2)"
    done = subprocess.run(["ip", "netns", "add", "podlift-probe"], capture_output=True, check=False)
    if done.returncode:
        return "no network namespaces here"
    subprocess.run(["ip", "netns", "delete", "podlift-probe"], check=False)
    return ""


pytestmark = [pytest.mark.slow, skip_here(_why_not())]


@pytest.fixture
def hosts():
    """The names of two namespaces, 10.77.0.1 and 10.77.0.2, joined by a cable."""
    names = [f"podlift{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True)

    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "eth0", "netns", names[1])
    for number, name in enumerate(names, 1):
        ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.fixture
def begin(hosts, cache_dir, tmp_path):
    """Starts the launcher of a rank on its host."""
    started = []

    def begin_rank(rank, *arguments):
        process = subprocess.Popen(
            [
                *("ip", "netns", "exec", hosts[rank], sys.executable, "-m", "launcher", CONFIG),
                f"--workdir={tmp_path}/run",
                "--fake_devices=2",
                "--coordinator_address=10.77.0.1:8476",
                "--num_processes=2",
                f"--process_id={rank}",
                "--heartbeat_timeout_secs=3",
                *arguments,
            ],
            env={
                **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")},
                "PYTHONPATH": f"{ROOT}:{HERE}",
                "JAX_COMPILATION_CACHE_DIR": str(cache_dir),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin_rank
    for process in started:
        process.kill()
        process.communicate()


def test_one_job_on_two_hosts(begin):
    for process in [begin(0), begin(1)]:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, out + err
        assert err == ""


@pytest.mark.parametrize("side", [0, 1])
def test_a_cut_cable_ends_the_job_with_a_clear_report(begin, hosts, tmp_path, side):
    slow = ["--config.num_steps=2000", "--config.data.delay=0.02"]
    processes = [begin(0, *slow), begin(1, *slow)]
    wait_for_line(log_of(tmp_path / "run", 0), "step 10/")
    subprocess.run(["ip", "-n", hosts[side], "link", "set", "eth0", "down"], check=True)
    cut = time.monotonic()
    for process, lost in zip(
        processes, ("lost rank 1 on", "lost rank 0 at 10.77.0.1"), strict=True
    ):
        _, err = process.communicate(timeout=30)
        assert process.returncode == 42, err
        assert f"error: {lost}" in err
        assert "no heartbeat for" in err
    assert time.monotonic() - cut < 3 + AT_ONCE
    assert processes_of(tmp_path / "run") == []
