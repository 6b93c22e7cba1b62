"""Commands on a finished run: which state they load, `eval`, mistakes and help."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import ROOT
from finished_runs import finished_run, row_of
from runs import assert_bitwise_equal, digits, truncate, wait_for

import trainer
from launcher.cli import evaluate, export, predict
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
