"""The command line: what it prints, how it exits, and that it harms nothing."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import wait_for

from launcher.command_line import flags
from launcher.launch import environment
from launcher.processes.messages import how_to_resume
from trainer.config.keys import KEYS, flatten
from trainer.errors import UserError
from trainer.xla_flags import KEEP_NAN

MLP = "--config=configs/mlp.py"

WITHOUT_JAX = [
    (["--help"], 0, "Trains a Flax model"),
    ([MLP, "--print_config"], 0, "model.hidden_size"),
    ([], 2, "--config is missing"),
    (["--confg=x.py"], 2, "did you mean --config?"),
    (["reprot"], 2, "did you mean report?"),
    (["report", "configs"], 2, "configs is not the folder of a run"),
    (["report", "x", "--otu=y.html"], 2, "did you mean --out?"),
    ([MLP, "--worjdir=x"], 2, "did you mean --workdir?"),
    ([MLP, "surplus"], 2, "unexpected argument 'surplus'"),
    (["plna", MLP], 2, "did you mean the command plan?"),
    ([MLP, MLP], 2, "given twice"),
    (["--config=configs/mpl.py"], 2, "did you mean configs/mlp.py?"),
    (["--config=configs/digits.py:restnet"], 2, "there is no model 'restnet'"),
    ([MLP, "--config.num_epoch=3"], 2, "did you mean --config.num_epochs?"),
    ([MLP, "--config.state_sharding=fdsp"], 2, "is not one of replicated, zero1, fsdp"),
    ([MLP, "--config.hidden_size=3"], 2, "did you mean --config.model.hidden_size?"),
    (
        [MLP, "--config.optimizer.nesterov=True"],
        2,
        "set other keywords of its target in the config file",
    ),
    ([MLP, "--config.num_epochs=many"], 2, "error: --config.num_epochs=many: not an integer"),
    ([MLP, "--config.optimizer.learning_rate=fast"], 2, "learning_rate=fast: not a number"),
    ([MLP, "--config.data.shuffle=maybe"], 2, "shuffle=maybe: neither True nor False"),
    ([MLP, "--processes=two"], 2, "error: --processes=two: not an integer"),
    ([MLP, "--config.log_every_steps=0"], 2, "should be a whole number of at least 1"),
    (["--config=configs/mlp.py:foo"], 2, "takes no argument after the file"),
    (["--config=configs/from_json.py"], 2, "needs an argument"),
    (["--config=configs"], 2, "configs is a folder"),
    (["configs/mlp.py"], 2, "did you mean --config=configs/mlp.py?"),
    ([MLP, "--workdir=/proc/foo"], 2, "cannot be written"),
    ([MLP, "--config.lift=vmap:0"], 2, "vmap:8"),
    ([MLP, "--config.seed=-1"], 2, "config.seed=-1 is not in the range from 0 to 4294967295"),
    ([MLP, "--config.checkpoint.best_metric=eval/acc"], 2, "it can be eval/loss"),
    ([MLP, "--config.lift=pmpa"], 2, "is not one of pmap, shard_map, vmap"),
    ([MLP, "--config.seed=None"], 2, "config.seed=None should be of type int"),
    ([MLP, "--config.eval=None"], 2, "config.eval=None should be of type"),
    ([MLP, "--fake_devices=0"], 2, "fake_devices"),
    ([MLP, "--workdir=/dev/null/x"], 2, "/dev/null is a file"),
    ([MLP, "--workdir=configs"], 2, "is not empty and holds no podlift run"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), WITHOUT_JAX)
def test_answers_that_need_no_jax(start, arguments, code, text):
    """One clear answer, in half a second on a quiet machine, with no import of jax."""
    process = start(
        "launcher",
        *arguments,
        module="conftest_imports",
        environ={"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert text in (out if code == 0 else err)
    assert "Traceback" not in err
    if code == 2:
        lines = err.splitlines()
        assert lines[0].startswith("error: ")
        assert len(lines) <= 3
    assert "imported jax" not in err + out


WITH_JAX = [
    (["--config.model.target=trainer.models.mpl:MLP"], "did you mean 'trainer.models.mlp'?"),
    (["--config.model.target=trainer.models.mlp:MPL"], "did you mean 'MLP'?"),
    (["--config.model.target=MLP"], '"package.module:attribute"'),
    (["--config.model.target=nowhere.at_all:MLP"], "there is no module 'nowhere'"),
    (["--config.data.target=trainer.losses:squared_error"], "missing a required argument"),
    (["--config.global_batch_size=100"], "96 or 104"),
    (["--config.global_batch_size=256"], "more than the 128 training examples"),
]


@pytest.mark.parametrize(("arguments", "text"), WITH_JAX)
def test_errors_that_need_imports(launch, tmp_path, arguments, text):
    workdir = tmp_path / "run"
    arguments = [MLP, "--fake_devices=8", f"--workdir={workdir}", *arguments]
    code, _, err = launch(*arguments)
    assert code == 2, err
    assert text in err
    assert "Traceback" not in err
    assert not workdir.exists()


def test_a_wrong_keyword_in_a_file_is_named(launch, tmp_path):
    text = (ROOT / "configs/mlp.py").read_text().replace('"hidden_size"', '"hiden_size"')
    (tmp_path / "mine.py").write_text(text)
    code, _, err = launch(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert code == 2
    assert "config.model.hiden_size" in err
    assert "did you mean 'hidden_size'?" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(:\n", "SyntaxError"),
        ("x = 1\n", "defines no get_config"),
        ("def get_config():\n    return 1 / 0\n", "division by zero (line 2)"),
        ("def get_config():\n    return {'num_epoch': 3}\n", "did you mean config.num_epochs?"),
        ("def get_config():\n    return {'seed': 'x'}\n", "config.seed='x' should be of type int"),
        ("def get_config():\n    return {}\n", "config.model has no target"),
    ],
)
def test_a_config_file_with_a_mistake(tmp_path, text, expected):
    from trainer.config.settings import check

    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        check(flags.parse(["launcher", f"--config={path}"]).config)
    assert expected in str(error.value)


def test_overrides_reach_the_config_and_references_follow(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(size='8'):\n"
        "    c = ConfigDict({'global_batch_size': int(size), 'data': {'target': 'a:b'}})\n"
        "    c.num_steps = c.get_ref('global_batch_size') * 2\n"
        "    c.model = {'target': 'a:b', 'sizes': (1, 2)}\n"
        "    return c\n"
    )
    options = flags.parse(
        [
            "launcher",
            f"--config={path}:16",
            "--config.model.sizes=(3,)",
            "--config.stop_at_step=4",
            "--config.global_batch_size",
            "32",
            "--print_config",
        ],
        now=0.0,
    )
    assert options.print_config
    assert options.config.num_steps == 64
    assert options.config.model.sizes == (3,)
    assert options.config.stop_at_step == 4
    assert options.workdir.startswith(os.path.join("runs", "mine-16-19"))


def test_none_on_the_command_line_is_none(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    c = ConfigDict({'num_steps': 1, 'early_stop': {'patience': 3}, 'init_from': 'run'})\n"
        "    c.data = {'target': 'a:b', 'sizes': (1, 2), 'augment': {'target': 'a:b'}}\n"
        "    c.optimizer = {'target': 'a:b', 'mask': None, 'decay': 0.1}\n"
        "    c.checkpoint = {'every_steps': None}\n"
        "    return c\n"
    )
    optional = [key for key, (default, _) in KEYS.items() if isinstance(default, type)]
    own = ["data.sizes", "data.augment", "optimizer.mask", "optimizer.decay"]
    keys = [*optional, *own, "checkpoint.every_steps"]
    arguments = ["launcher", f"--config={path}", *(f"--config.{key}=None" for key in keys)]
    config = flags.parse([*arguments, "--noconfig.data.shuffle"]).config
    assert {key: value for key, value in flatten(config).items() if key in keys} == dict.fromkeys(
        keys
    )
    assert config.data.shuffle is False
    later = [
        "--config.checkpoint.every_steps=7",
        "--config.seed",
        "3",
        "--config.init_from",
        "None",
    ]
    config = flags.parse([*arguments, "--config.init_from=there", *later]).config
    assert (config.checkpoint.every_steps, config.seed, config.init_from) == (7, 3, None)


def test_environment_of_fake_devices(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": "--xla_something=1"}
    environment.prepare(environ, 8)
    assert environ["XLA_FLAGS"].split() == [
        "--xla_something=1",
        "--xla_force_host_platform_device_count=8",
        KEEP_NAN,
    ]
    assert environ["JAX_PLATFORMS"] == "cpu"
    assert int(environ["PJRT_NPROC"]) >= 16
    assert environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path))
    assert environ["PYTHONHASHSEED"] == "0"  # in every process and at every start

    asked = {
        "PYTHONHASHSEED": "7",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    environment.prepare(asked, None)
    assert int(asked["PJRT_NPROC"]) >= 8
    assert "JAX_PLATFORMS" not in asked
    assert asked["PYTHONHASHSEED"] == "7"
    with pytest.raises(UserError, match="asks for 4"):
        environment.prepare(asked, 8)


def test_the_flag_decides_and_not_jaxs_own_variable(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("podlift"), "propagate", True)
    environ = {"XDG_CACHE_HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "2"}
    assert environment.fake_device_count(environ) == 2
    environment.prepare(environ, None)
    assert int(environ["PJRT_NPROC"]) >= 4
    assert caplog.text == ""
    environment.prepare(environ, 3)
    assert environment.fake_device_count(environ) == 3
    assert "JAX_NUM_CPU_DEVICES=2 is ignored: --fake_devices=3" in caplog.text
    asks = "import jax; print(jax.device_count())"
    found = subprocess.run([sys.executable, "-c", asks], env=environ, capture_output=True)
    assert found.stdout == b"3\n", found.stderr


def test_xla_flags_alone_give_fake_devices(launch, tmp_path):
    code, out, err = launch(
        MLP,
        f"--workdir={tmp_path}/run",
        environ={"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"},
    )
    assert code == 0, err
    assert out.startswith("4 cpu devices, lift pmap, global batch 128 (32 a shard)")


def test_the_tutorial_prints_its_losses_and_a_summary(launch, tmp_path):
    code, out, err = launch(MLP, "--fake_devices=8", f"--workdir={tmp_path}/run")
    assert code == 0
    assert err == ""
    losses = [
        float(line.split(":")[1]) for line in out.splitlines() if line.startswith("Loss for epoch")
    ]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert f"tensorboard --logdir {tmp_path}/run" in out
    assert f"last checkpoint: {tmp_path}/run/checkpoints/5" in out
    log = (tmp_path / "run/logs/attempt-1/rank-0.log").read_text()
    assert "Loss for epoch 5" in log
    env = json.loads((tmp_path / "run/env.json").read_text())
    assert env["layout_version"] == 2
    assert env["devices"]["count"] == 8

    code, out, err = launch(MLP, "--fake_devices=8", f"--workdir={tmp_path}/run")
    assert code == 0
    assert "nothing to do: the run is at step 5, and the config stops it at 5" in out
    assert "--config.num_epochs=10" in out


def test_another_config_is_refused_with_a_diff(launch, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    assert launch(MLP, workdir, "--config.num_epochs=1")[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    started = time.monotonic()
    code, _, err = launch(MLP, workdir, "--config.seed=7", "--config.num_epochs=2")
    assert code == 2
    assert "  seed: 0 -> 7\n" in err
    assert "num_epochs" not in err
    assert time.monotonic() - started < 10
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_run_again_from_its_config_json(launch, tmp_path):
    code, out, _ = launch(MLP, f"--workdir={tmp_path}/a", "--config.num_epochs=2")
    assert code == 0
    again = f"--config=configs/from_json.py:{tmp_path}/a/config.json"
    code, same, err = launch(again, f"--workdir={tmp_path}/b")
    assert code == 0, err
    assert [line for line in same.splitlines() if "epoch 2" in line] == [
        line for line in out.splitlines() if "epoch 2" in line
    ]
    a, b = (json.loads((tmp_path / d / "config.json").read_text()) for d in "ab")
    assert a == b
    assert launch(again, "--config.num_steps=1", f"--workdir={tmp_path}/c")[0] == 0


def test_a_loss_that_is_not_a_number_ends_the_run(launch, tmp_path):
    code, _, err = launch(
        MLP,
        "--fake_devices=2",
        f"--workdir={tmp_path}/run",
        "--config.optimizer.learning_rate=1e30",
        "--config.num_epochs=50",
    )
    assert code == 1
    assert " not finite at step " in err
    assert "last good checkpoint: none yet" in err
    assert "--config.nan=skip" in err
    assert "Traceback" not in err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert rows[-1]["step"] == failure["step"] <= 5
    assert rows[-1]["train/loss"] is None or rows[-1]["train/grad_norm"] is None
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_two_runs_in_one_workdir(start, launch, tmp_path):
    workdir = f"--workdir={tmp_path}/run"
    first = start(MLP, workdir, "--config.num_epochs=1000000", "--config.log_every_steps=100000")
    wait_for(tmp_path / "run/config.json")
    code, _, err = launch(MLP, workdir, "--config.num_epochs=1000000")
    assert code == 2
    assert "is already training in" in err
    assert first.poll() is None


def test_a_traceback_for_a_fault_in_the_users_code(launch, tmp_path):
    (tmp_path / "mine.py").write_text("def loss(outputs, batch):\n    return outputs.no_such\n")
    (tmp_path / "run/logs/attempt-3").mkdir(parents=True)
    code, _, err = launch(
        MLP,
        f"--workdir={tmp_path}/run",
        "--config.loss.target=mine:loss",
        environ={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert code == 1
    assert "Traceback" in err
    assert "error: AttributeError on rank 0" in err
    failure = json.loads((tmp_path / "run/failure.json").read_text())
    assert (failure["exit_code"], failure["attempt"]) == (1, 4)
    assert "AttributeError" in Path(failure["log"]).read_text()
    # And once it is mended, the same command works in the same workdir.
    (tmp_path / "mine.py").write_text("from trainer.losses import squared_error as loss\n")
    code, _, err = launch(
        MLP,
        f"--workdir={tmp_path}/elsewhere/../run",
        "--config.loss.target=mine:loss",
        environ={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert code == 0, err
    assert not (tmp_path / "run/failure.json").exists()
    assert (tmp_path / "run/logs/attempt-5/rank-0.log").exists()


def test_the_installed_command_finds_packages_in_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from trainer.losses import squared_error as loss\n")
    code = "import sys; sys.path.remove(''); from launcher.__main__ import main; main()"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            f"--config={ROOT}/configs/mlp.py",
            "--config.loss.target=mine:loss",
            "--config.num_epochs=1",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs").iterdir())


def test_the_hint_after_a_failure_knows_of_in_memory_checkpoints(tmp_path):
    assert "starts at step 0; config.checkpoint.every_steps" in how_to_resume(str(tmp_path))
    in_memory = how_to_resume(str(tmp_path), in_memory=True)
    assert "from an in-memory checkpoint if one was saved" in in_memory
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    hint = f"HINT: the same command with --workdir={tmp_path} resumes from step 20"
    assert how_to_resume(str(tmp_path)) == how_to_resume(str(tmp_path), in_memory=True) == hint
