"""What becomes of an exception in a worker: it is the failure, and never a signal of podlift."""

from __future__ import annotations

import functools

import jax
import pytest
import user_code
from conftest import ROOT, mesh_of, wide
from user_code import ERRORS

import trainer
from launcher import exit_codes
from launcher.processes.assignment import Outcome
from launcher.worker import run as worker
from launcher.worker.run import _outcome_of
from trainer.data.prefetch import prefetch
from trainer.errors import FolderMoved, StorageFailed
from trainer.metrics_writer.goodput import Goodput
from trainer.workdir.workdir import Workdir


def outcome_of(error, has_peers=True):
    def train():
        raise error

    return _outcome_of(train, 0, has_peers=has_peers)


def test_a_network_error_is_a_lost_peer_only_where_jax_raised_it_and_there_are_peers():
    gloo = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection reset by peer")
    assert outcome_of(gloo).lost_peer
    assert not outcome_of(gloo, has_peers=False).lost_peer
    of_the_data = outcome_of(ConnectionResetError(104, "Connection reset by peer"))
    assert not of_the_data.lost_peer
    assert "ConnectionResetError" in of_the_data.trace


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", ERRORS)
def test_any_exception_of_user_code_is_the_failure(kind, depth, monkeypatch):
    """Through everything that is between the user's code and the loop."""
    monkeypatch.setattr(user_code, "fault", {"error": kind, "place": "load", "rank": 0})

    def make(key):
        if key == 2:
            user_code.check("load")
        return key

    def train():
        for _ in Goodput(lambda: 0.0).waiting(prefetch(make, range(5), depth)):
            pass

    found = _outcome_of(train, 3, lambda: 2, has_peers=True)
    name = type(ERRORS[kind]()).__name__
    assert found.exit_code == 1
    assert not found.lost_peer
    first, _, rest = found.message.partition("\n")
    assert first.startswith(f"{name} on rank 3: ")
    told = first.removeprefix(f"{name} on rank 3: ")
    if kind in ("stop", "stop-async", "generator-exit", "interrupt", "assertion", "empty", "queue"):
        assert told.startswith("at ")
        assert told.endswith('in check: raise ERRORS[fault["error"]]()')
    assert told
    assert (rest == "the second line") == (kind == "lines")
    assert "user_code.py" in found.trace


def test_an_error_of_the_launcher_itself_is_never_bare():
    from launcher.supervisor.failures import launcher_raised

    try:
        raise AssertionError
    except AssertionError as error:
        told = launcher_raised(1, error).message
    assert told.startswith("AssertionError in the launcher of rank 1: at tests/worker/test_outcome")
    assert told.endswith(": raise AssertionError")


PLACES = [
    *("load", "source", "eval", "augment"),
    *(wide(place) for place in ("model", "loss", "metric", "schedule")),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["stop", wide("exit-0")])
def test_a_run_whose_code_raises_fails_wherever_that_is(tmp_path, place, kind, monkeypatch):
    fault = {"error": kind, "place": place, "batch": 4, "rank": 0}
    monkeypatch.setattr(user_code, "fault", fault)
    train = functools.partial(trainer.train, user_code.config_of(), tmp_path / "run", mesh_of(1))
    found = _outcome_of(train, 0)
    assert found.exit_code == 1, found.message
    name = type(ERRORS[kind]()).__name__
    assert found.message.startswith(f"{name} on rank 0: "), found.message
    assert "user_code.py" in found.trace


@pytest.mark.parametrize("kind", ["exit-0", "stop", "unprintable", "empty"])
def test_a_config_that_raises_is_refused(kind):
    from launcher.command_line.config_file import load_config
    from trainer.errors import UserError

    with pytest.raises(UserError) as error:
        load_config(f"{ROOT}/tests/user_code.py:{kind}")
    line = "sys.exit(0)" if kind == "exit-0" else "raise ERRORS[argument]()"
    lines = (ROOT / "tests/user_code.py").read_text().splitlines()
    (number,) = [i for i, text in enumerate(lines, 1) if text.strip() == line]
    assert f"(line {number})" in error.value.message


@pytest.mark.parametrize("kind", ["exit-0", "stop", wide("assertion")])
def test_a_command_on_a_finished_run_fails_with_the_users_line(tmp_path, kind, monkeypatch, capsys):
    from launcher.cli import evaluate, export, predict

    monkeypatch.setattr(user_code, "fault", {"place": "", "batch": 0})
    config = {**user_code.config_of(), "num_steps": 1}
    trainer.train(config, tmp_path / "run", mesh_of(1))
    capsys.readouterr()
    commands = {
        "eval": (evaluate, []),
        "source": (predict, ["--split=train", f"--out={tmp_path}/out.npz"]),
        "model": (export, [f"--out={tmp_path}/model", "--platforms=cpu"]),
    }
    for place, (command, arguments) in commands.items():
        fault = {"error": kind, "place": place, "batch": 0, "rank": 0}
        monkeypatch.setattr(user_code, "fault", fault)
        code = command.main([f"--workdir={tmp_path}/run", "--trust", *arguments])
        told = capsys.readouterr().err
        assert code == 1, (place, told)
        assert type(ERRORS[kind]()).__name__ in told, (place, told)
        assert "user_code.py" in told, (place, told)


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
