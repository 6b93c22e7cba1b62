"""`--smoke`: every part of a run once, a verdict, and nothing of the run itself touched."""

from __future__ import annotations

import os

import numpy as np
import pytest
from conftest import ROOT, mesh_of, wide
from runs import config_of, digits

import trainer.run.smoke
from trainer.checkpoints.saver import Saver
from trainer.errors import NonFiniteState, Preempted, SmokeFailed
from trainer.run.smoke import smoke

MLP = "--config=configs/mlp.py"
CHECKS = [
    "devices",
    "processes",
    "first step",
    "replicas",
    "save",
    "second step",
    "loss",
    "replicas",
    "evaluation",
    "restore",
    "resume",
]


def checks_of(out):
    return [line[:12].strip() for line in out.splitlines() if not line.startswith("restored")]


def contents(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in folder.rglob("*")
    }


def test_all_is_well_and_the_run_there_is_as_it_was(launch, tmp_path):
    argv = [MLP, "--fake_devices=4", f"--workdir={tmp_path}/run", "--config.num_epochs=2"]
    assert launch(*argv)[0] == 0
    before = contents(tmp_path)
    code, out, err = launch(*argv, "--smoke")
    assert (code, err) == (0, "")
    assert checks_of(out) == [*CHECKS, "smoke: ok"]
    assert "4 cpu devices, lift pmap, global batch 128, 32 a shard" in out
    assert "4 copies agree" in out
    assert contents(tmp_path) == before
    code, out, _ = launch(*argv[:2], f"--workdir={tmp_path}/new/run", "--smoke")
    assert code == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_one_of_two_processes_reports(launch, tmp_path):
    argv = [MLP, "--processes=2", "--fake_devices=2", f"--workdir={tmp_path}/run", "--smoke"]
    code, out, err = launch(*argv, "--log_ranks=all")
    assert code == 0, err
    told = [line.removeprefix("[0] ") for line in out.splitlines()]
    assert [line for line in told if line.startswith("processes")] == [
        "processes    2; all see the workdir and the same data"
    ]
    assert [line for line in told if line.startswith("smoke:")] == ["smoke: ok"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], pytest.param(["--processes=2"], marks=pytest.mark.slow)])
def test_an_error_of_user_code_is_reported_with_the_files_that_remain(launch, tmp_path, more):
    (tmp_path / "mine.py").write_text("def loss(outputs, batch):\n    return outputs.no_such\n")
    argv = [MLP, "--fake_devices=2", f"--workdir={tmp_path}/run", "--smoke", *more]
    argv += ["--config.loss.target=mine:loss"]
    code, out, err = launch(*argv, environ={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert code == 1
    assert "error: AttributeError on rank " in err
    assert out.splitlines()[-1] == (
        f"smoke: FAILED, exit code 1; what is left of it: {tmp_path}/run/.smoke"
    )
    assert os.listdir(tmp_path / "run") == [".smoke"]


LIFTS = [("pmap", 1), ("shard_map", 3), ("vmap", 1)]


@pytest.mark.parametrize(("lift", "steps_per_call"), LIFTS)
def test_lifts_and_several_steps_a_call(tmp_path, capsys, lift, steps_per_call):
    config = digits(1, lift=lift, steps_per_call=steps_per_call)
    smoke(config, tmp_path / "s", mesh_of(2))
    out = capsys.readouterr().out
    assert checks_of(out) == CHECKS
    assert "on 65 of 360 examples" in out  # a batch of 64, and one to be padded
    assert f"step {2 * steps_per_call} again, bit for bit" in out
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("state_sharding", [wide("zero1"), "fsdp"])
def test_a_sharded_state_initialised_from_another_run(tmp_path, capsys, state_sharding):
    trainer.train(digits(2), tmp_path / "run", mesh_of(2))
    config = digits(1, lift="shard_map", state_sharding=state_sharding)
    config.init_from = str(tmp_path / "run")
    capsys.readouterr()
    smoke(config, tmp_path / "s", mesh_of(2))
    out = capsys.readouterr().out
    assert [check for check in checks_of(out) if check in CHECKS] == CHECKS
    assert "opt_state" in out


def test_a_loss_that_is_no_number(tmp_path):
    config = config_of("mlp", steps_per_call=8)
    config.optimizer.learning_rate = 1e30
    with pytest.raises(SmokeFailed, match=r"first step: the loss is nan at step [2-8]"):
        smoke(config, tmp_path, mesh_of(2))
    config = config_of("mlp")
    config.optimizer.learning_rate = float("nan")
    with pytest.raises(NonFiniteState):  # as the run itself would say
        smoke(config, tmp_path, mesh_of(2))


class Unsteady:
    """Examples that are others each time they are read."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)

    def __len__(self):
        return 128

    def __getitem__(self, indices):
        x = self.random.uniform(size=(*indices.shape, 5)).astype(np.float32)
        return {"x": x, "y": x[..., :1]}


def unsteady(seed):
    return {"train": Unsteady(seed)}


def test_data_that_is_not_the_same_twice_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    config = config_of("mlp")
    config.data.target = "test_smoke:unsteady"
    with pytest.raises(SmokeFailed, match=r"resume: params/.* at step 2 is not what it was"):
        smoke(config, tmp_path, mesh_of(2))


def test_a_disk_that_does_not_keep_what_it_is_given(tmp_path, monkeypatch):
    """One bit of one array."""

    def finish(saver):
        real(saver)
        (place,) = tmp_path.glob("smoke-*/checkpoints/1/state")
        largest = max((p for p in place.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)

    real = Saver.finish
    monkeypatch.setattr(Saver, "finish", finish)
    with pytest.raises(SmokeFailed, match=r"restore: none of the 1 checkpoints in .* is intact"):
        smoke(config_of("mlp"), tmp_path, mesh_of(2))
    assert list(tmp_path.glob("smoke-*/checkpoints/1")), "what failed is there to be looked at"


def test_a_restore_that_gives_another_state(tmp_path, monkeypatch):
    def restore(self, abstract, init, run):
        state = real(self, abstract, init, run)
        return state.replace(rng=state.rng + 1)

    real = trainer.run.smoke._Smoke._restore
    monkeypatch.setattr(trainer.run.smoke._Smoke, "_restore", restore)
    with pytest.raises(SmokeFailed, match=r"restore: rng is not what was saved"):
        smoke(config_of("mlp"), tmp_path, mesh_of(2))


@pytest.mark.parametrize("phase", ["start", "compile", "save", "train", "evaluate"])
def test_asked_to_stop_it_leaves_nothing(tmp_path, phase):
    with pytest.raises(Preempted, match=r"^asked to stop$"):
        smoke(digits(1), tmp_path, mesh_of(2), stop_requested=lambda step, now: now == phase)
    assert list(tmp_path.iterdir()) == []
