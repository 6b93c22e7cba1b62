"""A rank that fails on one machine: one root cause, nothing left behind, and restarts."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest
from clock_step import Clock, why_no_clock
from conftest import ROOT, skip_here
from job_helpers import (
    AT_ONCE,
    TWO,
    alone,
    assert_same_state,
    begin,
    log_of,
    processes_of,
    reference,
    rows_of,
    run,
    worker_of,
)

__all__ = ["alone", "begin", "run"]  # fixtures

slow = pytest.mark.slow


def test_a_killed_rank_ends_the_job_at_once(begin, tmp_path):
    workdir = tmp_path / "run"
    process = begin(workdir, *TWO)
    os.kill(worker_of(workdir, 1), signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 42, err
    assert time.monotonic() - killed < AT_ONCE
    assert err.startswith("error: rank 1 was killed by SIGKILL around step "), err
    assert "out of memory?" in err
    assert f"full log: {log_of(workdir, 1)}" in err
    assert "rank 0" not in err.replace("rank-0", "")
    failure = json.loads((workdir / "failure.json").read_text())
    assert failure["rank"] == 1
    assert failure["exit_code"] == 42
    assert processes_of(workdir) == []


@pytest.mark.parametrize("rank", [pytest.param(0, marks=slow), 1])
def test_the_rank_that_raised_is_the_root_cause(run, tmp_path, rank):
    workdir = tmp_path / "run"
    code, _, err = run(workdir, *TWO, "--config.data.kind=raise", f"--config.data.rank={rank}")
    assert code == 1
    assert err.count("Traceback") == 1
    assert "ValueError: a fault of the user's code" in err
    assert f"error: ValueError on rank {rank}: a fault of the user's code" in err
    assert "gloo" not in err.lower(), "a consequence for another rank is no root cause"
    assert "Traceback" in log_of(workdir, rank).read_text()
    assert json.loads((workdir / "failure.json").read_text())["rank"] == rank


@pytest.mark.parametrize(
    ("kind", "code", "expected"),
    [
        ("nan", 1, r"error: loss and grad_norm are not finite at step 18 \("),
        (
            "label",
            2,
            "error: the loss of step 18 is not finite: config.loss: the label -1 of training "
            r"example 1128 is none of the model's 10 classes, 0 to 9 \(read by rank 1\)",
        ),
    ],
)
def test_a_loss_that_ranks_notice_at_different_steps(run, tmp_path, kind, code, expected):
    """Rank 0 saves into memory, for which it reads the loss; rank 1 dispatches more steps."""
    rare = [f"--config.{key}.every_steps=100000" for key in ("checkpoint", "eval")]
    rare += ["--config.log_every_steps=28"]  # at which rank 1 reads it
    memory = [
        f"--config.checkpoint.fast_dir={tmp_path}",
        "--config.checkpoint.fast_every_secs=0.01",
    ]
    bad = [f"--config.data.kind={kind}", "--config.data.at_step=1128", "--config.data.delay=0.05"]
    found, out, err = run(
        tmp_path / "run",
        *(*TWO, *rare, *memory, *bad, "--config.data.shuffle=False", "--config.num_steps=100"),
        *("--hang_timeout_secs=20", "--max_restarts=0"),
    )
    assert found == code, out + err
    assert re.search(expected, err), err
    assert err.count("error:") == 1


def test_a_rank_whose_data_stop_is_the_root_cause(launch, tmp_path):
    """It is no end of the training there, for which the other rank would wait."""
    code, out, err = launch(
        f"--config={ROOT}/tests/user_code.py",
        f"--workdir={tmp_path}/run",
        *TWO,
        *("--config.data.error=stop", "--config.data.place=augment", "--config.data.rank=1"),
        environ={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    assert code == 1, out + err
    assert "\nerror: StopIteration on rank 1: at tests/user_code.py:" in err, err
    assert "stopped at" not in out


@pytest.mark.slow
def test_the_children_of_a_rank_end_with_it(begin, tmp_path):
    """Also what left its session."""
    notes = tmp_path / "children"
    arguments = ["--config.data.kind=children", "--config.data.at_step=3"]
    process = begin(tmp_path / "run", *TWO, *arguments, environ={"CHILDREN": str(notes)})
    os.kill(worker_of(tmp_path / "run", 0), signal.SIGKILL)
    process.communicate(timeout=20)
    for pid in notes.read_text().split():
        assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.slow
def test_a_rank_that_exits_without_an_outcome(run, tmp_path):
    code, _, err = run(tmp_path / "run", *TWO, "--config.data.kind=exit")
    assert code == 1
    assert err.startswith("error: rank 1 exited with code 3 and no error message, around step 4")


@pytest.mark.slow
def test_a_crash_of_native_code(run, tmp_path):
    code, _, err = run(tmp_path / "run", *TWO, "--config.data.kind=abort")
    assert code == 1
    assert err.startswith("error: rank 1 was killed by SIGSEGV around step 4")


def test_a_stalled_rank_is_found_with_all_stacks(run, tmp_path):
    workdir = tmp_path / "run"
    code, _, err = run(
        workdir, *TWO, "--config.data.kind=stall", "--hang_timeout_secs=3", "--max_restarts=0"
    )
    assert code == 42
    assert "error: rank 1 has made no progress for 3 s, at step 4 (wait)" in err
    assert "in _fail" in log_of(workdir, 1).read_text()
    assert "most recent call first" in log_of(workdir, 0).read_text()
    assert processes_of(workdir) == []


@pytest.mark.slow
def test_a_suspended_rank_is_found(begin, tmp_path):
    process = begin(tmp_path / "run", *TWO, "--hang_timeout_secs=2")
    os.kill(worker_of(tmp_path / "run", 0), signal.SIGSTOP)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 42
    assert "rank 0 has made no progress" in err
    assert "is suspended (SIGSTOP)" in err
    assert processes_of(tmp_path / "run") == []


@pytest.mark.slow
@skip_here(why_no_clock())
def test_a_suspended_rank_and_a_step_of_the_clock_are_waited_for(begin, tmp_path):
    """With jax's own timeout, which was four seconds here, either ends the job."""
    clock = Clock(tmp_path)
    quick = ["--config.num_steps=150", "--heartbeat_timeout_secs=2"]
    process = begin(tmp_path / "run", *TWO, *quick, environ=clock.environ)
    clock.step(3600)
    pid = worker_of(tmp_path / "run", 1)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(pid, signal.SIGCONT)
    clock.step(3598)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert err == ""
    assert not (tmp_path / "run/logs/attempt-2").exists()


def test_workers_do_not_outlive_their_launcher(begin, tmp_path):
    process = begin(tmp_path / "run", *TWO)
    workers = [worker_of(tmp_path / "run", rank) for rank in (0, 1)]
    process.kill()
    process.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while any(pid in processes_of(tmp_path / "run") for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_restarted_run_is_one_run(run, alone, tmp_path):
    workdir = tmp_path / "run"
    fault = ["--config.data.kind=kill", "--config.data.at_step=25", "--config.data.delay=0.05"]
    once = f"--config.data.once={tmp_path}/once"
    code, out, err = run(workdir, *TWO, *fault, once, "--max_restarts=2")
    assert code == 0, out + err
    assert "rank 1 was killed by SIGKILL" in err
    assert "HINT" not in err  # nobody has to do anything
    assert "restart 1 of 2\n" in out
    assert "restored step 20" in out
    expected = reference(alone, run, "--fake_devices=4", "--config.num_steps=40")
    assert_same_state(workdir, expected, atol=1e-6)
    steps = [row["step"] for row in rows_of(workdir) if "train/loss" in row]
    assert steps == [10, 20, 30, 40]
    assert log_of(workdir, 1, attempt=2).exists()
    assert not (workdir / "failure.json").exists()


@pytest.mark.slow
def test_a_failure_that_repeats_at_the_same_step_is_not_retried(run, tmp_path):
    code, out, err = run(tmp_path / "run", *TWO, "--config.data.kind=raise", "--max_restarts=5")
    assert code == 1
    assert err.count("Traceback") == 2
    assert "failed twice at step 4" in out


@pytest.mark.slow
def test_retries_end_with_the_code_of_the_last_event(run, tmp_path):
    code, out, err = run(tmp_path / "run", *TWO, "--config.data.kind=kill", "--max_restarts=1")
    assert code == 42, out + err
    assert "no restart left" in out


@pytest.mark.slow
def test_one_supervised_process_is_restarted_too(run, tmp_path):
    fault = ["--config.data.kind=kill", "--config.data.rank=0", "--config.data.at_step=18"]
    once = [f"--config.data.once={tmp_path}/once", "--config.data.delay=0.05"]
    code, out, err = run(tmp_path / "run", "--fake_devices=2", *fault, *once, "--max_restarts=1")
    assert code == 0, out + err
    assert "restored step 10" in out
