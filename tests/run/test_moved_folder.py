"""A run saves into its own folder only, and resumes from its own states only."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import pytest
from conftest import mesh_of, wide
from disk_faults import tree
from runs import assert_bitwise_equal, digits, steps_of, without_speed

import trainer
from trainer.checkpoints.manifest import Manifest
from trainer.errors import CheckpointsUnreadable, FolderMoved
from trainer.workdir import identity


def config(steps=30, **changes):
    made = digits(steps, **changes)
    made.checkpoint.every_steps = 10
    made.checkpoint.fast_every_secs = 0.0
    made.eval = {"every_steps": 10}
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody has disturbed: its folder, and its last state."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, jax.device_get(trainer.train(config(), folder, mesh_of(2)).state)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another run of the same model, with a checkpoint of step 25."""
    folder = tmp_path_factory.mktemp("other") / "run"
    trainer.train(config(25, seed=7), folder, mesh_of(2))
    return folder


def disturbed(run, step, disturb):
    """Trains; `disturb` is called before a step. Returns what ended the run."""

    def stop(now, phase):
        if now == step and phase == "train":
            disturb()
        return False

    with pytest.raises(FolderMoved) as moved:
        trainer.train(config(), run, mesh_of(2), stop_requested=stop)
    return str(moved.value)


@pytest.mark.parametrize(
    ("step", "checked_at"),
    [
        (13, "every step"),
        (29, "every step"),
        (13, "saves only"),
        wide(19, "every step"),
        wide(19, "saves only"),
        wide(29, "saves only"),
    ],
)
def test_a_renamed_folder_keeps_its_run(
    tmp_path, monkeypatch, capsys, whole, other, step, checked_at
):
    """Before a step in the middle, of a checkpoint and of the end; another run takes the name."""
    monkeypatch.setattr(identity, "_CHECK_SECS", 0.0 if checked_at == "every step" else 1e9)
    run, renamed = tmp_path / "run", tmp_path / "renamed"

    def rename():
        run.rename(renamed)
        shutil.copytree(other, run)

    said = disturbed(run, step, rename)
    saved = step + 1 if checked_at == "every step" else -(-(step + 1) // 10) * 10
    assert said.startswith(f"{run} is now {renamed}, and another folder has its name: ")
    assert f"step {saved} is saved in {renamed}\n" in said
    assert f"HINT: --workdir={renamed} resumes" in said
    assert tree(run) == tree(other)
    assert not list(renamed.glob("*/.saving-*"))
    rest = trainer.train(config(), renamed, mesh_of(2))
    assert f"restored step {saved} from {renamed}" in capsys.readouterr().out or saved == 30
    assert_bitwise_equal(whole[1], rest.state)
    assert steps_of(renamed / "best") == steps_of(whole[0] / "best")
    assert without_speed(renamed / "metrics.jsonl") == without_speed(whole[0] / "metrics.jsonl")


def remove(run):
    while run.exists():
        shutil.rmtree(run, ignore_errors=True)  # a save may be adding files


def empty(run):
    for path in run.iterdir():
        while path.exists():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("harm", "said", "name"),
    [
        (remove, "{run} is gone: ", "run-saved"),
        (empty, "the files in {run} are gone: ", "run"),
    ],
)
def test_a_removed_folder_costs_no_state(tmp_path, monkeypatch, whole, harm, said, name):
    monkeypatch.setattr(identity, "_CHECK_SECS", 0.0)
    run, saved = tmp_path / "run", tmp_path / name
    message = disturbed(run, 13, lambda: harm(run))
    assert message.startswith(said.format(run=run))
    assert f"step 14 is saved in {saved}\n" in message
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_bitwise_equal(whole[1], trainer.train(config(), saved, mesh_of(2)).state)


def test_a_checkpoint_of_another_run_is_not_restored(tmp_path, capsys, whole, other):
    run = tmp_path / "run"
    trainer.train(config(stop_at_step=20), run, mesh_of(2))
    shutil.copytree(other / "checkpoints/25", run / "checkpoints/25")
    shutil.rmtree(run / "best")
    shutil.copytree(other / "best", run / "best")
    with pytest.raises(CheckpointsUnreadable, match="25 cannot be used: another run has saved it"):
        trainer.load(run)
    capsys.readouterr()
    rest = trainer.train(config(), run, mesh_of(2))
    said = capsys.readouterr()
    assert "step 25 cannot be restored from its checkpoint: another run has saved it" in said.err
    assert "cannot be used: another run has saved it" in said.err
    assert f"restored step 20 from {run}" in said.out
    assert_bitwise_equal(whole[1], rest.state)
    (moved,) = (run / "checkpoints/quarantine").iterdir()
    assert moved.name.startswith("25-")


def test_only_checkpoints_of_another_run_are_no_fresh_start(tmp_path, other):
    run = tmp_path / "run"
    trainer.train(config(2), run, mesh_of(2))
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    before = tree(run)
    with pytest.raises(CheckpointsUnreadable, match="another run has saved it"):
        trainer.train(config(), run, mesh_of(2))
    assert tree(run).keys() == before.keys()


def of_an_earlier_version(run):
    for path in run.glob("*/*/manifest.json"):
        listed = Manifest.from_text(path.read_text())
        meta = {key: value for key, value in listed.meta.items() if key != "run_id"}
        path.write_text(dataclasses.replace(listed, meta=meta).to_text())
    environment = json.loads((run / "env.json").read_text())
    del environment["run_id"]
    (run / "env.json").write_text(json.dumps(environment))


def lose_the_environment(run):
    (run / "env.json").unlink()


def branch_off(run):
    shutil.copytree(run, run.with_name("a"))
    shutil.rmtree(run)
    run.with_name("a").rename(run)


@pytest.mark.parametrize(
    "change", [of_an_earlier_version, wide(lose_the_environment), wide(branch_off)]
)
def test_its_own_checkpoints_stay_its_own(tmp_path, whole, change):
    run = tmp_path / "run"
    trainer.train(config(stop_at_step=20), run, mesh_of(2))
    before = json.loads((run / "env.json").read_text())["run_id"]
    change(run)
    rest = trainer.train(config(), run, mesh_of(2))
    assert_bitwise_equal(whole[1], rest.state)
    after = json.loads((run / "env.json").read_text())["run_id"]
    assert (after == before) == (change is not of_an_earlier_version)
    text = (run / "checkpoints/30/manifest.json").read_text()
    assert Manifest.from_text(text).run_id == after
    trainer.load(run)
