"""A workdir in an object store: what a run needs of `epath`, and whole runs."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from etils import epath
from object_store import BUCKET, object_store  # noqa: F401 (a fixture)
from runs import read_tensorboard

from launcher.cli.report import main as make_page
from trainer.errors import FolderMoved
from trainer.metrics_writer.writer import MetricsWriter
from trainer.workdir.identity import Identity
from trainer.workdir.paths import local_folder
from trainer.workdir.workdir import Workdir

pytest.importorskip("gcsfs")


@pytest.fixture
def folder(object_store):  # noqa: F811
    return epath.Path(f"gs://{BUCKET}/run")


def test_files_and_folders(folder):
    assert not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "checkpoints/10/d/0").write_bytes(b"\0\n\r\n--==0==\n")
    (folder / "checkpoints/10/empty").write_bytes(b"")
    assert (folder / "checkpoints").is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json"]
    assert [path.name for path in folder.glob("checkpoints/*/d/*")] == ["0"]
    assert (folder / "checkpoints/10/d/0").read_bytes() == b"\0\n\r\n--==0==\n"
    assert (folder / "checkpoints/10/empty").read_bytes() == b""
    assert (folder / "config.json").stat().length == 2
    (folder / "config.json").rename(folder / "other.json")
    assert not (folder / "config.json").exists()
    (folder / "checkpoints").rmtree()
    assert [path.name for path in folder.iterdir()] == ["other.json"]


# aiohttp would rather have a file than bytes; gcsfs gives it bytes.
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_large_files_go_up_in_parts_and_listings_come_in_pages(folder, object_store):  # noqa: F811
    content = bytes(range(256)) * 60_000
    (folder / "large").write_bytes(content)
    assert (folder / "large").read_bytes() == content
    for number in range(1005):
        object_store.put(f"{BUCKET}/run/many/{number}", b"")
    assert len(list((folder / "many").iterdir())) == 1005


def test_what_another_process_writes_is_seen(folder, object_store):  # noqa: F811
    (folder / "first").write_bytes(b"1")
    assert [path.name for path in folder.iterdir()] == ["first"]
    object_store.put(f"{BUCKET}/run/second", b"22")
    object_store.put(f"{BUCKET}/run/first", b"longer")
    assert (folder / "second").exists()
    assert (folder / "first").read_bytes() == b"longer"


def test_failures_are_raised(folder, object_store):  # noqa: F811
    with pytest.raises(FileNotFoundError):
        (folder / "missing").read_bytes()
    object_store.put(f"{BUCKET}/run/there", b"x")
    object_store.refuse = lambda method, path: 403
    there = folder / "there"
    for use in (there.exists, there.read_bytes, lambda: there.write_bytes(b"y")):
        with pytest.raises(OSError, match="Forbidden"):
            use()


def test_a_passing_failure_is_waited_out(folder, object_store):  # noqa: F811
    answers = iter([503])
    object_store.refuse = lambda method, path: next(answers, None)
    (folder / "file").write_bytes(b"x")
    assert object_store.objects == {f"{BUCKET}/run/file": b"x"}
    assert len(object_store.requests) == 3  # refused, begun, sent


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_metrics_are_written_to_an_object_store(folder, object_store, tmp_path):  # noqa: F811
    from configs.mlp import get_config

    report = MetricsWriter(Workdir.check(folder, get_config()), 0)
    report.scalars(1, {"train/loss": 2.0})
    report.flush()
    before = len(object_store.requests)
    report.scalars(2, {"train/loss": 1.0})
    report.close()
    assert len(object_store.requests) - before < 10
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])["step"] == 2
    written = object_store.objects.pop(f"{BUCKET}/run/metrics.jsonl")
    assert report.restore(2)
    assert object_store.objects[f"{BUCKET}/run/metrics.jsonl"] == written
    (events,) = folder.glob("events.out.tfevents.*")
    (tmp_path / events.name).write_bytes(events.read_bytes())
    scalars, _ = read_tensorboard(tmp_path)
    assert scalars == {("train/loss", 1): 2.0, ("train/loss", 2): 1.0}


def test_a_folder_is_the_run_that_its_env_json_names(folder, object_store):  # noqa: F811
    object_store.put(f"{BUCKET}/run/env.json", b'{"run_id": "a"}')
    identity = Identity(folder, "a")
    identity.check()
    object_store.put(f"{BUCKET}/run/env.json", b'{"run_id": "b"}')
    with pytest.raises(FolderMoved, match="gone, or another run's"):
        identity.check()
    del object_store.objects[f"{BUCKET}/run/env.json"]
    with pytest.raises(FolderMoved, match="gone, or another run's"):
        identity.check()
    object_store.refuse = lambda method, path: 403
    identity.check()  # unknown: the save will say so


@pytest.mark.slow
def test_a_run(launch, object_store):  # noqa: F811
    run = f"gs://{BUCKET}/run"
    arguments = ("--config=configs/mlp.py", f"--workdir={run}", "--fake_devices=2")
    code, out, err = launch(*arguments, "--config.num_steps=4")
    assert code == 0, out + err
    names = object_store.names(run)
    assert {"config.json", "env.json", "metrics.jsonl"} <= set(names)
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert any(name.startswith("checkpoints/4/") for name in names)
    code, out, err = launch(*arguments, "--config.num_steps=6")
    assert code == 0, out + err
    rows = object_store.objects[f"{BUCKET}/run/metrics.jsonl"].decode().splitlines()
    assert [json.loads(row)["step"] for row in rows][-1] == 6
    assert any(name.startswith("checkpoints/6/") for name in object_store.names(run))
    # One that is on its way there has no manifest yet.
    object_store.put(f"{BUCKET}/run/checkpoints/7/state/d/0", b"x")
    before = object_store.names(run)
    out_file = f"gs://{BUCKET}/outputs.npz"
    code, out, err = launch(
        "predict", f"--workdir={run}", "--split=train", f"--out={out_file}", "--fake_devices=2"
    )
    assert code == 0, out + err
    assert "restored step 6 from " in out
    with np.load(io.BytesIO(object_store.objects[f"{BUCKET}/outputs.npz"])) as found:
        assert found["outputs"].shape == (128, 1)
    assert object_store.names(run) == before


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
def test_a_page_of_runs(folder, object_store, tmp_path, capsys):  # noqa: F811
    object_store.put(f"{BUCKET}/run/metrics.jsonl", b'{"step": 3, "train/loss": 0.5}\n{"step"')
    object_store.put(f"{BUCKET}/run/config.json", b'{"num_steps": 3}')
    place = f"gs://{BUCKET}/run"
    log = local_folder(place, str(tmp_path)) / "logs/attempt-1/rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("2026-01-01 00:00:00 finished: 3 steps in 0:00:09\n")
    options = [f"--local_dir={tmp_path}", f"--out=gs://{BUCKET}/r.html"]
    assert make_page([place, *options]) == 0
    page = object_store.objects[f"{BUCKET}/r.html"].decode()
    assert "0:00:09" in page
    assert "train/loss" in page
    assert capsys.readouterr().out == f"run: finished, 3 steps\nwrote gs://{BUCKET}/r.html\n"
    assert make_page([f"gs://{BUCKET}/rum", *options]) == 2
    assert f"did you mean gs://{BUCKET}/run?" in capsys.readouterr().err
    object_store.refuse = lambda method, path: 403
    assert make_page([place, *options]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
