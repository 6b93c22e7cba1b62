"""Commands on a finished run: which state they load, `eval`, mistakes and help."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT
from finished_runs import finished_run, row_of
from runs import assert_bitwise_equal, digits, truncate, wait_for

import trainer
from launcher.cli import evaluate, export, predict
from trainer.checkpoints import arrays as arrays_of
from trainer.checkpoints import init_from, manifest
from trainer.checkpoints import load as loading
from trainer.config.settings import check
from trainer.errors import CheckpointsUnreadable, UserError
from trainer.inference.trained_model import restore


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    yield from finished_run(tmp_path_factory.mktemp("finished"))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("which", "step"), [("latest", 30), ("best", 10), ("20", 20)], ids=["latest", "best", "20"]
)
def test_eval_gives_the_numbers_of_training(launch, run, tmp_path, devices, which, step):
    """From another number of devices, and batches that do not divide by them."""
    code, out, err = launch(
        "eval",
        f"--workdir={run}",
        f"--step={which}",
        f"--fake_devices={devices}",
        f"--json={tmp_path}/found.json",
        *(["--config.eval.batch_size=100"] if which == "20" else []),
    )
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "found.json").read_text())
    row = row_of(run, step)
    assert found["metrics"] == pytest.approx(row, rel=0, abs=1e-6)
    assert (found["step"], found["examples"], found["devices"]["count"]) == (step, 360, devices)
    shown = "  ".join(f"{tag} {value:.4g}" for tag, value in found["metrics"].items())
    assert out.splitlines()[-1] == f"step {step}/30  {shown}"


@pytest.mark.slow
def test_eval_while_the_run_is_training_there(start, launch, tmp_path):
    """Its newest state is another one each time, and the one before is removed at once."""
    workdir = f"--workdir={tmp_path}/run"
    training = start(
        "--config=configs/digits.py",
        "--fake_devices=2",
        workdir,
        "--config.num_steps=1000000",
        "--config.eval.every_steps=1000000",
        "--config.checkpoint.every_steps=20",
        "--config.checkpoint.keep=1",
    )
    wait_for(tmp_path / "run/checkpoints/20")
    steps = []
    for _ in range(2):
        code, out, err = launch("eval", workdir, f"--json={tmp_path}/found.json")
        assert code == 0, out + err
        steps.append(json.loads((tmp_path / "found.json").read_text())["step"])
    assert training.poll() is None
    assert steps == sorted(set(steps))


def test_a_state_of_any_step_can_be_loaded(run):
    assert int(trainer.load(run, step=20)["step"]) == 20
    assert int(trainer.load(run)["step"]) == 30
    assert_bitwise_equal(trainer.load(run, best=True), trainer.load(run, step=10))
    with pytest.raises(CheckpointsUnreadable) as error:
        trainer.load(run, step=25)
    assert error.value.message == f"{run} holds no state of step 25"
    assert error.value.hint == ("there are checkpoints/10, checkpoints/20, checkpoints/30, best/10")


def test_the_best_state_is_found_by_its_step_and_what_is_damaged_names_the_others(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints/10")
    assert loading.read_saved(copy, step=10).place == copy / "best/10"
    truncate(copy / "checkpoints/30")
    with pytest.raises(CheckpointsUnreadable, match=r"checkpoints/30 is damaged: state") as error:
        trainer.load(copy)
    assert error.value.hint == "there are checkpoints/20, best/10"
    assert int(trainer.load(copy, step=20)["step"]) == 20


def test_a_state_that_is_removed_while_it_is_read_is_no_damage(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    read = loading._read

    def remove_and_read(folder, step, run_id):
        if step == 30:
            shutil.rmtree(copy / "checkpoints/30")
        return read(folder, step, run_id)

    monkeypatch.setattr(loading, "_read", remove_and_read)
    assert int(trainer.load(copy)["step"]) == 20


def test_another_model_is_refused_by_its_leaves_and_another_optimizer_does_not_matter(run):
    config = digits(30, optimizer={"target": "optax:sgd", "learning_rate": 0.1})
    assert restore(run, check(config)).step == 30
    config.model.hidden_size = 8
    with pytest.raises(UserError) as error:
        restore(run, check(config))
    text = str(error.value)
    assert f"the state in {run}/checkpoints/30 does not match" in text
    assert "  params/Dense_0/kernel                     shape    float32[64,16] -> " in text
    assert "opt_state" not in text
    assert "allow" not in text


MISTAKES = [
    (["evl"], "did you mean eval?"),
    (["exprt"], "did you mean export?"),
    (["predct"], "did you mean predict?"),
    (["eval"], "--workdir is missing"),
    (["eval", "runs/x"], "did you mean --workdir=runs/x?"),
    (["eval", "--workdir=/nowhere"], "is not the folder of a run: it is not there"),
    (["eval", "--workdir=configs"], "is not the folder of a run: it has no config.json"),
    (["eval", "--workdir=RUN", "--step=lates"], "did you mean --step=latest?"),
    (["eval", "--workdir=RUN", "--step=-1"], "latest, best, or a number"),
    (["eval", "--workdir=RUN", "--stp=3"], "did you mean --step?"),
    (["eval", "--wrkdir=RUN"], "did you mean --workdir?"),
    (["eval", "--workdir=RUN", "surplus"], "unexpected argument 'surplus'"),
    (["eval", "--workdir=RUN", "--config.eval.bach_size=3"], "--config.eval.batch_size?"),
    (["eval", "--workdir=RUN", "--config.model.hidden_size=3"], "only data, eval, "),
    (["eval", "--workdir=RUN", "--config.eval.batch_size=0"], "at least 1"),
    (["eval", "--workdir=RUN", "--config=configs/digts.py"], "did you mean configs/digits.py?"),
    (["eval", "--config=configs/digits.py"], "--workdir is missing"),
    (["eval", "--workdir=RUN", "--json=/nowhere/x"], "there is no folder /nowhere"),
    (["eval", "--workdir=RUN", "--json=configs"], "--json=configs is a folder"),
    (["predict", "--workdir=RUN"], "--out is missing"),
    (["predict", "--workdir=RUN", "--out=x", "--split=test"], "--split=test is neither"),
    (["export", "--workdir=RUN"], "--out is missing"),
    (["export", "--workdir=RUN", "--out=x", "--platforms=gpu"], "did you mean cuda?"),
    (["export", "--workdir=RUN", "--out=x", "--batch=0"], "batch"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_reported_without_jax(start, run, arguments, message):
    process = start(
        "launcher",
        *(argument.replace("RUN", str(run)) for argument in arguments),
        module="conftest_imports",
        environ={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert message in err
    lines = err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert "imported jax" not in err


@pytest.mark.parametrize("command", [evaluate, export, predict])
def test_help(command, capsys):
    assert command.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--workdir=RUN" in out
    assert max(map(len, out.splitlines())) <= 100
    for flag in command._FLAGS:
        assert f"  --{flag}=" in out


def test_eval_of_data_without_held_out_examples_and_of_code_that_raises(launch, run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from trainer.data.digits import load as all\n"
        "def load():\n    return {'train': all()['train']}\n"
        "def loss(outputs, batch):\n    return outputs.no_such\n"
    )
    environ = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    arguments = ["eval", f"--workdir={run}", "--fake_devices=2"]
    code, _, err = launch(*arguments, "--config.data.target=mine:load", environ=environ)
    assert code == 2
    assert "has no held-out examples" in err
    code, _, err = launch(*arguments, "--config.loss.target=mine:loss", environ=environ)
    assert code == 1
    assert "mine.py:5, in loss: return outputs.no_such" in err
    assert "Traceback" not in err


# Folders that somebody has sent


@pytest.fixture
def sent(run, tmp_path):
    """A copy of the run whose config names code that writes a file."""
    shutil.copytree(run, tmp_path / "sent")
    path = tmp_path / "sent/config.json"
    config = json.loads(path.read_text())
    config["loss"]["target"] = "theirs:loss"
    path.write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from trainer.losses import softmax_cross_entropy as loss\n"
    )
    return tmp_path / "sent"


def test_the_code_that_a_folder_names_runs_only_if_it_is_trusted(launch, sent, monkeypatch):
    environ = {"PYTHONPATH": f"{ROOT}:{sent.parent}"}
    arguments = ["eval", f"--workdir={sent}", "--fake_devices=1"]
    code, _, err = launch(*arguments, environ=environ)
    assert code == 2
    assert err == (
        f"error: config.loss.target='theirs:loss' in {sent} names code that is neither of podlift "
        f"or optax nor of a package in {ROOT}\n  HINT: if you know who made that folder, --trust "
        "(trust=True in Python) runs what it names\n"
    )
    monkeypatch.syspath_prepend(sent.parent)
    with pytest.raises(UserError, match="names code"):
        trainer.evaluate(sent)
    with pytest.raises(UserError, match="names code"):
        trainer.predict(sent)
    assert not (sent.parent / "ran").exists()
    code, out, err = launch(*arguments, "--trust", environ=environ)
    assert (code, err) == (0, ""), out
    assert (sent.parent / "ran").exists()


def link_the_config(sent):
    (sent / "config.json").rename(sent.parent / "elsewhere")
    (sent / "config.json").symlink_to(sent.parent / "elsewhere")
    return "config.json is a link, which is not followed"


def block_the_config(sent):
    (sent / "config.json").unlink()
    os.mkfifo(sent / "config.json")
    return "config.json is not a regular file"


def link_a_step(sent):
    (sent / "checkpoints/30").rename(sent.parent / "elsewhere")
    (sent / "checkpoints/30").symlink_to(sent.parent / "elsewhere")
    return "30 is a link, which is not followed"


def link_a_file(sent):
    file = next(path for path in (sent / "checkpoints/30/state/d").iterdir())
    file.rename(sent.parent / "elsewhere")
    file.symlink_to(sent.parent / "elsewhere")
    return f"30/state/d/{file.name} is a link, which is not followed"


def add_a_fifo(sent):
    os.mkfifo(sent / "checkpoints/30/state/fifo")
    return "30/state/fifo is not a regular file"


@pytest.mark.parametrize(
    "change", [link_the_config, block_the_config, link_a_step, link_a_file, add_a_fifo]
)
def test_links_in_a_folder_are_not_followed(sent, change, capsys):
    expected = change(sent)
    assert evaluate.main([f"--workdir={sent}"]) == 2
    assert expected in capsys.readouterr().err


def test_the_folder_and_that_of_its_checkpoints_may_be_links(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/checkpoints").symlink_to(run / "checkpoints")
    for place in (tmp_path / "link", tmp_path / "other"):
        assert int(trainer.load(place)["step"]) == 30


LARGE = 10**12


def claim_in_the_manifest(place):
    """A manifest that is whole, and names a leaf that the memory of no machine holds."""
    listed = manifest.read(place)
    leaf = listed.leaves["params/Dense_0/kernel"]
    leaves = {**listed.leaves, "params/Dense_0/kernel": dataclasses.replace(leaf, shape=(LARGE,))}
    (place / manifest.NAME).write_text(dataclasses.replace(listed, leaves=leaves).to_text())
    return "its arrays take 4e+03 GB"


def claim_in_the_files(place):
    """Files of another array than the manifest says."""
    listed = manifest.read(place)
    shutil.rmtree(place / "state")
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in listed.leaves.items()}
    arrays_of.write(place, {**arrays, "params/Dense_0/kernel": np.zeros(1 << 20, np.float32)})
    (place / manifest.NAME).unlink()
    files = manifest.describe_files(place)
    (place / manifest.NAME).write_text(dataclasses.replace(listed, files=files).to_text())
    return "params/Dense_0/kernel is [1048576] in its files and [64, 16] in its manifest"


@pytest.mark.parametrize("claim", [claim_in_the_manifest, claim_in_the_files])
def test_sizes_are_compared_before_memory_is_taken(run, tmp_path, monkeypatch, claim):
    shutil.copytree(run, tmp_path / "sent")
    expected = claim(tmp_path / "sent/checkpoints/30")
    monkeypatch.setattr(arrays_of, "read", lambda *_: pytest.fail("read"))
    for load in (trainer.load, lambda place: init_from.read(str(place))):
        with pytest.raises(CheckpointsUnreadable) as refused:
            load(tmp_path / "sent")
        assert expected in refused.value.message
        assert "\n" not in refused.value.message


def test_what_is_far_smaller_than_it_claims_is_refused(tmp_path):
    """Even where the memory would do: zeros compress to 1 in 32768 at most."""
    leaves = {"a": manifest.Leaf((1 << 28,), "float32", 0)}
    (tmp_path / "file").write_bytes(b"0" * 1000)
    with pytest.raises(ValueError, match=r"its arrays take 1\.07 GB, and its files 1,000 b"):
        arrays_of.check_sizes(tmp_path, leaves, 1 << 40)
