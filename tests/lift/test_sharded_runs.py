"""Runs with a sharded state: checkpoints, resumes, evaluation, and what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest
from conftest import mesh_of, wide
from runs import flip_a_bit, save_another_state, truncate

import trainer
from trainer.state.leaves import name_leaves

SHARDED = ["zero1", "fsdp"]

CONFIG = {
    "num_steps": 6,
    "global_batch_size": 16,
    "log_every_steps": 2,
    "lift": "shard_map",
    "model": {"target": "trainer.models.mlp:MLP", "hidden_size": 64, "out_size": 10},
    "loss": {"target": "trainer.losses:softmax_cross_entropy"},
    "optimizer": {"target": "optax:sgd", "learning_rate": 0.1, "momentum": 0.9},
    "data": {"target": "trainer.data.digits:load"},
    "eval": {"every_steps": 3},
}


@pytest.mark.wide
def test_a_resume_may_change_the_sharding(tmp_path):
    straight = trainer.train(CONFIG, tmp_path / "straight")
    kinds = ["fsdp", "replicated", "zero1", "fsdp", "zero1", "replicated"]
    for step, kind in enumerate(kinds, 1):
        config = CONFIG | {"state_sharding": kind, "stop_at_step": step}
        if kind == "replicated":
            config["lift"] = "pmap"
        changed = trainer.train(config, tmp_path / "changed")
    names = name_leaves(straight.state)
    assert_close(leaves_of(changed.state), leaves_of(straight.state))
    assert names.keys() == name_leaves(changed.state).keys()
    assert changed.metrics["eval/loss"] == pytest.approx(straight.metrics["eval/loss"], abs=1e-5)


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


def leaves_of(state):
    return {name: np.asarray(leaf) for name, leaf in name_leaves(state).items()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, save_another_state])
def test_a_damaged_checkpoint_of_a_sharded_state_gives_way_to_the_one_before(
    tmp_path, capsys, damage
):
    config = CONFIG | {"state_sharding": "fsdp", "checkpoint": {"every_steps": 2}}
    straight = trainer.train(config, tmp_path / "straight")
    trainer.train(config | {"stop_at_step": 4}, tmp_path / "run")
    damage(tmp_path / "run/checkpoints/4")
    capsys.readouterr()
    rest = trainer.train(config, tmp_path / "run")
    out, err = capsys.readouterr()
    assert "warning: step 4 cannot be restored from its checkpoint" in err
    assert "restored step 2 from " in out
    assert list((tmp_path / "run/checkpoints/quarantine").glob("4-*"))
    assert_close(leaves_of(rest.state), leaves_of(straight.state), atol=0)


@pytest.mark.parametrize(("there", "here"), [wide("fsdp", "replicated"), ("replicated", "fsdp")])
def test_a_run_is_initialised_from_one_with_another_sharding(tmp_path, there, here):
    first = trainer.train(CONFIG | {"state_sharding": there}, tmp_path / "first")
    begun = {"init_from": str(tmp_path / "first"), "num_steps": 2}
    fresh = [
        trainer.train(CONFIG | begun | {"state_sharding": kind}, tmp_path / kind)
        for kind in (here, there)
    ]
    found, expected = (leaves_of(result.state) for result in fresh)
    assert_close(found, expected)
    started = leaves_of(first.state)["params/Dense_0/kernel"]
    assert np.abs(found["params/Dense_0/kernel"] - started).max() < 0.1  # of two steps


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3])
def test_what_was_trained_sharded_is_evaluated_on_any_devices(launch, tmp_path, devices):
    config = CONFIG | {"state_sharding": "fsdp", "ema_decay": 0.9}
    trained = trainer.train(config, tmp_path / "run")
    where = f"--workdir={tmp_path}/run", f"--fake_devices={devices}"
    code, out, err = launch("eval", *where, f"--json={tmp_path}/found.json")
    assert code == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert found["eval/loss"] == pytest.approx(trained.metrics["eval/loss"], abs=1e-6)
    code, out, err = launch("predict", *where, f"--out={tmp_path}/outputs.npz")
    assert code == 0, out + err
    with np.load(tmp_path / "outputs.npz") as outputs:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs["outputs"], outputs["y"])
    assert float(losses.mean()) == pytest.approx(trained.metrics["eval/loss"], abs=1e-5)


@pytest.mark.slow
def test_a_warning_says_that_no_leaf_can_be_sharded(tmp_path, capsys):
    config = CONFIG | {"state_sharding": "fsdp", "global_batch_size": 14, "num_steps": 1}
    for devices, told in ((7, 1), (2, 0)):
        trainer.train(config, tmp_path / str(devices), mesh_of(devices))
        assert capsys.readouterr().err.count("shards nothing") == told


def test_a_lift_that_cannot_shard_names_the_one_that_can():
    with pytest.raises(trainer.UserError, match="needs the lift shard_map") as error:
        trainer.train(CONFIG | {"lift": "pmap", "state_sharding": "zero1"}, "unused")
    assert "--config.lift=shard_map" in str(error.value.hint)


def averaging(learning_rate):
    """SGD that takes the mean of the gradients once more."""

    def update(updates, state, params=None):
        return jax.lax.pmean(updates, "batch"), state

    again = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    return optax.chain(again, optax.sgd(learning_rate))


def mistaken(learning_rate):
    return optax.GradientTransformation(lambda _: optax.EmptyState(), lambda *_: learningrate)  # noqa: F821


def test_an_optimizer_that_uses_the_axis_needs_a_replicated_state(tmp_path):
    def config(target, kind):
        optimizer = {"target": f"{__name__}:{target}", "learning_rate": 0.1}
        return CONFIG | {"optimizer": optimizer, "state_sharding": kind, "num_steps": 1}

    for kind in SHARDED:
        with pytest.raises(trainer.UserError, match="uses the axis 'batch' itself") as error:
            trainer.train(config("averaging", kind), tmp_path / "run")
        assert "--config.state_sharding=replicated" in error.value.hint
        assert not (tmp_path / "run").exists()
        with pytest.raises(NameError, match="learningrate"):
            trainer.train(config("mistaken", kind), tmp_path / "run")
    trainer.train(config("averaging", "replicated"), tmp_path / "run")
