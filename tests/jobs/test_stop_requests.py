"""Requests to stop a job of several processes on one machine."""

from __future__ import annotations

import os
import signal
import time

import pytest
from job_helpers import (
    AT_ONCE,
    TWO,
    begin,
    log_of,
    processes_of,
    run,
    wait_for_line,
    worker_of,
)
from runs import wait_for

from launcher.report.attempts import read_attempts

__all__ = ["begin", "run"]  # fixtures

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("launcher", signal.SIGTERM),
        pytest.param("launcher", signal.SIGINT, marks=slow),
        pytest.param("launcher", signal.SIGUSR1, marks=slow),
        pytest.param("launcher", signal.SIGUSR2, marks=slow),
        pytest.param("launcher", signal.SIGHUP, marks=slow),
        pytest.param("rank 0", signal.SIGTERM, marks=slow),
        pytest.param("rank 1", signal.SIGTERM, marks=slow),
        pytest.param("rank 1", signal.SIGINT, marks=slow),
        pytest.param("rank 1", signal.SIGUSR1, marks=slow),
        ("rank 1", signal.SIGUSR2),  # from submitit
    ],
)
def test_asked_to_stop_all_ranks_save_the_same_step(begin, run, tmp_path, target, number):
    workdir = tmp_path / "run"
    process = begin(workdir, *TWO)
    process.send_signal(signal.SIGQUIT)  # Ctrl-Backslash
    wait_for_line(log_of(workdir, 1), "Current thread 0x")
    pid = process.pid if target == "launcher" else worker_of(workdir, int(target[-1]))
    os.kill(pid, number)
    asked = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 42, out + err
    assert time.monotonic() - asked < 3 * AT_ONCE
    stopped = [line for line in err.splitlines() if line.startswith("asked to stop: saved at")]
    assert len(stopped) == 1
    step = int(stopped[0].rsplit(maxsplit=1)[1])
    assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name == str(step)]
    assert not (workdir / "failure.json").exists()
    assert processes_of(workdir) == []
    stacks = (
        f"SIGQUIT: the stacks of its workers are in {workdir}/logs/attempt-1; the run continues"
    )
    assert stacks in out


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["before", "evaluation"])
def test_asked_to_stop_when_no_step_is_taken(begin, tmp_path, phase):
    workdir = tmp_path / "run"
    if phase == "before":
        process = begin(workdir, *TWO, until=None)
        worker_of(workdir, 1)
    else:
        slow = ["--config.eval.every_steps=10", "--config.eval.batch_size=4"]
        process = begin(workdir, *TWO, *slow, until="step 10/")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 42, out + err
    assert "asked to stop" in err
    assert not (workdir / "failure.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_twice_does_not_wait(begin, tmp_path, processes):
    # Slow batches: one process asks between steps, and would have saved before the second.
    process = begin(tmp_path / "run", f"--processes={processes}", "--config.data.delay=0.3")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - pressed < AT_ONCE
    assert "Ctrl-C again to stop at once" in out + err
    assert processes_of(tmp_path / "run") == []
    (attempt,) = read_attempts(tmp_path / "run", {})
    assert (attempt.ending, attempt.went_well) == ("stopped at once; not saved", True)


@pytest.mark.slow
def test_a_rank_that_does_not_stop_is_killed_after_the_grace(begin, tmp_path):
    stalled = ["--config.data.kind=native", f"--config.data.once={tmp_path}/stalled"]
    process = begin(tmp_path / "run", *TWO, *stalled, "--grace_secs=2", until=None)
    wait_for(tmp_path / "stalled")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 42
    assert err.startswith("error: rank 1 has not stopped within 2 s"), err
    assert processes_of(tmp_path / "run") == []
