"""Devices that differ in their state are found, and leave nothing to resume from."""

from __future__ import annotations

import json
import time

import pytest
from conftest import mesh_of
from runs import (
    digits,
)

import trainer
from trainer.errors import ReplicasDiffer
from trainer.lift.replicas import check_replicas


def test_devices_that_differ_leave_no_in_memory_checkpoint(tmp_path, capsys):
    memory = tmp_path / "memory"
    memory.mkdir()
    config = digits(40, model={"target": "test_resume:Drifting"}, replica_check_every_steps=20)
    config.checkpoint = {"every_steps": 8, "fast_dir": str(memory), "fast_every_secs": 1e-6}
    copied = set()

    def watch(step, phase):
        for found in memory.rglob("manifest.json"):
            copied.add(json.loads(found.read_text())["body"]["step"])
        time.sleep(0.05 * (step > 8))
        return False

    with pytest.raises(ReplicasDiffer, match="model_state/state/place"):
        trainer.train(config, tmp_path / "run", mesh_of(2), stop_requested=watch)
    assert max(copied) > 8
    assert list(memory.rglob("manifest.json")) == []
    with pytest.raises(ReplicasDiffer):
        trainer.train(config, tmp_path / "run", mesh_of(2))
    assert "restored step 8 from" in capsys.readouterr().out


def test_devices_that_differ_from_the_first_step_on_leave_nothing(tmp_path):
    config = digits(40, model={"target": "test_resume:Drifting", "agreeing": 0})
    with pytest.raises(ReplicasDiffer):
        trainer.train(config, tmp_path / "run", mesh_of(2))
    assert not (tmp_path / "run").exists()


def test_replicas_are_compared_after_the_first_step_every_n_steps_and_before_saves(
    tmp_path, monkeypatch
):
    seen = []

    def recorded(lift, state):
        seen.append(int(lift.read(state.step)))
        return check_replicas(lift, state)

    for user in ("trainer.run.loop", "trainer.run.actions", "trainer.checkpoints.saver"):
        monkeypatch.setattr(f"{user}.check_replicas", recorded)
    config = digits(10, replica_check_every_steps=3)
    config.checkpoint.every_steps = 5
    trainer.train(config, tmp_path / "run", mesh_of(2))
    assert sorted(set(seen)) == [1, 3, 5, 6, 9, 10]
