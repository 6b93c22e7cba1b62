"""What is done with saved states: `eval`, `predict`, `export`, `trainer.load`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, mesh_of, skip_here
from etils import epath
from runs import assert_bitwise_equal, digits, truncate, wait_for

import trainer
from launcher.cli import evaluate, export, predict
from trainer.checkpoints import load as loading
from trainer.config.settings import check
from trainer.data.stream import ArraySource, TrainStream
from trainer.errors import CheckpointsUnreadable, UserError
from trainer.inference.export import export_model, signature
from trainer.inference.predict import predict_source
from trainer.inference.trained_model import restore
from trainer.lift.lift import make_lift
from trainer.models.resnet import ResNet
from trainer.models.transformer import Transformer
from trainer.workdir.paths import opened_whole
from trainer.workdir.workdir import read_config

try:
    import flatbuffers  # noqa: F401 (which jax.export needs)
except ImportError:
    needs_flatbuffers = skip_here("flatbuffers is not installed")
else:
    needs_flatbuffers = skip_here("")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Thirty steps, evaluated and saved at 10, 20 and 30; the "best" loss is the highest, at 10."""
    config = digits(30)
    config.eval = {"every_steps": 10}
    config.checkpoint.every_steps = 10
    config.checkpoint.best_metric, config.checkpoint.best_mode = "eval/loss", "max"
    workdir = tmp_path_factory.mktemp("using") / "run"
    trainer.train(config, workdir, mesh_of(4))
    before = contents(workdir)
    yield workdir
    assert contents(workdir) == before, "what was done with the run has changed its folder"


def contents(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


def trained_model(run, **which):
    return restore(run, check(read_config(epath.Path(run))), **which)


def apply(trained, x):
    """The model's outputs without any axis, on one device."""
    state = trained.state
    return np.asarray(
        trained.job.task.model.apply({"params": state.params, **state.model_state}, x)
    )


def row_of(run, step):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["step"] == step and "eval/loss" in row]
    return {tag: value for tag, value in row.items() if tag.startswith("eval/")}


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

    def remove_and_read(folder, step):
        if step == 30:
            shutil.rmtree(copy / "checkpoints/30")
        return read(folder, step)

    monkeypatch.setattr(loading, "_read", remove_and_read)
    assert int(trainer.load(copy)["step"]) == 20


def test_another_model_is_told_by_its_leaves_and_another_optimizer_does_not_matter(run):
    config = digits(30, optimizer={"target": "optax:sgd", "learning_rate": 0.1})
    assert restore(run, check(config)).step == 30
    config.model.hidden_size = 8
    with pytest.raises(UserError) as error:
        restore(run, check(config))
    told = str(error.value)
    assert f"the state in {run}/checkpoints/30 does not match" in told
    assert "  params/Dense_0/kernel                     shape    float32[64,16] -> " in told
    assert "opt_state" not in told
    assert "allow" not in told


@pytest.mark.parametrize("lift", ["pmap", "shard_map", "vmap"])
def test_outputs_are_in_order_and_do_not_depend_on_devices(run, lift):
    trained = trained_model(run)
    source = trained.job.held_out
    everything = source[np.arange(len(source))]
    expected = apply(trained, everything["x"])
    for devices in (1, 8):
        lifted = make_lift(lift, mesh_of(devices))
        state = lifted.put_state(trained.state)
        found = predict_source(trained.job.task, state, source, lifted, 100, depth=devices % 2)
        assert list(found) == ["outputs", "y"]
        np.testing.assert_allclose(found["outputs"], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(found["y"], everything["y"])


@pytest.mark.slow
def test_predict_writes_a_file_of_numpys(launch, run, tmp_path):
    trained = trained_model(run, best=True)
    for devices, split in [(1, "eval"), (8, "eval"), (8, "train")]:
        source = trained.job.held_out if split == "eval" else trained.job.stream.source
        count, file = len(source), tmp_path / f"{split}.npz"
        code, out, err = launch(
            "predict",
            f"--workdir={run}",
            "--step=best",
            f"--split={split}",
            f"--out={file}",
            f"--fake_devices={devices}",
        )
        assert (code, err) == (0, "")
        told = f"wrote {file}: outputs float32[{count},10], y int32[{count}]"
        assert out.splitlines()[-1] == told
        everything = source[np.arange(count)]
        expected = apply(trained, everything["x"])
        with np.load(file) as found:
            np.testing.assert_allclose(found["outputs"], expected, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(found["y"], everything["y"])
    assert not list(tmp_path.glob(".*"))


class Several(nn.Module):
    """Two outputs with rows, one of them in bfloat16, and one without."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(3)(x.reshape(x.shape[0], -1))
        return {"logits": y, "half": y.astype(jnp.bfloat16), "aux": jnp.zeros(())}


def test_a_model_with_several_outputs(run, caplog):
    x = trained_model(run).job.held_out.arrays["x"][:7]
    trained = of_another_model(trained_model(run), Several(), x)
    lift = make_lift("pmap", mesh_of(4))
    state = lift.put_state(trained.state)
    with caplog.at_level("WARNING", "podlift"):
        logging.getLogger("podlift").addHandler(caplog.handler)
        found = predict_source(trained.job.task, state, trained.job.stream.source, lift, 4)
        logging.getLogger("podlift").removeHandler(caplog.handler)
    assert {name: (a.shape, str(a.dtype)) for name, a in found.items()} == {
        "outputs/half": ((7, 3), "float32"),
        "outputs/logits": ((7, 3), "float32"),
    }
    np.testing.assert_allclose(found["outputs/half"], found["outputs/logits"], rtol=1e-2)
    assert "left out, without an example axis: outputs/aux" in caplog.text


def test_a_file_is_whole_or_not_there(tmp_path):
    path = epath.Path(tmp_path / "file")
    with opened_whole(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), opened_whole(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


USE = """
import sys
import jax
import numpy as np

exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
x = np.load(sys.argv[2])
np.savez(sys.argv[3], *(np.asarray(exported.call(x[:count])) for count in (3, 7)))
assert exported.platforms == ("cpu", "cuda", "tpu")
for name in ("flax", "trainer", "launcher", "optax"):
    assert name not in sys.modules, name
"""


@needs_flatbuffers
def test_what_was_exported_needs_jax_only(launch, run, tmp_path):
    code, out, err = launch(
        "export", f"--workdir={run}", "--step=best", f"--out={tmp_path}/model.jax"
    )
    assert (code, err) == (0, "")
    assert "float32[b,8,8,1] -> float32[b,10] on cpu, cuda, tpu, " in out
    trained = trained_model(run, best=True)
    x = trained.job.held_out[np.arange(7)]["x"]
    np.save(tmp_path / "x.npy", x)
    files = [tmp_path / name for name in ("model.jax", "x.npy", "found.npz")]
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", f"import jax.export\n{USE}", *files],
        env={**environ, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        for array, count in zip(found.values(), (3, 7), strict=True):
            np.testing.assert_allclose(array, apply(trained, x[:count]), rtol=0, atol=1e-6)


@needs_flatbuffers
def test_exporting_needs_no_data(run, tmp_path):
    arguments = [f"--workdir={run}", "--config.data.target=nowhere:load"]
    assert export.main([*arguments, f"--out={tmp_path}/a"]) == 2
    example = ["--example=x=float32[8,8,1]", "--platforms=cpu", "--batch=5"]
    assert export.main([*arguments, f"--out={tmp_path}/a", *example]) == 0
    exported = jax.export.deserialize(bytearray((tmp_path / "a").read_bytes()))
    assert signature(exported) == "float32[5,8,8,1] -> float32[5,10]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (ResNet(10, features=4, stage_blocks=(1,)), np.ones((6, 8, 8, 1), np.float32)),
        (Transformer(32, 16, width=16, num_layers=1, num_heads=2), np.ones((6, 16), np.uint8)),
    ],
    ids=["convolutions", "attention"],
)
def test_models_that_take_any_number_of_examples(run, model, x):
    trained = of_another_model(trained_model(run), model, x)
    variables = {"params": trained.state.params, **trained.state.model_state}
    expected = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(export_model(trained).call(x), expected, rtol=0, atol=1e-6)


def of_another_model(trained, model, x):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params = variables.pop("params")
    task = dataclasses.replace(trained.job.task, model=model)
    stream = TrainStream(ArraySource({"x": x}), 1, 0)
    return dataclasses.replace(
        trained,
        job=dataclasses.replace(trained.job, task=task, stream=stream),
        state=dataclasses.replace(trained.state, params=params, model_state=variables),
    )


def test_several_outputs_are_shown_with_their_names(run):
    x = np.ones((2, 3), np.float32)
    exported = export_model(of_another_model(trained_model(run), Several(), x))
    assert signature(exported) == (
        "float32[b,3] -> aux float32[], half bfloat16[b,3], logits float32[b,3]"
    )
    assert set(exported.call(x)) == {"aux", "half", "logits"}


FUSSY = """
import flax.linen as nn
import jax

class Fussy(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = x.reshape(x.shape[0], -1)
        if not train and len(x) > 4:  # a mistake
            x = 2 * x
        return nn.Dense(10)(x)

class Reduces(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(10)(x.reshape(x.shape[0], -1))
        return x - jax.lax.pmean(x.mean(0), "batch")  # another
"""


@needs_flatbuffers
@pytest.mark.slow
def test_a_model_that_wants_to_know_how_many_examples_there_are(launch, tmp_path):
    (tmp_path / "mine.py").write_text(FUSSY)
    config = digits(2)
    config.model = {"target": "mine:Fussy"}
    environ = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    sys.path.insert(0, str(tmp_path))
    try:
        trainer.train(config, tmp_path / "run", mesh_of(1))
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("mine", None)
    export_it = ["export", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out"]
    code, _, err = launch(*export_it, environ=environ)
    assert code == 1
    assert err.startswith("error: the model cannot be exported for any number of examples on cpu")
    assert "mine.py:9, in __call__: if not train and len(x) > 4:  # a mistake" in err
    assert "--batch=N" in err
    assert len(err.splitlines()) == 3
    assert not (tmp_path / "out").exists()
    (tmp_path / "own.py").write_text(
        f"import runpy\nbase = runpy.run_path({str(ROOT / 'configs/digits.py')!r})\n"
        "def get_config():\n    config = base['get_config']()\n"
        "    config.model = {'target': 'mine:Reduces'}\n    return config\n"
    )
    code, _, err = launch(*export_it, f"--config={tmp_path}/own.py", environ=environ)
    assert code == 1
    assert '"batch")  # another' in err
    assert "must not need the other examples" in err
    code, out, err = launch(*export_it, "--batch=8", environ=environ)
    assert (code, err) == (0, "")
    assert "float32[8,8,8,1] -> float32[8,10]" in out


def test_a_model_that_is_too_large_is_refused_at_once(run, monkeypatch):
    monkeypatch.setattr("trainer.inference.export._MOST_BYTES", 1000)
    with pytest.raises(UserError, match="holds less than"):
        export_model(trained_model(run))


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


@pytest.mark.parametrize(("arguments", "told"), MISTAKES)
def test_what_a_person_got_wrong_is_told_without_jax(start, run, arguments, told):
    process = start(
        "launcher",
        *(argument.replace("RUN", str(run)) for argument in arguments),
        module="conftest_imports",
        environ={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert told in err
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
