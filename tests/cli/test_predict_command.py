"""`python -m launcher predict`: outputs for every example, in order."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from conftest import mesh_of
from etils import epath
from finished_runs import Several, apply, finished_run, of_another_model, trained_model

from trainer.inference.predict import predict_source
from trainer.lift.lift import make_lift
from trainer.workdir.paths import opened_whole


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    yield from finished_run(tmp_path_factory.mktemp("finished"))


@pytest.mark.parametrize("lift", ["pmap", "shard_map", "vmap"])
def test_outputs_are_in_order_and_do_not_depend_on_devices(run, lift):
    trained = trained_model(run)
    source = trained.job.held_out
    everything = source[np.arange(len(source))]
    expected = apply(trained, everything["x"])
    # Logits of up to ten: kernels for other batch sizes sum in another order, so a few ulp differ.
    for devices in (1, 8):
        lifted = make_lift(lift, mesh_of(devices))
        state = lifted.put_state(trained.state)
        found = predict_source(trained.job.task, state, source, lifted, 100, depth=devices % 2)
        assert list(found) == ["outputs", "y"]
        np.testing.assert_allclose(found["outputs"], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(found["y"], everything["y"])


@pytest.mark.slow
def test_predict_writes_a_numpy_file(launch, run, tmp_path):
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
        line = f"wrote {file}: outputs float32[{count},10], y int32[{count}]"
        assert out.splitlines()[-1] == line
        everything = source[np.arange(count)]
        expected = apply(trained, everything["x"])
        with np.load(file) as found:
            np.testing.assert_allclose(found["outputs"], expected, rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(found["y"], everything["y"])
    assert not list(tmp_path.glob(".*"))


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


def test_a_file_is_complete_or_absent(tmp_path):
    path = epath.Path(tmp_path / "file")
    with opened_whole(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), opened_whole(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
