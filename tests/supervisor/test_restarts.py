"""Which failed attempts are worth another one."""

from __future__ import annotations

import pytest

from launcher.exit_codes import RETRY
from launcher.processes.failure import Failure
from launcher.supervisor.restarts import backoff_secs, why_no_restart
from launcher.supervisor.result import AttemptResult


def failed(code, step=5, **values):
    return AttemptResult(code, failure=Failure(0, code, "", step=step), **values)


RESULTS = [
    ("done", AttemptResult(0), None, None),
    ("usage", failed(2), None, None),
    ("raised", failed(1), None, "again"),
    ("raised twice at a step", failed(1), failed(1), None),
    ("raised at another step", failed(1), failed(1, step=4), "again"),
    ("killed", failed(42), None, "again"),
    ("killed twice at a step", failed(42), failed(42), "again"),
    ("asked to stop, and saved", AttemptResult(42, asked_to_stop=True), None, None),
    ("one rank was asked to stop", AttemptResult(42), None, None),
    ("asked to stop, and failed", failed(1, asked_to_stop=True), None, None),
    ("its folder was renamed", failed(1, is_moved=True), None, None),
    ("Ctrl-C twice", AttemptResult(130, asked_to_stop=True), None, None),
]


@pytest.mark.parametrize(
    ("what", "result", "before", "then"), RESULTS, ids=[result[0] for result in RESULTS]
)
def test_which_attempts_are_restarted(what, result, before, then):
    previous = before.failure if before else None
    assert (why_no_restart(result, previous, 0, 3) is None) == (then == "again")
    if then == "again":
        assert "no restart left" in why_no_restart(result, previous, 3, 3)
        assert why_no_restart(result, previous, 0, 0) == ""


def test_a_run_without_its_folder_would_start_from_scratch():
    result = failed(42, is_moved=True)
    assert "not where it was" in why_no_restart(result, None, 0, 3)


def test_restarts_wait_longer_each_time():
    at_start = Failure(1, RETRY, "killed", step=0)
    assert [backoff_secs(n, at_start) for n in (0, 1, 2, 9)] == [1, 2, 4, 60]
    later = Failure(1, RETRY, "killed", step=7)
    assert [backoff_secs(n, later) for n in (0, 1, 2, 9)] == [0, 2, 4, 60]
