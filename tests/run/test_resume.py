"""Going on from a checkpoint gives the numbers of a run that never stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, wide
from flax import linen as nn
from runs import (
    assert_bitwise_equal,
    data_files,
    digits,
    flip_a_bit,
    save_another_state,
    steps_of,
    truncate,
    wait_for,
    without_speed,
)

import trainer
from trainer.checkpoints import arrays
from trainer.checkpoints import in_memory as fast
from trainer.checkpoints.in_memory import InMemoryCheckpoints
from trainer.checkpoints.saver import Saver
from trainer.errors import CheckpointsUnreadable, ReplicasDiffer, StateUnreadable, UserError
from trainer.lift.replicas import check_replicas
from trainer.metrics_writer import metrics_file as rows


@pytest.mark.parametrize("lift", ["pmap", "shard_map", "vmap"])
@pytest.mark.parametrize("steps_per_call", [wide(1), 4])
def test_two_halves_are_the_whole_bit_for_bit(tmp_path, lift, steps_per_call):
    mesh = mesh_of(4)
    changes = {"lift": lift, "steps_per_call": steps_per_call}
    whole = trainer.train(digits(40, **changes), tmp_path / "whole", mesh)
    half = trainer.train(digits(40, stop_at_step=20, **changes), tmp_path / "halves", mesh)
    assert int(half.state.step) == 20
    rest = trainer.train(digits(40, **changes), tmp_path / "halves", mesh)
    assert int(rest.state.step) == 40
    assert_bitwise_equal(whole.state, rest.state)
    assert rest.metrics["eval/loss"] == whole.metrics["eval/loss"]


def test_the_middle_of_an_epoch_is_no_exception(tmp_path, capsys):
    """The mean over an epoch, and dropout, go on where they were."""
    model = {
        "target": "trainer.models.mlp:PlainMLP",
        "hidden_sizes": (16,),
        "out_size": 10,
        "dropout": 0.3,
    }
    base = {"num_epochs": 2, "model": model}
    whole = trainer.train(digits(None, **base), tmp_path / "whole", mesh_of(2))
    straight = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line[:14]]
    trainer.train(digits(None, stop_at_step=15, **base), tmp_path / "halves", mesh_of(2))
    halves = trainer.train(digits(None, **base), tmp_path / "halves", mesh_of(2))
    resumed = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line[:14]]
    assert straight == resumed
    assert len(straight) == 2
    assert_bitwise_equal(whole.state, halves.state)


def test_a_prefetching_thread_changes_no_number(tmp_path):
    without = trainer.train(digits(30), tmp_path / "without", mesh_of(2))
    config = digits(30)
    config.data.prefetch = 2
    assert_bitwise_equal(without.state, trainer.train(config, tmp_path / "with", mesh_of(2)).state)


def test_saved_on_eight_devices_resumed_on_two(tmp_path):
    # Not Adam: it turns the rounding noise in the gradient of a bias in front of BatchNorm, whose
    # true gradient is zero, into steps of full size.
    sgd = {"target": "optax:sgd", "learning_rate": 0.05, "momentum": 0.9}
    trainer.train(digits(40, stop_at_step=20, optimizer=sgd), tmp_path / "run", mesh_of(8))
    shutil.copytree(tmp_path / "run", tmp_path / "two")
    eight = trainer.train(digits(40, optimizer=sgd), tmp_path / "run", mesh_of(8)).state
    two = trainer.train(digits(40, optimizer=sgd), tmp_path / "two", mesh_of(2)).state
    for a, b in zip(jax.tree.leaves(eight.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-5)


def test_a_crash_after_a_save_loses_only_what_came_after(tmp_path):
    """Rows past the restored step are cut, and a half-written row is dropped."""
    whole = trainer.train(digits(30), tmp_path / "whole", mesh_of(2))
    config = digits(30, stop_at_step=20)
    trainer.train(config, tmp_path / "run", mesh_of(2))
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "train/loss": 1.0}\n{"step": 30, "train/lo')
    rest = trainer.train(digits(30), tmp_path / "run", mesh_of(2))
    assert_bitwise_equal(whole.state, rest.state)
    rows, expected = (without_speed(tmp_path / d / "metrics.jsonl") for d in ("run", "whole"))
    rows = [row for row in rows if not (row["step"] == 20 and "eval/loss" in row)]
    assert rows == expected


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
    """Files that are whole, but of another step."""
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
    """A run of 30 steps that stopped at 20, with a checkpoint every 10; and the whole of it."""
    folder = tmp_path_factory.mktemp("stopped")
    whole = trainer.train(saving_every_10(), folder / "whole", mesh_of(2))
    trainer.train(saving_every_10(stop_at_step=20), folder / "run", mesh_of(2))
    return folder / "run", jax.device_get(whole.state)


def saving_every_10(**changes):
    made = digits(30, **changes)
    made.checkpoint.every_steps = 10
    return made


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_and_moved_and_the_one_before_is_used(
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


def test_a_checkpoint_that_is_gone_is_told_of(tmp_path, capsys, stopped_run):
    run, whole = stopped_run
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/20")
    rest = trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    assert "checkpoint 20 was saved and is gone; resuming from step 10" in capsys.readouterr().err
    assert_bitwise_equal(whole, rest.state)


@pytest.mark.parametrize("what", ["damaged", "removed", "moved aside"])
def test_if_none_is_whole_nothing_is_started_afresh_or_deleted(tmp_path, stopped_run, what):
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


def test_keys_of_how_long_may_change_and_others_may_not(tmp_path):
    run = tmp_path / "run"
    trainer.train(digits(10), run, mesh_of(2))
    longer = digits(12, num_epochs=9)
    longer.log_every_steps = 3
    longer.checkpoint.keep = 1
    longer.lift = "shard_map"
    assert int(trainer.train(longer, run, mesh_of(2)).state.step) == 12
    for key, value in (("seed", 1), ("global_batch_size", 32)):
        with pytest.raises(UserError, match=f"  {key}: "):
            trainer.train(digits(20, **{key: value}), run, mesh_of(2))


def test_the_latest_and_the_best_are_kept_apart(tmp_path):
    config = digits(40)
    config.eval = {"every_steps": 10}
    config.checkpoint = {
        "every_steps": 5,
        "keep": 2,
        "best_metric": "eval/accuracy",
        "best_mode": "max",
    }
    trainer.train(config, tmp_path / "run", mesh_of(2))
    rows = [row for row in without_speed(tmp_path / "run/metrics.jsonl") if "eval/accuracy" in row]
    best = max(rows, key=lambda row: row["eval/accuracy"])["step"]
    assert steps_of(tmp_path / "run/checkpoints") == [35, 40]
    assert steps_of(tmp_path / "run/best") == [best]


def test_training_on_while_a_save_is_under_way_does_not_touch_it(tmp_path):
    """Donated buffers are reused by the next steps; what is saved must be a copy."""

    def config(**changes):
        made = digits(60, **changes)
        made.checkpoint.every_steps = 1
        made.checkpoint.keep = 60
        made.model.hidden_size = 512
        return made

    trainer.train(config(stop_at_step=12), tmp_path / "run", mesh_of(8))
    for step in range(1, 13):
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "run", run)
        for later in range(step + 1, 13):
            shutil.rmtree(run / "checkpoints" / str(later))
        # Restoring compares the checksums of what was on the devices with what is in the file.
        assert int(trainer.train(config(stop_at_step=step), run, mesh_of(8)).state.step) == step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_goes_on(start, launch, tmp_path, number):
    arguments = [
        "--config=configs/digits.py",
        "--fake_devices=2",
        "--config.log_every_steps=20",
        "--config.checkpoint.every_steps=100000",
        "--config.num_steps=3000",
    ]
    process = start(*arguments, f"--workdir={tmp_path}/run")
    wait_for(tmp_path / "run/metrics.jsonl")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 42, out + err
    saved = steps_of(tmp_path / "run/checkpoints")
    assert f"asked to stop: saved at step {saved[0]}" in err
    stop = f"--config.stop_at_step={saved[0] + 50}"
    code, out, _ = launch(*arguments, stop, f"--workdir={tmp_path}/run")
    assert code == 0
    assert f"restored step {saved[0]}" in out
    assert launch(*arguments, stop, f"--workdir={tmp_path}/whole")[0] == 0
    last = [without_speed(tmp_path / d / "metrics.jsonl")[-1] for d in ("run", "whole")]
    assert last[0]["step"] == saved[0] + 50
    assert last[0]["eval/loss"] == last[1]["eval/loss"]


def test_ctrl_c_saves_also_where_it_has_ended_who_reads_the_log(start, tmp_path):
    process = start("--config=configs/digits.py", "--fake_devices=2", "--config.num_steps=100000",
                    "--config.log_every_steps=20", f"--workdir={tmp_path}/run")  # fmt: skip
    wait_for(tmp_path / "run/metrics.jsonl")
    time.sleep(0.5)  # past the first row: what writes it may forgive an error
    process.stderr.close()  # as of `2>&1 | tee log`
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 42
    process.stdout.close()
    assert steps_of(tmp_path / "run/checkpoints")


class Drifting(nn.Module):
    """After so many steps the devices no longer agree about its state."""

    agreeing: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        steps = self.variable("state", "steps", lambda: jnp.zeros((), jnp.int32))
        place = self.variable("state", "place", lambda: jnp.zeros((), jnp.int32))
        if train:
            steps.value += 1
            place.value = jnp.where(steps.value > self.agreeing, jax.lax.axis_index("batch"), 0)
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_devices_that_differ_leave_no_copy_in_memory_to_go_on_from(tmp_path, capsys):
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


def test_asked_to_stop_before_the_first_step(tmp_path):
    with pytest.raises(trainer.Preempted) as stopped:
        trainer.train(
            digits(10), tmp_path / "run", mesh_of(2), stop_requested=lambda step, phase: True
        )
    assert stopped.value.step == 0
    whole = trainer.train(digits(10), tmp_path / "whole", mesh_of(2))
    assert_bitwise_equal(trainer.train(digits(10), tmp_path / "run", mesh_of(2)).state, whole.state)


class Asked:
    """Says yes from its n-th question on."""

    def __init__(self, questions):
        self.left = questions

    def __call__(self, step, phase):
        self.left -= phase not in ("start", "wait", "save")
        return self.left < 0


@pytest.mark.parametrize("questions", [3, wide(12), 16, wide(25), wide(33), wide(38), 44])
def test_asked_to_stop_at_any_moment_nothing_is_lost(tmp_path, questions):
    """Between steps, in the middle of a row, of an evaluation, and of the last evaluation."""

    def config():
        made = digits(33)
        made.eval = {"every_steps": 11, "batch_size": 90}  # four questions an evaluation
        made.log_every_steps = 7
        return made

    whole = trainer.train(config(), tmp_path / "whole", mesh_of(2))
    with pytest.raises(trainer.Preempted):
        trainer.train(config(), tmp_path / "run", mesh_of(2), stop_requested=Asked(questions))
    rest = trainer.train(config(), tmp_path / "run", mesh_of(2))
    assert_bitwise_equal(whole.state, rest.state)
    rows, expected = (without_speed(tmp_path / d / "metrics.jsonl") for d in ("run", "whole"))
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    again = trainer.train(config(), tmp_path / "run", mesh_of(2))
    assert again.metrics["eval/loss"] == whole.metrics["eval/loss"]
    assert without_speed(tmp_path / "run/metrics.jsonl") == rows
    best = [steps_of(tmp_path / d / "best") for d in ("run", "whole")]
    assert best[0] == best[1]


def test_a_state_can_be_loaded_without_a_trainer(tmp_path, monkeypatch):
    state = trainer.train(digits(10), tmp_path / "run", mesh_of(4)).state
    monkeypatch.chdir(tmp_path)
    loaded = trainer.load("run")
    assert_bitwise_equal(loaded["params"], state.params)
    assert int(loaded["step"]) == 10
    assert_bitwise_equal(trainer.load("run", best=True)["params"], state.params)
    save_another_state(tmp_path / "run/checkpoints/10")
    with pytest.raises(CheckpointsUnreadable, match="is not what was saved"):
        trainer.load("run")


def test_a_best_state_past_the_restored_step_stays_until_the_run_comes_to_it_again(tmp_path):
    def config(**changes):
        made = digits(20, **changes)
        made.eval = {"every_steps": 10}
        made.checkpoint.every_steps = 10
        return made

    whole = trainer.train(config(), tmp_path / "run", mesh_of(2))
    shutil.rmtree(tmp_path / "run/checkpoints/20")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    trainer.train(config(), tmp_path / "run", mesh_of(2))
    assert steps_of(tmp_path / "run/best") == [20]
    assert not (tmp_path / "run/best/quarantine").exists()
    assert_bitwise_equal(trainer.load(tmp_path / "run", best=True)["params"], whole.state.params)
    # With another config the run does not come to it: it is of a future that is abandoned.
    changed = config(stop_at_step=12)
    changed.optimizer.learning_rate = 1e-4
    changed.checkpoint.allow = "optimizer"
    trainer.train(changed, tmp_path / "other", mesh_of(2))
    assert [p.name[:3] for p in (tmp_path / "other/best/quarantine").iterdir()] == ["20-"]


def test_the_callers_config_is_not_touched(tmp_path):
    config = digits(5)
    before = config.to_json_best_effort()
    trainer.train(config, tmp_path / "run", mesh_of(2))
    assert config.to_json_best_effort() == before
    config.data.mine = 1  # not locked either


def test_a_run_with_nothing_to_do_leaves_its_config_and_says_how_to_go_on(tmp_path, capsys):
    run = tmp_path / "run"
    longer = digits(None, num_epochs=3)
    trainer.train(longer, run, mesh_of(2))
    before = (run / "config.json").read_text()
    capsys.readouterr()
    trainer.train(digits(None, num_epochs=1), run, mesh_of(2))
    assert (run / "config.json").read_text() == before
    assert "--config.num_epochs=6" in capsys.readouterr().out


def test_loading_what_is_damaged_says_so(tmp_path):
    trainer.train(digits(5), tmp_path / "run", mesh_of(2))
    truncate(tmp_path / "run/checkpoints/5")
    with pytest.raises(CheckpointsUnreadable, match="is damaged: state"):
        trainer.load(tmp_path / "run")
    with pytest.raises(CheckpointsUnreadable, match="holds no checkpoint"):
        trainer.load(tmp_path)


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


def test_a_folder_of_checkpoints_that_is_gone_is_no_fresh_start(tmp_path, stopped_run):
    run, _ = stopped_run
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(CheckpointsUnreadable, match="are gone"):
        trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))


class Crash(Exception):
    """What a kill is, as far as files are concerned."""


def with_copies(steps, folder, **changes):
    made = digits(steps, **changes)
    made.checkpoint.fast_every_secs = 1e-6
    made.checkpoint.fast_dir = str(folder)
    return made


@pytest.fixture
def crash(tmp_path, monkeypatch):
    """Trains with a copy in memory after each step, until a step is asked for that is too late."""
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
    config = with_copies(10, tmp_path / "memory")
    with monkeypatch.context() as patched:
        patched.setattr(Saver, "save", lambda *arguments: None)
        patched.setattr(Saver, "finish", lambda self: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            trainer.train(config, tmp_path / "run", mesh_of(2))
    assert not (tmp_path / "run/checkpoints").exists()
    trainer.train(config, tmp_path / "run", mesh_of(2))
    assert "restored step 10 from memory" in capsys.readouterr().out
    assert steps_of(tmp_path / "run/checkpoints") == [10]


def test_a_copy_of_an_abandoned_future_is_not_taken(tmp_path, crash, capsys):
    run, memory = tmp_path / "run", tmp_path / "memory"
    config = with_copies(30, memory)
    config.checkpoint.every_steps = 5
    crash(14, config, run)
    without = with_copies(30, memory, stop_at_step=12)
    without.checkpoint.fast_every_secs = 0.0
    trainer.train(without, run, mesh_of(2))
    assert "restored step 10 from" in capsys.readouterr().out
    trainer.train(config, run, mesh_of(2))
    assert "restored step 12 from" in capsys.readouterr().out


def test_rows_that_the_disk_did_not_take_are_in_the_copy(tmp_path, crash, monkeypatch, capsys):
    whole = trainer.train(digits(20), tmp_path / "whole", mesh_of(2))
    config = with_copies(20, tmp_path / "memory")
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


def test_a_run_that_another_has_overtaken_does_not_take_its_folder(tmp_path):
    def stop(step, phase):
        if phase == "compile":
            trainer.train(digits(5), tmp_path / "run", mesh_of(2))
        return False

    with pytest.raises(UserError, match="another job has begun a run"):
        trainer.train(digits(5, seed=7), tmp_path / "run", mesh_of(2), stop_requested=stop)
    assert json.loads((tmp_path / "run/config.json").read_text())["seed"] == 0


def test_a_disk_that_does_not_answer_at_once_costs_no_checkpoint(
    tmp_path, stopped_run, monkeypatch, capsys
):
    run, _ = stopped_run
    shutil.copytree(run, tmp_path / "run")
    read, calls = arrays.read, []

    def read_at_last(*arguments):
        calls.append(arguments)
        if len(calls) < 3:
            raise OSError(errno.EIO, "Input/output error")
        return read(*arguments)

    monkeypatch.setattr(arrays, "read", read_at_last)
    monkeypatch.setattr("trainer.checkpoints.restorer._PAUSES", (0.0, 0.0))
    trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    assert "restored step 20 from" in capsys.readouterr().out
    assert not (tmp_path / "run/checkpoints/quarantine").exists()
    monkeypatch.setattr(arrays, "read", lambda *arguments: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(StateUnreadable, match=r"step 30 .* cannot be read"):
        trainer.train(saving_every_10(), tmp_path / "run", mesh_of(2))
    assert (tmp_path / "run/checkpoints/30").exists()
