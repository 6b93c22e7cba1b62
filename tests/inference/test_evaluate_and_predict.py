"""`trainer.evaluate` and `trainer.predict`: the numbers of training and of the commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import mesh_of
from runs import digits

import trainer

EXAMPLES = 360  # held out of the digits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twenty steps, saved and evaluated at 10 and 20; the "best" loss is the highest, at 10."""
    config = digits(20)
    config.eval = {"every_steps": 10}
    config.checkpoint.every_steps = 10
    config.checkpoint.best_metric, config.checkpoint.best_mode = "eval/loss", "max"
    workdir = tmp_path_factory.mktemp("inference") / "run"
    trainer.train(config, workdir, mesh_of(4))
    before = sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*"))
    yield workdir
    assert sorted((p, p.stat().st_mtime_ns) for p in workdir.rglob("*")) == before


def changed(run, **changes):
    """The config of the run, with changes."""
    config = digits(20)
    config.checkpoint.best_metric = "eval/loss"
    for key, value in changes.items():
        config[key] = value
    return config


def reported(run, step):
    """What training wrote to metrics.jsonl."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (row,) = [row for row in rows if row["step"] == step and "eval/loss" in row]
    return {tag: value for tag, value in row.items() if tag.startswith("eval/")}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("which", "step"), [({}, 20), ({"best": True}, 10), ({"step": 10}, 10)], ids=str
)
def test_evaluate_gives_the_numbers_of_training(run, devices, which, step):
    metrics = trainer.evaluate(run, mesh=mesh_of(devices), **which)
    assert metrics == pytest.approx(reported(run, step), rel=0, abs=1e-6)
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("lift", ["pmap", "shard_map", "vmap:3"])
def test_evaluate_counts_each_example_once_in_batches_that_do_not_divide(run, lift):
    config = changed(run, lift=lift, eval={"batch_size": 100})
    metrics = trainer.evaluate(str(run), config=config, mesh=mesh_of(8))
    assert metrics == pytest.approx(reported(run, 20), rel=0, abs=1e-6)


def test_the_commands_give_the_same_numbers(launch, run, tmp_path):
    flags = [f"--workdir={run}", "--fake_devices=8"]
    code, out, err = launch("eval", *flags, f"--json={tmp_path}/found.json")
    assert code == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["metrics"] == trainer.evaluate(run)
    assert found["examples"] == EXAMPLES
    code, out, err = launch("predict", *flags, f"--out={tmp_path}/found.npz")
    assert code == 0, out + err
    outputs = trainer.predict(run)
    with np.load(tmp_path / "found.npz") as arrays:
        assert sorted(arrays) == sorted(outputs)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, outputs[name])


@pytest.mark.parametrize("split", ["eval", "train"])
def test_predict_gives_every_example_in_order_on_any_number_of_devices(run, split):
    config = changed(run, eval={"batch_size": 100})
    one, eight = (trainer.predict(run, split=split, mesh=mesh_of(n)) for n in (1, 8))
    ragged = trainer.predict(run, split=split, config=config)
    count = EXAMPLES if split == "eval" else len(one["y"])
    assert one["outputs"].shape == (count, 10)
    assert one["outputs"].dtype == np.float32
    for other in (eight, ragged):
        np.testing.assert_allclose(other["outputs"], one["outputs"], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(other["y"], one["y"])


def test_outputs_and_loss_belong_together(run):
    found = trainer.predict(run, best=True)
    logits = found["outputs"].astype(np.float64)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    losses = log_sums - logits[np.arange(EXAMPLES), found["y"]]
    loss = trainer.evaluate(run, best=True)["eval/loss"]
    assert losses.mean() == pytest.approx(loss, rel=0, abs=1e-5)


def without_held_out(seed=0):
    x = np.ones((64, 8, 8, 1), np.float32)
    return {"train": {"x": x, "y": np.zeros(64, np.int32)}}


@pytest.mark.parametrize("function", [trainer.evaluate, trainer.predict])
def test_what_cannot_be_done_is_a_user_error(run, tmp_path, function):
    with pytest.raises(trainer.UserError, match="is not the folder of a run: it does not exist"):
        function(tmp_path / "nowhere")
    with pytest.raises(trainer.UserError, match=r"is not the folder of a run: it has no config"):
        function(tmp_path)
    with pytest.raises(trainer.CheckpointsUnreadable, match="holds no state of step 15"):
        function(run, step=15)
    config = changed(run)
    config.model.hidden_size = 8
    with pytest.raises(trainer.UserError, match=r"params/Dense_0/kernel .*shape"):
        function(run, config=config)
    config = changed(run, data={"target": "test_evaluate_and_predict:without_held_out"})
    with pytest.raises(trainer.UserError, match="the data has no held-out examples"):
        function(run, config=config)


def test_a_split_of_another_name_is_a_user_error(run):
    with pytest.raises(trainer.UserError, match=r"split='test' is neither 'eval' nor 'train'"):
        trainer.predict(run, split="test")
