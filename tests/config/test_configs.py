"""Every config resolves to what is written down here, and trains."""

from __future__ import annotations

import math
import re

import jax.numpy as jnp
import optax
import pytest
from conftest import ROOT, mesh_of
from runs import config_of

import trainer
from launcher.command_line import flags
from trainer.config.settings import check
from trainer.errors import UserError
from trainer.losses import squared_error
from trainer.models.mlp import PlainMLP
from trainer.step.init import init_state
from trainer.step.job import build_job
from trainer.step.task import Task

GOLDEN = ROOT / "tests" / "golden"
VARIANTS = [
    "mlp",
    "bias_adder",
    "bias_adder:ones",
    "digits",
    "digits:resnet",
    "fashion_mnist",
    "char_lm",
    "image_folder",
    "imagenet_resnet50",
    "imagenet_resnet50:folder",
    "imagenet_resnet50:array_record",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_resolved_config_equals_its_golden_file(variant):
    """To change a golden file on purpose: --print_config into tests/golden/<config>.txt."""
    name, _, argument = variant.partition(":")
    spec = f"--config={ROOT}/configs/{name}.py" + (f":{argument}" if argument else "")
    options = flags.parse(["launcher", spec])
    expected = (GOLDEN / f"{variant.replace(':', '-')}.txt").read_text()
    assert flags.format_config(options.config) == expected


def test_configs_are_data_and_import_no_jax():
    for path in (ROOT / "configs").glob("*.py"):
        imports = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.M)
        reader = {"trainer"} if path.name == "from_json.py" else set()  # of the workdir's format
        assert set(imports) <= {"ml_collections", "typing"} | reader, path


def test_a_docstring_gives_command_time_and_result():
    for name in {variant.partition(":")[0] for variant in VARIANTS}:
        text = (ROOT / f"configs/{name}.py").read_text()
        docstring = text.split('"""')[1]
        assert "python -m launcher --config=configs/" in docstring, name
        assert re.search(r"\d+ (s|seconds|minutes)\b", docstring), name


@pytest.mark.parametrize("data", ["linear", "ones"])
def test_the_bias_adder_learns_on_several_devices(tmp_path, capsys, data):
    devices = 3 if data == "ones" else 8
    trainer.train(config_of("bias_adder", data), tmp_path, mesh_of(devices))
    printed = capsys.readouterr()
    assert "each device computes batch_stats/mean from its own examples" in printed.err
    losses = [float(x) for x in re.findall(r"Loss for epoch \d+: (\S+)", printed.out)]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)


@pytest.mark.wide
def test_char_lm_learns(tmp_path):
    config = config_of("char_lm", num_steps=30, log_every_steps=10, global_batch_size=16)
    config.model.width, config.model.num_layers, config.data.length = 32, 1, 32
    config.eval = {"every_steps": 1000}
    metrics = trainer.train(config, tmp_path, mesh_of(2)).metrics
    assert metrics["eval/loss"] < 3.6  # 4.56 is a uniform guess among 96 characters
    assert metrics["eval/bits_per_char"] == pytest.approx(metrics["eval/loss"] / math.log(2))


@pytest.mark.slow
def test_digits_mlp_reaches_its_accuracy(launch, tmp_path):
    code, out, err = launch(
        "--config=configs/digits.py", "--fake_devices=8", f"--workdir={tmp_path}/r"
    )
    assert code == 0, err
    assert last_accuracy(out) >= 0.975


@pytest.mark.slow
def test_digits_resnet_reaches_its_accuracy(launch, tmp_path):
    code, out, err = launch(
        "--config=configs/digits.py:resnet", "--fake_devices=8", f"--workdir={tmp_path}/r"
    )
    assert code == 0, err
    assert last_accuracy(out) >= 0.99


@pytest.mark.slow
def test_fashion_mnist_reaches_its_accuracy_in_a_short_run(launch, tmp_path):
    """A tenth of the data, one epoch, on two devices: real files, real images."""
    code, out, err = launch(
        "--config=configs/fashion_mnist.py",
        "--fake_devices=2",
        f"--workdir={tmp_path}/r",
        "--config.data.num_train=12000",
        "--config.num_epochs=2",
    )
    assert code == 0, err
    assert last_accuracy(out) >= 0.78


def test_fashion_mnist_says_how_to_get_its_files(launch, tmp_path):
    code, _, err = launch(
        "--config=configs/fashion_mnist.py",
        f"--workdir={tmp_path}/r",
        f"--config.data.directory={tmp_path}",
    )
    assert code == 2
    assert "holds no train-images-idx3-ubyte.gz" in err
    assert "apt-get install dataset-fashion-mnist" in err
    assert not (tmp_path / "r").exists()


def last_accuracy(out):
    return float(re.findall(r"eval/accuracy (\S+)", out.split("finished")[0])[-1])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", 2**32, "config.seed=4294967296 is not in the range .*would take it for 0"),
        ("seed", 2**40 + 5, "would take it for 5"),
        ("data.seed", -1, "config.data.seed=-1 is not in the range"),
        ("data.split_seed", 2**32, "config.data.split_seed=4294967296 is not"),
        ("num_steps", 2**31, "config.num_steps=2147483648 should be at most 2147483647"),
        ("stop_at_step", 2**31, "config.stop_at_step=2147483648 should be at most"),
    ],
)
def test_numbers_that_jax_would_cut_to_32_bits_are_refused(key, value, expected):
    config = config_of("digits")
    block = config.data if key.startswith("data.") else config
    block[key.rpartition(".")[2]] = value
    with pytest.raises(UserError, match=re.compile(expected, re.DOTALL)):
        check(config)


def test_seeds_of_code_that_is_not_podlifts_are_its_own():
    config = config_of("digits")
    config.data = {"target": "mine.data:load", "split_seed": 2**40}
    check(config)


def test_seeds_of_32_bits_are_all_different():
    task = Task(PlainMLP((1,), 1), squared_error, optax.sgd(0.1))
    keys = [init_state(task, seed, jnp.zeros(3)).rng for seed in (0, 5, 2**32 - 1, 2**31)]
    assert len({tuple(map(int, key)) for key in keys}) == 4
    with pytest.raises(UserError, match="would take it for 5"):
        init_state(task, 2**32 + 5, jnp.zeros(3))
    config = config_of("digits")
    config.num_epochs = 2**31
    with pytest.raises(UserError, match="num_epochs=2147483648 should be at most 2147483647"):
        check(config)
    config.num_epochs = 2**30
    with pytest.raises(UserError, match="are 23622320128 steps, more than"):
        build_job(check(config))
