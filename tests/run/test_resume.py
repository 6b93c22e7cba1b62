"""Going on from a checkpoint gives the numbers of a run that never stopped."""

from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, wide
from flax import linen as nn
from runs import (
    assert_bitwise_equal,
    digits,
    save_another_state,
    steps_of,
    without_speed,
)

import trainer
from trainer.errors import CheckpointsUnreadable, UserError


@pytest.mark.parametrize("lift", ["pmap", "shard_map", "vmap"])
@pytest.mark.parametrize("steps_per_call", [wide(1), 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, lift, steps_per_call):
    mesh = mesh_of(4)
    changes = {"lift": lift, "steps_per_call": steps_per_call}
    whole = trainer.train(digits(40, **changes), tmp_path / "whole", mesh)
    half = trainer.train(digits(40, stop_at_step=20, **changes), tmp_path / "halves", mesh)
    assert int(half.state.step) == 20
    rest = trainer.train(digits(40, **changes), tmp_path / "halves", mesh)
    assert int(rest.state.step) == 40
    assert_bitwise_equal(whole.state, rest.state)
    assert rest.metrics["eval/loss"] == whole.metrics["eval/loss"]


def test_a_run_resumes_within_an_epoch(tmp_path, capsys):
    """The mean over an epoch and dropout continue."""
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
    """Rows past the restored step are dropped, and so is a half-written row."""
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


def test_only_keys_of_the_length_may_change_on_a_resume(tmp_path):
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


def test_a_step_during_a_save_does_not_change_what_is_saved(tmp_path):
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


def test_a_best_state_past_the_restored_step_is_kept_until_the_run_reaches_it(tmp_path):
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


def test_a_complete_run_keeps_its_config_and_says_how_to_train_further(tmp_path, capsys):
    run = tmp_path / "run"
    longer = digits(None, num_epochs=3)
    trainer.train(longer, run, mesh_of(2))
    before = (run / "config.json").read_text()
    capsys.readouterr()
    trainer.train(digits(None, num_epochs=1), run, mesh_of(2))
    assert (run / "config.json").read_text() == before
    assert "--config.num_epochs=6" in capsys.readouterr().out
