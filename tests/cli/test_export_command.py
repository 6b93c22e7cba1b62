"""`python -m launcher export`: programs that need only jax."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, mesh_of, skip_here
from finished_runs import Several, apply, finished_run, of_another_model, trained_model
from runs import digits

import trainer
from launcher.cli import export
from trainer.errors import UserError
from trainer.inference.export import export_model, signature
from trainer.models.resnet import ResNet
from trainer.models.transformer import Transformer

try:
    import flatbuffers  # noqa: F401 (which jax.export needs)
except ImportError:
    needs_flatbuffers = skip_here("flatbuffers is not installed")
else:
    needs_flatbuffers = skip_here("")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    yield from finished_run(tmp_path_factory.mktemp("finished"))


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
            np.testing.assert_allclose(array, apply(trained, x[:count]), rtol=1e-6, atol=1e-6)


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
    np.testing.assert_allclose(export_model(trained).call(x), expected, rtol=1e-6, atol=1e-6)


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
    export_it = ["export", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out", "--trust"]
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
