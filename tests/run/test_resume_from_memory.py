"""Resuming from in-memory checkpoints."""

from __future__ import annotations

import errno
import json
import os

import pytest
from conftest import mesh_of
from runs import (
    assert_bitwise_equal,
    digits,
    steps_of,
    without_speed,
)

import trainer
from trainer.checkpoints import in_memory as fast
from trainer.checkpoints.in_memory import InMemoryCheckpoints
from trainer.checkpoints.saver import Saver
from trainer.errors import UserError
from trainer.metrics_writer import metrics_file as rows


class Crash(Exception):
    """What a kill is, as far as files are concerned."""


def with_in_memory_checkpoints(steps, folder, **changes):
    made = digits(steps, **changes)
    made.checkpoint.fast_every_secs = 1e-6
    made.checkpoint.fast_dir = str(folder)
    return made


@pytest.fixture
def crash(tmp_path, monkeypatch):
    """Trains with an in-memory checkpoint after each step, and crashes at a step."""
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(fast, "_BLOCKED_FRACTION", 1e9)
    monkeypatch.setattr(fast, "_WRITING_FRACTION", 1e9)
    save = InMemoryCheckpoints.save

    def save_and_wait(self, *arguments):
        save(self, *arguments)
        self.wait()

    monkeypatch.setattr(InMemoryCheckpoints, "save", save_and_wait)
    monkeypatch.setattr(InMemoryCheckpoints, "remove", lambda self: None)

    def crash_at(step, config, workdir):
        def stop(now, phase):
            if now == step and phase == "wait":
                raise Crash
            return False

        with pytest.raises(Crash):
            trainer.train(config, workdir, mesh_of(2), stop_requested=stop)

    return crash_at


def test_a_last_state_that_is_only_in_memory_is_saved(tmp_path, crash, monkeypatch, capsys):
    config = with_in_memory_checkpoints(10, tmp_path / "memory")
    with monkeypatch.context() as patched:
        patched.setattr(Saver, "save", lambda *arguments: None)
        patched.setattr(Saver, "finish", lambda self: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            trainer.train(config, tmp_path / "run", mesh_of(2))
    assert not (tmp_path / "run/checkpoints").exists()
    trainer.train(config, tmp_path / "run", mesh_of(2))
    assert "restored step 10 from memory" in capsys.readouterr().out
    assert steps_of(tmp_path / "run/checkpoints") == [10]


def test_an_in_memory_checkpoint_of_abandoned_steps_is_not_restored(tmp_path, crash, capsys):
    run, memory = tmp_path / "run", tmp_path / "memory"
    config = with_in_memory_checkpoints(30, memory)
    config.checkpoint.every_steps = 5
    crash(14, config, run)
    without = with_in_memory_checkpoints(30, memory, stop_at_step=12)
    without.checkpoint.fast_every_secs = 0.0
    trainer.train(without, run, mesh_of(2))
    assert "restored step 10 from" in capsys.readouterr().out
    trainer.train(config, run, mesh_of(2))
    assert "restored step 12 from" in capsys.readouterr().out


def test_rows_that_the_disk_refused_are_in_the_in_memory_checkpoint(
    tmp_path, crash, monkeypatch, capsys
):
    whole = trainer.train(digits(20), tmp_path / "whole", mesh_of(2))
    config = with_in_memory_checkpoints(20, tmp_path / "memory")
    with monkeypatch.context() as patched:
        patched.setattr(rows, "os", FullDisk())
        crash(13, config, tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").exists()
    rest = trainer.train(config, tmp_path / "run", mesh_of(2))
    assert "restored step 13 from memory" in capsys.readouterr().out
    assert_bitwise_equal(whole.state, rest.state)
    assert without_speed(tmp_path / "run/metrics.jsonl") == without_speed(
        tmp_path / "whole/metrics.jsonl"
    )


class FullDisk:
    """The module `os`, on a disk that takes nothing."""

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_does_not_take_the_folder_of_another_that_was_faster(tmp_path):
    def stop(step, phase):
        if phase == "compile":
            trainer.train(digits(5), tmp_path / "run", mesh_of(2))
        return False

    with pytest.raises(UserError, match="another job has begun a run"):
        trainer.train(digits(5, seed=7), tmp_path / "run", mesh_of(2), stop_requested=stop)
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 0
