"""A new run initialised from another one, and what it prints about that."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from conftest import mesh_of, wide
from runs import assert_bitwise_equal, digits, steps_of

import trainer
from trainer.checkpoints.init_map import match_leaves
from trainer.errors import CheckpointsUnreadable, UserError
from trainer.state.leaves import name_leaves

STILL = {"target": "optax:sgd", "learning_rate": 0.0}
SOURCE = ("params/enc/Dense_0/kernel", "params/head/kernel", "model_state/stats/enc/mean")


@pytest.mark.parametrize(
    ("rules", "wanted", "sources", "unused"),
    [
        ([], SOURCE, SOURCE, ()),
        (["!head"], SOURCE, (SOURCE[0], None, SOURCE[2]), (SOURCE[1],)),
        (
            ["enc->net/body"],  # statistics go with their module
            ("params/net/body/Dense_0/kernel", "model_state/stats/net/body/mean"),
            (SOURCE[0], SOURCE[2]),
            (SOURCE[1],),
        ),
        (["enc->"], ("params/Dense_0/kernel",), (SOURCE[0],), SOURCE[1:]),
        (["->net"], ("params/net/head/kernel",), (SOURCE[1],), (SOURCE[0], SOURCE[2])),
        (["enc/Dense_0->a", "enc->b"], ("params/a/kernel",), (SOURCE[0],), SOURCE[1:]),
    ],
)
def test_names_match_by_full_components(rules, wanted, sources, unused):
    match = match_leaves(SOURCE, wanted, rules)
    pairs = zip(wanted, sources, strict=True)
    assert match.sources == {name: source for name, source in pairs if source is not None}
    assert match.unused == unused
    assert set(match.kept) == set(wanted) - set(match.sources)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        (["hea->x"], "the checkpoint of config.init_from has no 'hea'\n  HINT: did you mean head"),
        (["!he"], "this model has no 'he'\n  HINT: did you mean head"),
        (["head"], "'head' is not a rule"),
        (["!head->x"], "'!head->x' is not a rule"),
        (["enc/Dense_0->head"], "params/enc/Dense_0/kernel and params/head/kernel would both"),
    ],
)
def test_a_rule_that_fits_nothing_is_an_error(rules, told):
    with pytest.raises(UserError, match=re.escape(told)):
        match_leaves(SOURCE, SOURCE, rules)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run with a best state before its last one, and another that keeps an average."""
    folder = tmp_path_factory.mktemp("source")
    config = digits(20, seed=5)
    config.eval = {"every_steps": 10}
    config.checkpoint = {"every_steps": 10, "best_metric": "eval/loss", "best_mode": "max"}
    trainer.train(config, folder / "run", mesh_of(2))
    trainer.train(digits(10, seed=5, ema_decay=0.5), folder / "averaged", mesh_of(2))
    return folder


def fine(source, steps=1, **changes):
    """A run whose params are those it began with."""
    return digits(steps, **{"optimizer": STILL, "init_from": str(source), **changes})


@pytest.mark.parametrize(
    ("place", "step", "lift"),
    [
        ("", 20, "pmap"),
        ("best", 10, "shard_map"),
        wide("checkpoints", 20, "vmap"),
        wide("checkpoints/10", 10, "pmap"),
        wide("best/10", 10, "pmap"),
    ],
)
def test_params_and_statistics_are_loaded_and_nothing_else(
    tmp_path, capsys, pretrained, place, step, lift
):
    source = pretrained / "run" / place
    found = trainer.train(fine(source, lift=lift), tmp_path / "run", mesh_of(2)).state
    there = trainer.load(pretrained / "run", step=step)
    assert_bitwise_equal(found.params, there["params"])
    assert int(found.step) == 1
    own = trainer.train(digits(1, optimizer=STILL), tmp_path / "own", mesh_of(2)).state
    assert_bitwise_equal(found.rng, own.rng)
    # Statistics have moved by one step, from where they were.
    mean = there["model_state"]["batch_stats"]["BatchNorm_0"]["mean"]
    moved = np.asarray(found.model_state["batch_stats"]["BatchNorm_0"]["mean"])
    fresh = np.asarray(own.model_state["batch_stats"]["BatchNorm_0"]["mean"])
    assert np.abs(moved - mean).max() < 0.2 * np.abs(mean).max()
    assert np.abs(moved - fresh).max() > np.abs(moved - mean).max()
    told = capsys.readouterr().out
    kind = "best" if place == "best" else "checkpoints"
    assert f"{pretrained}/run/{kind}/{step}: 14 leaves loaded (1,610 numbers)\n" in told


def test_an_average_is_loaded_into_params_and_average(tmp_path, pretrained):
    there = trainer.load(pretrained / "averaged")
    source = pretrained / "averaged"
    found = trainer.train(fine(source, ema_decay=0.9), tmp_path / "run", mesh_of(2)).state
    assert_bitwise_equal(found.params, there["ema"])
    for name, leaf in name_leaves(found.ema).items():
        np.testing.assert_allclose(leaf, name_leaves(there["ema"])[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("state_sharding", [wide("zero1"), "fsdp"])
def test_leaves_are_placed_as_those_of_a_sharded_state(tmp_path, state_sharding):
    wide = digits(2, seed=5, ema_decay=0.5)
    wide.model.hidden_size = 64
    source = tmp_path / "source"
    trainer.train(wide, source, mesh_of(2))
    config = fine(source, ema_decay=0.9, lift="shard_map", state_sharding=state_sharding)
    config.model.hidden_size = 64
    found = trainer.train(config, tmp_path / "run", mesh_of(2)).state
    there = trainer.load(source)["ema"]
    assert_bitwise_equal(found.params, there)
    for name, leaf in name_leaves(found.ema).items():
        np.testing.assert_allclose(leaf, name_leaves(there)[name], rtol=1e-6, atol=0)
    assert not found.ema["Dense_0"]["kernel"].is_fully_replicated


def test_a_part_may_keep_its_initial_values(tmp_path, capsys, pretrained):
    source = pretrained / "run"
    config = fine(source, init_map="!Dense_2")
    config.model.out_size = 12
    found = trainer.train(config, tmp_path / "run", mesh_of(2)).state
    there = trainer.load(source)["params"]
    assert_bitwise_equal(found.params["Dense_1"], there["Dense_1"])
    assert found.params["Dense_2"]["kernel"].shape == (16, 12)
    told = capsys.readouterr().out
    assert "  2 as initialised: params/Dense_2/bias (skipped), params/Dense_2/kernel (sk" in told
    assert "  2 not used: params/Dense_2/bias, params/Dense_2/kernel\n" in told


def test_what_does_not_fit_is_refused_and_leaves_nothing_behind(tmp_path, pretrained):
    config = fine(pretrained / "run", init_map="BatchNorm_0->BatchNorm_0")
    config.model.out_size = 12
    told = (
        r"params/Dense_2/bias is float32\[10\] in the checkpoint and float32\[12\] in this model, "
        r"and 1 more do not fit\n  HINT: .*--config.init_map='BatchNorm_0->BatchNorm_0,!Dense_2'"
    )
    with pytest.raises(UserError, match=told):
        trainer.train(config, tmp_path / "run", mesh_of(2))
    with pytest.raises(UserError, match="no leaf of the checkpoint fits this model"):
        trainer.train(fine(pretrained / "run", init_map="->net"), tmp_path / "run", mesh_of(2))
    with pytest.raises(CheckpointsUnreadable, match=r"init_from='.*typo does not exist\n  HINT"):
        trainer.train(fine(tmp_path / "typo"), tmp_path / "run", mesh_of(2))
    assert not (tmp_path / "run").exists()


def test_a_damaged_source_is_refused(tmp_path, pretrained):
    source = shutil.copytree(pretrained / "run", tmp_path / "source")
    victim = max(
        (path for path in (source / "checkpoints/20/state").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointsUnreadable, match=r"20 is damaged.*\n  HINT: there are"):
        trainer.train(fine(source), tmp_path / "run", mesh_of(2))


def test_a_resume_reads_nothing_of_it(tmp_path, pretrained):
    source = shutil.copytree(pretrained / "run", tmp_path / "source")
    tuned = {"init_from": str(source), "freeze": "Dense_0"}
    whole = trainer.train(digits(20, **tuned), tmp_path / "whole", mesh_of(2)).state
    trainer.train(digits(20, stop_at_step=10, **tuned), tmp_path / "run", mesh_of(2))
    shutil.rmtree(source)
    tuned["init_from"] = "/nowhere"
    rest = trainer.train(digits(20, **tuned), tmp_path / "run", mesh_of(2)).state
    assert_bitwise_equal(whole, rest)


@pytest.mark.slow
def test_two_processes_are_one(launch, tmp_path, pretrained):
    arguments = [
        "--config=configs/digits.py",
        "--config.model.hidden_size=16",
        "--config.optimizer.target=optax:sgd",
        "--config.num_steps=20",
        f"--config.init_from={pretrained / 'run/best'}",
        "--config.init_map=!Dense_2",
        "--config.freeze=Dense_0,BatchNorm_0",
        "--config.ema_decay=0.9",
    ]
    for name, where in (("one", ["--fake_devices=2"]), ("two", ["--processes=2"])):
        extra = ["--fake_devices=1"] if name == "two" else []
        code, out, err = launch(*arguments, *where, *extra, f"--workdir={tmp_path / name}")
        assert (code, err) == (0, "")
        assert "best/10: 12 leaves loaded" in out
        assert steps_of(tmp_path / name / "checkpoints") == [20]
    one, two = (name_leaves(trainer.load(tmp_path / name)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=1e-5, err_msg=name)
    there = trainer.load(pretrained / "run", best=True)["params"]["Dense_0"]["kernel"]
    for leaves in (one, two):
        np.testing.assert_array_equal(leaves["params/Dense_0/kernel"], there)
