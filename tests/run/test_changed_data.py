"""Data that change between two starts of a run: told and refused, or allowed by name."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from conftest import mesh_of
from runs import config_of, steps_of

import trainer
from trainer.checkpoints import in_memory as fast
from trainer.checkpoints.manifest import Manifest
from trainer.errors import Preempted, UserError


def load(train=64, eval=32, eval_shift=0.0):
    """Examples that others would not change, if the sets were longer."""
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 5)).astype(np.float32)
    y = x.sum(1, keepdims=True)
    held = {"x": x[100 : 100 + eval] + np.float32(eval_shift), "y": y[100 : 100 + eval]}
    return {"train": {"x": x[:train], "y": y[:train]}, "eval": held}


def config(num_steps=8, allow="", fast_dir=None, **data):
    """Four steps an epoch of 64 examples; `data` are not in the config, as files are not."""
    made = config_of("mlp", num_epochs=None, num_steps=num_steps, global_batch_size=16)
    made.data = {"target": "test_changed_data:now"}
    made.eval = {"every_steps": 4}
    made.checkpoint = {"every_steps": 4, "allow": allow, "fast_every_secs": 0.0}
    made.early_stop = {"patience": 100}
    if fast_dir:
        made.checkpoint.update({"fast_dir": str(fast_dir), "fast_every_secs": 1e-6})
    files.clear()
    files.update(data)
    return made


files: dict[str, float] = {}


def now():
    return load(**files)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("eight") / "run"
    trainer.train(config(8), workdir, mesh_of(1))
    return workdir


@pytest.fixture
def run(eight, tmp_path):
    """A copy of a run of eight steps."""
    import shutil

    shutil.copytree(eight, tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    """Its files, except the lock."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def meta_of(place):
    return Manifest.from_text((place / "manifest.json").read_text()).meta


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ({"train": 80}, "train: 80 examples instead of 64\n"),
        ({"eval": 33}, "eval: 33 examples instead of 32\n"),
        ({"eval_shift": 0.01}, "eval: row 0 differs (x), as do 31 of the others\n"),
    ],
)
def test_other_data_are_refused_and_nothing_changes(run, data, what):
    before = contents(run)
    with pytest.raises(UserError) as refused:
        trainer.train(config(12, "model", **data), run, mesh_of(1))
    told = str(refused.value)
    assert told.startswith(f"the data are not those of the state in {run}/checkpoints/8: {what}")
    assert "--config.checkpoint.allow=model,data to resume anyway" in told
    assert contents(run) == before
    trainer.train(config(12), run, mesh_of(1))  # the data are back


def test_longer_data_that_are_allowed(run, capsys):
    """The best state stays: the test set is the same."""
    best = steps_of(run / "best")
    trainer.train(config(10, "data", train=80), run, mesh_of(1))
    told = capsys.readouterr()
    change = "train: 80 examples instead of 64"
    assert f"warning: resumes with other data, as allowed: {change}\n" in told.err
    assert steps_of(run / "best") in (best, [10])
    assert not (run / "best/quarantine").exists()
    assert meta_of(run / "checkpoints/10")["data"]["train"]["length"] == 80
    trainer.train(config(12, train=80), run, mesh_of(1))  # it is the run's now
    with pytest.raises(UserError, match="64 examples instead of 80"):
        trainer.train(config(14), run, mesh_of(1))


def test_a_best_state_of_another_test_set_is_put_aside(run, capsys):
    (old,) = steps_of(run / "best")
    trainer.train(config(8, "data", eval_shift=100.0), run, mesh_of(1))  # nothing left to do
    told = capsys.readouterr().out
    moved = f"moved {run}/best/{old} to {run}/best/quarantine/"
    assert moved in told
    assert "ranked on other held-out examples" in told
    trainer.train(config(12, "data", eval_shift=100.0), run, mesh_of(1))
    # Far worse than any value before, and the best on these examples.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (value,) = [row["eval/loss"] for row in rows if row["step"] == 12 and "eval/loss" in row]
    best = meta_of(run / "best/12")["best"]
    assert best == {"metric": "eval/loss", "value": value, "step": 12}
    stop = meta_of(run / "checkpoints/12")["early_stop"]
    assert (stop["best"], stop["waited"]) == (value, 0)


def test_the_mean_over_an_epoch_is_over_its_own_steps(tmp_path, capsys):
    """Six steps in: in the second of four steps an epoch, and in the second of five."""
    trainer.train(config(6), tmp_path / "run", mesh_of(1))
    capsys.readouterr()
    made = config(12, "data", train=80)
    made.log_every_steps = 1
    trainer.train(made, tmp_path / "run", mesh_of(1))
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "epoch 2" in text]
    mean = np.mean([losses[step] for step in (7, 8, 9, 10)])
    assert float(line.split()[-1].rstrip(".")) == pytest.approx(mean, rel=1e-4)


def test_a_checkpoint_of_a_podlift_without_fingerprints_is_resumed(run, capsys):
    for place in [*(run / "checkpoints").iterdir(), *(run / "best").iterdir()]:
        if place.name.isdigit():
            listed = Manifest.from_text((place / "manifest.json").read_text())
            meta = {k: v for k, v in listed.meta.items() if k not in ("data", "steps_per_epoch")}
            text = dataclasses.replace(listed, meta=meta).to_text()
            (place / "manifest.json").write_text(text)
    trainer.train(config(12, train=80), run, mesh_of(1))
    assert meta_of(run / "checkpoints/12")["data"]["train"]["length"] == 80
    assert "other data" not in capsys.readouterr().err


def test_in_memory_checkpoints_know_their_data(tmp_path, monkeypatch):
    (tmp_path / "memory").mkdir()
    monkeypatch.setattr(fast.InMemoryCheckpoints, "remove", fast.InMemoryCheckpoints.wait)
    monkeypatch.setattr(fast, "_BLOCKED_FRACTION", 1e9)
    monkeypatch.setattr(fast, "_WRITING_FRACTION", 1e9)

    class Crash(Exception):
        pass

    def stop(step, phase):
        if step == 3:
            raise Crash
        return False

    made = config(8, fast_dir=tmp_path / "memory")
    with pytest.raises(Crash):
        trainer.train(made, tmp_path / "run", mesh_of(1), stop_requested=stop)
    made = config(8, fast_dir=tmp_path / "memory", train=80)
    with pytest.raises(UserError, match="the state in memory: train: 80 examples instead of 64"):
        trainer.train(made, tmp_path / "run", mesh_of(1))


def test_a_pending_evaluation_is_made_with_the_data_there_are(run):
    """Asked to stop in an evaluation, and resumed with another test set."""

    def stop(step, phase):
        return step >= 12 and phase == "evaluate"

    with pytest.raises(Preempted):
        trainer.train(config(16), run, mesh_of(1), stop_requested=stop)
    assert meta_of(run / "checkpoints/16")["evaluation_pending"]
    with (run / "metrics.jsonl").open("a") as file:  # as by an attempt that ended soon after
        file.write(json.dumps({"step": 16, "eval/loss": 0.5}) + "\n")
    trainer.train(config(16, "data", eval_shift=100.0), run, mesh_of(1))
    assert meta_of(run / "best/16")["best"]["value"] > 1000


def test_an_evaluation_on_another_test_set_says_so(eight, capsys):
    config()
    expected = trainer.evaluate(eight, mesh=mesh_of(2), trust=True)
    assert capsys.readouterr().err == ""
    config(eval_shift=1.0)
    assert trainer.evaluate(eight, mesh=mesh_of(2), trust=True) != expected
    assert capsys.readouterr().err == (
        "warning: the held-out examples are not those of the run: row 0 differs (x), as do 31 of "
        "the others\n"
    )
