"""Resuming with another config or other code: reported, refused, or allowed by name."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from conftest import mesh_of
from runs import assert_bitwise_equal, digits

import trainer
from trainer.checkpoints import differences
from trainer.checkpoints.manifest import Leaf
from trainer.errors import UserError
from trainer.state.leaves import name_leaves

ADAM = {"target": "optax:adam", "learning_rate": 1e-3}
SGD = {"target": "optax:sgd", "learning_rate": 1e-3}
LEAVES = {"a/b": Leaf((3, 2), "float32", 0), "c": Leaf((), "int32", 0), "e": Leaf((4,), "int8", 0)}


def test_every_kind_of_difference_has_its_row():
    wanted = {
        "a/b": jax.ShapeDtypeStruct((3, 4), np.float32),
        "c": jax.ShapeDtypeStruct((), np.float32),
        "d": jax.ShapeDtypeStruct((5,), np.float32),
    }
    found = differences.compare(LEAVES, wanted)
    assert differences.show(found).splitlines() == [
        "  a/b  shape    float32[3,2] -> float32[3,4]",
        "  c    dtype    int32[]      -> float32[]",
        "  d    missing  (not saved)  -> float32[5]",
        "  e    extra    int8[4]      -> (not in the model)",
    ]
    for kinds in ([], ["shape", "dtype", "missing"], ["extra"]):
        with pytest.raises(UserError) as refused:
            differences.check_allowed(found, kinds, "there")
        told = str(refused.value)
        together = ",".join([*kinds, *sorted({"shape", "dtype", "missing", "extra"} - set(kinds))])
        assert f"--config.checkpoint.allow={together} " in told
        assert ("int8[4]" in told) == ("extra" not in kinds)
    differences.check_allowed(found, ["model", "extra", "shape", "dtype", "missing"], "there")


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """A run of ten steps with Adam; changed ones get a copy."""
    workdir = tmp_path_factory.mktemp("wide") / "run"
    trainer.train(digits(10, optimizer=ADAM), workdir, mesh_of(2))
    return workdir


@pytest.fixture
def workdir(wide_run, tmp_path):
    import shutil

    return shutil.copytree(wide_run, tmp_path / "run")


def narrower(**changes):
    config = digits(15, optimizer=ADAM, **changes)
    config.model.hidden_size = 12
    return config


def test_a_refusal_lists_keys_and_leaves(workdir):
    with pytest.raises(UserError) as refused:
        trainer.train(narrower(seed=3), workdir, mesh_of(2))
    told = str(refused.value)
    assert "  seed: 0 -> 3" in told
    assert "  model.hidden_size: 16 -> 12" in told
    assert "  params/Dense_0/kernel" in told
    assert "float32[64,16] -> float32[64,12]" in told
    assert "opt_state/0/mu/Dense_0/kernel" in told
    assert "--config.checkpoint.allow=model.hidden_size,seed,shape to resume anyway" in told


def test_allowing_the_keys_alone_does_not_allow_the_leaves(workdir):
    config = narrower()
    config.checkpoint.allow = "model"
    with pytest.raises(UserError, match=r"allow=model,shape to resume anyway") as refused:
        trainer.train(config, workdir, mesh_of(2))
    assert "float32[64,16] -> float32[64,12]" in str(refused.value)
    assert not (workdir / "checkpoints/quarantine").exists()  # it is not damaged


def test_leaves_of_another_shape_are_initialised_and_the_others_restored(workdir, capsys):
    before = trainer.load(workdir)
    config = narrower(stop_at_step=10)
    config.num_steps = 15
    config.checkpoint.allow = "model.hidden_size,shape"
    state = trainer.train(config, workdir, mesh_of(2)).state
    assert int(state.step) == 10
    told = capsys.readouterr().err
    assert "another config, as allowed: model.hidden_size: 16 -> 12" in told
    assert "as config.checkpoint.allow permits:\n" in told
    assert "float32[64,16] -> float32[64,12]" in told
    same = "params/Dense_2/bias"
    np.testing.assert_array_equal(name_leaves(before)[same], np.asarray(name_leaves(state)[same]))
    assert name_leaves(state)["params/Dense_0/kernel"].shape == (64, 12)


def test_another_optimizer_has_other_leaves(workdir, capsys):
    config = digits(15, optimizer=SGD)
    config.checkpoint.allow = "optimizer"
    with pytest.raises(UserError, match=r"allow=optimizer,extra to resume anyway") as refused:
        trainer.train(config, workdir, mesh_of(2))
    assert "  opt_state/0/mu/Dense_0/kernel" in str(refused.value)
    config.checkpoint.allow = "optimizer,extra"
    assert int(trainer.train(config, workdir, mesh_of(2)).state.step) == 15
    back = digits(20, optimizer=ADAM)
    back.checkpoint.allow = "optimizer,missing"
    assert int(trainer.train(back, workdir, mesh_of(2)).state.step) == 20


def test_another_dtype_is_never_cast_in_silence(workdir, capsys):
    config = digits(10, optimizer={**ADAM, "mu_dtype": "bfloat16"})
    config.checkpoint.allow = "optimizer"
    with pytest.raises(UserError, match=r"float32\[64,16\] -> bfloat16\[64,16\]"):
        trainer.train(config, workdir, mesh_of(2))
    saved = name_leaves(trainer.load(workdir))["opt_state/0/mu/Dense_0/kernel"]
    config.checkpoint.allow = "optimizer,dtype"
    state = trainer.train(config, workdir, mesh_of(2)).state
    cast = name_leaves(state)["opt_state/0/mu/Dense_0/kernel"]
    assert cast.dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(np.asarray(cast), saved.astype(jax.numpy.bfloat16))
    assert "dtype" in capsys.readouterr().err


def test_a_changed_learning_rate_resumes_from_the_same_state(workdir):
    config = digits(10, optimizer={**ADAM, "learning_rate": 1e-4})
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.001 -> 0.0001"):
        trainer.train(config, workdir, mesh_of(2))
    before = trainer.load(workdir)
    config.checkpoint.allow = "optimizer.learning_rate"
    assert_bitwise_equal(trainer.train(config, workdir, mesh_of(2)).state.params, before["params"])


def test_a_typo_in_what_is_allowed_is_reported(tmp_path):
    config = digits(10)
    config.checkpoint.allow = "modle"
    with pytest.raises(UserError, match="did you mean model"):
        trainer.train(config, tmp_path / "run", mesh_of(2))


@pytest.mark.wide
def test_the_launcher_refuses_before_it_starts_anything(launch, tmp_path):
    arguments = ["--config=configs/digits.py", f"--workdir={tmp_path}/run", "--fake_devices=2"]
    assert launch(*arguments, "--config.num_steps=3")[0] == 0
    logs = sorted((tmp_path / "run/logs").rglob("*"))
    wider = ["--config.num_steps=6", "--config.model.hidden_size=64", "--processes=2"]
    code, _, err = launch(*arguments, *wider)
    assert code == 2
    assert "  model.hidden_size: 128 -> 64" in err
    assert re.search(r"params/Dense_0/kernel +shape +float32\[64,128\] +-> float32\[64,64\]", err)
    assert sorted((tmp_path / "run/logs").rglob("*")) == logs
    code, out, err = launch(*arguments, *wider, "--config.checkpoint.allow=model,shape")
    assert code == 0, err
    assert "restored step 3" in out
