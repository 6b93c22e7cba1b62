"""The attempts of a run in a report: how each ended, as its logs and failure.json say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT
from report_pages import ROWS, log, make_run, page_of


def attempts_of(folder):
    (run,), text, page = page_of(folder)
    return run, text, [attempt.ending for attempt in run.attempts], page


def test_attempts_as_their_logs_describe_them(tmp_path):
    folder = make_run(tmp_path / "run", ROWS, config={"num_steps": 40})
    # 1: rank 1 is killed; what rank 0 says is a consequence.
    log(folder, 1, 0, "step 10/40  loss 1", "error: X on rank 0: Gloo all-reduce failed: reset")
    log(folder, 1, 1, "step 10/40  loss 1")
    # 2: rank 1 raises and rank 0 is ended.
    log(folder, 2, 0, "restored step 10 from /x", "warning: slow", "warning: slow", "step 15/40  l")
    log(folder, 2, 1, "step 15/40  loss 1", "error: ValueError on rank 1: mine", "  more")
    # 3: asked to stop.
    log(folder, 3, 0, "restored step 15 from /x", "step 20/40  loss 1")
    log(folder, 3, 0, "", "", "asked to stop: saving at step 22")
    # 10: without a word.
    log(folder, 10, 0, "restored step 22 from /x", "step 30/40  loss 1")
    run, text, endings, page = attempts_of(folder)
    assert endings == [
        "rank 1 ended without an error message at step 10; then X on rank 0: Gloo all-reduce "
        "failed: reset",
        "ValueError on rank 1: mine",
        "asked to stop: saving at step 22",
        "",
    ]
    assert [a.number for a in run.attempts] == [1, 2, 3, 10]
    assert [(a.first_step, a.last_step) for a in run.attempts] == [
        (0, 10),
        (10, 15),
        (15, 22),
        (22, 30),
    ]
    assert [a.went_well for a in run.attempts] == [False, False, True, False]
    assert run.status == "stopped at step 30 of 40, without an error message"
    assert run.seconds == 1 + 3 + 2 + 1
    assert "attempt 2: slow (2 times)" in text
    row = ["2", "2026-01-01 00:02:00", "0:00:03", "2", "10", "15", "ValueError on rank 1: mine"]
    assert row in page.rows


def test_a_failure_is_shown_until_a_later_attempt(tmp_path):
    failure = {"error": "killed by SIGKILL\n  HINT: x", "step": 7, "attempt": 1, "rank": 3}
    failure["log"] = str(tmp_path / "run/logs/attempt-2/rank-3.log")
    folder = make_run(tmp_path / "run", ROWS, failure=failure)
    log(folder, 1, 0, "step 3/40  loss 1")
    log(folder, 2, 0, "restored step 3 from /x", "step 7/40  loss 1")
    run, text, endings, _ = attempts_of(folder)
    assert (run.state, run.status) == ("failed", "failed at step 7 of 40")
    assert endings == ["", failure["error"]]
    assert "HINT: x" in text
    log(folder, 3, 0, "restored step 7 from /x", "finished: 40 steps in 0:01:05")
    log(folder, 3, 0, *[""] * 9, "step 40/40  loss 1")
    run, _, _, _ = attempts_of(folder)
    assert run.state == "finished"
    assert run.attempts[-1].seconds == 65


def test_quarantine_and_skipped_updates(tmp_path):
    rows = [*ROWS, {"step": 5, "train/skipped": 2}]
    folder = make_run(tmp_path / "run", rows)
    for kind in ("checkpoints", "best"):
        (folder / kind / "quarantine/4-20260101T000000").mkdir(parents=True)
    (folder / "checkpoints/quarantine/4-20260101T000000/why.txt").write_text("state/x is missing\n")
    _, text, _ = page_of(folder)
    assert "checkpoints/quarantine/4-20260101T000000: state/x is missing" in text
    assert "best/quarantine/4-20260101T000000: reason unknown" in text
    assert "2 updates were not finite and were skipped" in text


HOLD = """
import sys, time
from etils import epath
from trainer.workdir import lock
lock.acquire(epath.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_that_is_training(tmp_path):
    folder = make_run(tmp_path / "run", ROWS, failure={"error": "before", "attempt": 1})
    log(folder, 1, 0, "step 4/40  loss 1")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        (run,), text, _ = page_of(folder)
    finally:
        holder.kill()
        holder.communicate()
    assert run.status == "running, at step 4 of 40"
    assert ">running</td>" in text


DIES_AT_FIRST = """
import os, signal
import jax
from trainer.losses import squared_error
def loss(outputs, batch):
    if os.environ["PODLIFT_ATTEMPT"] == "1" and jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return squared_error(outputs, batch)
"""


@pytest.mark.slow
def test_a_restart_as_its_logs_describe_it(launch, tmp_path):
    (tmp_path / "mine.py").write_text(DIES_AT_FIRST)
    code, _, err = launch(
        "--config=configs/mlp.py",
        "--processes=2",
        "--fake_devices=1",
        "--max_restarts=1",
        "--config.loss.target=mine:loss",
        f"--workdir={tmp_path}/run",
        environ={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert code == 0, err
    (run,), text, _ = page_of(tmp_path / "run")
    assert run.status == "finished"
    assert run.devices == "2 cpu in 2 processes"
    first, second = run.attempts
    assert (first.processes, first.went_well, first.last_step) == (2, False, None)
    # Rank 0 may have been ended before it could say that it lost rank 1.
    assert not first.ending or first.ending.startswith("rank 1 ended without an error message")
    assert second.ending.startswith("finished: 5 steps in")
    assert "without an error message" in text
