"""What a run does with checkpoints that are damaged, missing or slow to read."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import shutil

import jax
import pytest
from conftest import mesh_of
from disk_faults import tree
from runs import (
    assert_bitwise_equal,
    data_files,
    digits,
    flip_a_bit,
    save_another_state,
    truncate,
)

import trainer
from trainer.checkpoints import arrays
from trainer.errors import CheckpointsUnreadable, StateUnreadable, StorageFailed
from trainer.workdir import patience
from trainer.workdir.patience import Patience


def empty_a_file(step):
    data_files(step)[0].write_bytes(b"")


def remove_a_file(step):
    data_files(step)[0].unlink()


def remove_state(step):
    shutil.rmtree(step / "state")


def remove_manifest(step):
    (step / "manifest.json").unlink()


def damage_metadata(step):
    (step / "state/_METADATA").write_text("{")


def damage_manifest(step):
    path = step / "manifest.json"
    path.write_text(path.read_text().replace('"num_steps": 3', '"num_steps": 4', 1))


def exchange(step):
    """Intact files, but of another step."""
    shutil.rmtree(step)
    shutil.copytree(step.parent / "10", step)


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGE = {
    flip_a_bit: "its checksum differs",
    truncate: " bytes and was written with ",
    empty_a_file: " has 0 bytes and was written with ",
    remove_a_file: " is missing",
    remove_state: " is missing",
    remove_manifest: "it has no manifest.json: its save did not finish",
    damage_metadata: "state/_METADATA has 1 bytes",
    damage_manifest: "its manifest.json is damaged",
    exchange: "its manifest.json belongs to step 10",
    empty: "it is empty",
    save_another_state: "params/Dense_0/kernel is not what was saved",
}


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run of 30 steps stopped at 20, with a checkpoint every 10; and the same, not stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    whole = trainer.train(saving_every_10(), folder / "whole", mesh_of(2))
    trainer.train(saving_every_10(stop_at_step=20), folder / "run", mesh_of(2))
    return folder / "run", jax.device_get(whole.state)


def saving_every_10(**changes):
    made = digits(30, **changes)
    made.checkpoint.every_steps = 10
    return made


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_is_restored(
    tmp_path, capsys, stopped_run, damage
):
    run, whole = stopped_run
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run/checkpoints/20")
    rest = trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    printed = capsys.readouterr()
    told = [line for line in printed.err.splitlines() if "step 20 cannot be restored" in line]
    assert len(told) == 1
    assert DAMAGE[damage] in told[0]
    assert "restored step 10" in printed.out
    (moved,) = (tmp_path / "run/checkpoints/quarantine").iterdir()
    assert moved.name.startswith("20-")
    assert DAMAGE[damage] in (moved / "why.txt").read_text()
    assert_bitwise_equal(whole, rest.state)


def test_a_missing_checkpoint_is_reported(tmp_path, capsys, stopped_run):
    run, whole = stopped_run
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/20")
    rest = trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    assert "checkpoint 20 was saved and is gone; resuming from step 10" in capsys.readouterr().err
    assert_bitwise_equal(whole, rest.state)


@pytest.mark.parametrize("what", ["damaged", "removed", "moved aside"])
def test_without_an_intact_checkpoint_nothing_is_started_or_deleted(tmp_path, stopped_run, what):
    run, _ = stopped_run
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    for step in (10, 20):
        if what == "damaged":
            remove_a_file(checkpoints / str(step))
        elif what == "removed":
            shutil.rmtree(checkpoints / str(step))
        else:
            (checkpoints / "quarantine").mkdir(exist_ok=True)
            (checkpoints / str(step)).rename(checkpoints / f"quarantine/{step}-1")
    before = sorted(path for path in (tmp_path / "run").rglob("*") if ".lock" not in path.name)
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    expected = "none of the 2 checkpoints" if what == "damaged" else "are gone"
    with pytest.raises(CheckpointsUnreadable, match=expected):
        trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    after = sorted(path for path in (tmp_path / "run").rglob("*") if ".lock" not in path.name)
    assert after == before
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics


def test_loading_what_is_damaged_says_so(tmp_path):
    trainer.train(digits(5), tmp_path / "run", mesh_of(2))
    truncate(tmp_path / "run/checkpoints/5")
    with pytest.raises(CheckpointsUnreadable, match="is damaged: state"):
        trainer.load(tmp_path / "run")
    with pytest.raises(CheckpointsUnreadable, match="holds no checkpoint"):
        trainer.load(tmp_path)


def test_a_folder_of_checkpoints_that_is_gone_is_no_fresh_start(tmp_path, stopped_run):
    run, _ = stopped_run
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(CheckpointsUnreadable, match="are gone"):
        trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))


def test_a_slow_disk_costs_no_checkpoint(tmp_path, stopped_run, monkeypatch, capsys):
    run, _ = stopped_run
    shutil.copytree(run, tmp_path / "run")
    read, calls = arrays.read, []

    def read_at_last(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(arrays, "read", read_at_last)
    monkeypatch.setattr(patience, "PATIENCE", Patience(sleep=lambda secs: None))
    trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    assert "restored step 20 from" in capsys.readouterr().out
    assert not (tmp_path / "run/checkpoints/quarantine").exists()
    monkeypatch.setattr(arrays, "read", lambda *arguments: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(StateUnreadable, match=r"step 30 .* cannot be read"):
        trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    assert (tmp_path / "run/checkpoints/30").exists()


@pytest.mark.parametrize("what", ["manifest.json", "_METADATA", "config.json", "env.json"])
def test_a_disk_that_does_not_answer_is_not_damage(
    tmp_path, stopped_run, monkeypatch, capsys, what
):
    """For twelve seconds it costs twelve seconds; for ever, it is no reason to change anything."""
    run, _ = stopped_run
    shutil.copytree(run, tmp_path / "run")
    now, until = [0.0], [12.0]
    real = io.open

    def opened(file, *arguments, **options):
        if str(file).endswith(f"/{what}") and now[0] < until[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return real(file, *arguments, **options)

    def sleep(secs):
        now[0] += secs

    monkeypatch.setattr(patience, "PATIENCE", Patience(clock=lambda: now[0], sleep=sleep))
    for module in (io, builtins):
        monkeypatch.setattr(module, "open", opened)
    trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    printed = capsys.readouterr()
    assert "restored step 20 from" in printed.out
    assert re.search("can be read again, after 1[56] s", printed.out)
    assert printed.err.count("cannot be read: Input/output error; trying again") == 1
    assert not (tmp_path / "run/checkpoints/quarantine").exists()
    before = tree(tmp_path / "run")
    until[0] = 1e9
    with pytest.raises(StorageFailed, match="could not be read for 300 s: Input/output error"):
        trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    until[0] = 0.0
    del before[".lock"]
    after = tree(tmp_path / "run")
    assert {name: after[name] for name in before} == before
