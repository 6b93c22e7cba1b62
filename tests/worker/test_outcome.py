"""What becomes of an exception in a worker."""

from __future__ import annotations

import pytest

from launcher import exit_codes
from launcher.processes.assignment import Outcome
from launcher.worker import run as worker
from launcher.worker.run import _outcome_of
from trainer.errors import FolderMoved, StorageFailed
from trainer.workdir.workdir import Workdir


def test_a_network_error_is_a_lost_peer_only_where_jax_raised_it_and_there_are_peers():
    def outcome(error, has_peers):
        def train():
            raise error

        return _outcome_of(train, 0, has_peers=has_peers)

    gloo = RuntimeError("Gloo all-reduce failed: Connection reset by peer")
    assert outcome(gloo, True).lost_peer
    assert not outcome(gloo, False).lost_peer
    of_the_data = outcome(ConnectionResetError(104, "Connection reset by peer"), True)
    assert not of_the_data.lost_peer
    assert "ConnectionResetError" in of_the_data.trace


@pytest.mark.parametrize(
    ("error", "code"), [(StorageFailed("no answer"), exit_codes.RETRY), (FolderMoved("gone"), 1)]
)
def test_files_that_are_out_of_reach_are_a_failure(error, code):
    def train():
        raise error

    outcome = Outcome.from_line(_outcome_of(train, 0).to_line())
    assert (outcome.exit_code, outcome.message, outcome.trace) == (code, str(error), "")
    assert outcome.is_failure


def test_a_run_that_is_gone_before_its_worker_starts_is_not_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(Workdir, "is_recorded", lambda self, patience: False)  # now, not after 10 s
    with pytest.raises(FolderMoved, match="held a run when this job began"):
        worker._train({}, f"{tmp_path}/run", None, None, None, resumes=True, smoke=False)
    assert not (tmp_path / "run").exists()
