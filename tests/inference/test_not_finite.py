"""NaN is noticed wherever it arises: in params, in model state, in activations, on every path.

The model ends like a ResNet, in a relu and a mean over space, which XLA:CPU makes 0 of NaN unless
XLA_FLAGS says otherwise (`trainer.xla_flags`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, mesh_of, wide
from etils import epath
from ml_collections import ConfigDict

import trainer
from launcher.cli import evaluate as eval_command
from launcher.cli import export as export_command
from launcher.cli import predict as predict_command
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.writer import Save
from trainer.data.stream import ArraySource
from trainer.lift.lift import make_lift
from trainer.lift.replicas import check_replicas
from trainer.state.checksums import checksum_of
from trainer.state.finite import find_unusable
from trainer.xla_flags import KEEP_NAN, keep_nan

LIFTS = ["pmap", "shard_map", wide("vmap")]


class Ends(nn.Module):
    """A convolution, a relu and a mean. `ghost` is a parameter that no loss depends on."""

    ghost: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        self.param("ghost", lambda _: jnp.full((3,), self.ghost))
        self.variable("extremes", "highest", lambda: jnp.full((), -jnp.inf))
        x = nn.Conv(64, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)
        return nn.Dense(10)(nn.relu(x).mean(axis=(1, 2)))


def data(bad_train=(), bad_eval=()):
    """64 images each, of 8 x 8 pixels; some hold one NaN."""
    sources = {}
    normal = np.random.default_rng(0).normal
    for split, bad in (("train", bad_train), ("eval", bad_eval)):
        x = np.float32(normal(size=(64, 8, 8, 1)))
        x[list(bad), 2, 3] = np.nan
        sources[split] = ArraySource({"x": x, "y": np.arange(64) % 10})
    return sources


def config(**changes):
    here = "test_not_finite"
    made = ConfigDict(
        {
            "num_steps": 3,
            "log_every_steps": 1,
            "global_batch_size": 64,
            "model": {"target": f"{here}:Ends", **changes.pop("model", {})},
            "loss": {"target": "trainer.losses:softmax_cross_entropy"},
            "metrics": {"accuracy": {"target": "trainer.metrics:accuracy"}},
            "data": {"target": f"{here}:data", "shuffle": False, **changes.pop("data", {})},
            "optimizer": {"target": "optax:sgd", "learning_rate": 0.1},
        }
    )
    made.update(changes)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose held-out data has a NaN in two of 64 images: it says so, and goes on."""
    workdir = tmp_path_factory.mktemp("finite") / "run"
    trainer.train(config(data={"bad_eval": (5, 40)}), workdir, mesh_of(2))
    return workdir


@pytest.mark.parametrize("lift", LIFTS)
def test_activations_in_evaluation_and_prediction(run, lift, capsys):
    made = config(data={"bad_eval": (5, 40)}, lift=lift)
    metrics = trainer.evaluate(run, config=made, mesh=mesh_of(2))
    assert np.isnan(metrics["eval/loss"])
    assert np.isfinite(metrics["eval/accuracy"])  # the reason why the count is printed
    told = capsys.readouterr().err
    assert "warning: the model's outputs hold a NaN for 2 of 64 held-out examples" in told
    outputs = trainer.predict(run, config=made, mesh=mesh_of(2))["outputs"]
    assert np.flatnonzero(np.isnan(outputs).all(axis=1)).tolist() == [5, 40]
    told = capsys.readouterr().err
    assert "outputs hold a NaN for 2 of 64 examples; the first is 5, counted from 0" in told


@pytest.mark.parametrize("lift", LIFTS)
def test_activations_in_training_and_its_evaluations(tmp_path, lift, capsys):
    trainer.train(config(data={"bad_eval": [9]}, lift=lift), tmp_path / "eval", mesh_of(2))
    told = capsys.readouterr().err
    assert "warning: the model's outputs hold a NaN for 1 of 64 held-out examples" in told
    assert not (tmp_path / "eval/best").exists()
    with pytest.raises(trainer.NonFiniteLoss, match="loss and grad_norm are not finite at step 1"):
        trainer.train(config(data={"bad_train": [7]}, lift=lift), tmp_path / "run", mesh_of(2))


@pytest.mark.parametrize("lift", LIFTS)
def test_params_in_training_that_show_in_neither_loss_nor_gradient(tmp_path, lift):
    with pytest.raises(trainer.NonFiniteState, match="params/ghost not finite after step 1"):
        trainer.train(config(model={"ghost": np.nan}, lift=lift), tmp_path / "run", mesh_of(2))
    assert not (tmp_path / "run/checkpoints").exists()


def poisoned(run, folder, name, value):
    """A copy of a run whose newest state has a value in one leaf, with right checksums."""
    shutil.copytree(run, folder)
    checkpoints = CheckpointFolder(epath.Path(folder / "checkpoints"), 3)
    with checkpoints.opened(3) as (_, listed):
        meta = listed.meta
    arrays = {n: np.array(a) for n, a in trainer_leaves(folder).items()}
    arrays[name].flat[-1] = value
    sums = {n: checksum_of(array) for n, array in arrays.items()}
    Save(checkpoints, 3, arrays, sums, meta).run()
    return folder


def trainer_leaves(folder):
    from trainer.checkpoints.load import read_saved

    return read_saved(folder).leaves


REFUSED = [
    ("params/Conv_0/kernel", np.nan, "1 of 576"),
    ("params/Conv_0/kernel", np.inf, "1 of 576"),
    ("model_state/batch_stats/BatchNorm_0/var", np.inf, "1 of 64"),
    ("model_state/extremes/highest", np.nan, "1 of 1"),
]


@pytest.mark.parametrize(("name", "value", "count"), REFUSED)
def test_a_state_that_is_not_finite_is_refused(run, tmp_path, name, value, count, capsys):
    bad = poisoned(run, tmp_path / "bad", name, value)
    told = f"{name} in {bad}/checkpoints/3 is not finite, in {count} elements"
    assert np.array_equal(trainer_leaves(bad)[name].flat[-1], value, equal_nan=True)
    for use in (trainer.evaluate, trainer.predict):
        with pytest.raises(trainer.CheckpointsUnreadable, match=told):
            use(bad, trust=True)
    if not name.endswith("kernel"):
        return
    for command, *more in (
        (eval_command,),
        (predict_command, f"--out={tmp_path}/o.npz"),
        (export_command, f"--out={tmp_path}/o.jax", "--platforms=cpu"),
    ):
        assert command.main([f"--workdir={bad}", "--trust", *more]) == 2
        assert f"error: {told}" in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))
    with pytest.raises(trainer.CheckpointsUnreadable, match=told):
        trainer.train(config(init_from=str(bad)), tmp_path / "new", mesh_of(2))
    with pytest.raises(trainer.CheckpointsUnreadable, match=f"3: {name} holds a NaN or an infin"):
        trainer.train(config(num_steps=4, data={"bad_eval": (5, 40)}), bad, mesh_of(2))


def test_infinities_that_a_model_means_are_kept(run):
    """A running extreme begins at -inf, in a collection of its own."""
    leaves = trainer_leaves(run)
    assert leaves["model_state/extremes/highest"] == -np.inf
    assert find_unusable(leaves) == {}


def test_finiteness_on_the_devices_is_that_in_host_memory(run):
    lift = make_lift("pmap", mesh_of(2))
    for name, value, _ in REFUSED:
        leaves = {n: np.array(a) for n, a in trainer_leaves(run).items()}
        leaves[name].flat[-1] = value
        assert list(find_unusable(leaves)) == [name]
        assert check_replicas(lift, lift.put_state(leaves)).unusable == [name]


def test_the_flag_is_added_where_xla_knows_it_and_nobody_has_set_it():
    own = "--xla_cpu_experimental_ynn_fusion_type="
    for given, expected in (
        ("", KEEP_NAN),
        ("--xla_a=1", f"--xla_a=1 {KEEP_NAN}"),
        (own, own),
        ("flags.txt", "flags.txt"),  # XLA reads the flags from that file
    ):
        environ = {"XLA_FLAGS": given, "JAX_PLATFORMS": "cpu"}
        keep_nan(environ)
        assert environ["XLA_FLAGS"] == expected


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
{first}
from trainer.lift.lift import make_lift
make_lift("pmap")
x = np.full((64, 64), np.nan, np.float32)
print(jax.jit(lambda x: jnp.maximum(x, 0).sum())(x))
print(jax.jit(lambda x: (jax.nn.relu(x @ x) @ x).sum())(x))
"""


@pytest.mark.parametrize("is_late", [False, True])
def test_a_notebook_keeps_nan_or_is_warned(is_late):
    program = PROGRAM.format(first="jnp.zeros(1).block_until_ready()" if is_late else "")
    environ = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    is_lost = done.stdout != "nan\nnan\n"
    assert is_late or not is_lost, done.stdout + done.stderr
    assert ("warning: jax drops NaN on this CPU" in done.stderr) == is_lost
