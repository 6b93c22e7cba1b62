"""Whatever the files of a run's folder hold, each command answers with one line."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from conftest import mesh_of
from runs import digits

import trainer
from launcher.cli import evaluate, export, predict, report
from launcher.planning.cache import PlanCache
from trainer.checkpoints import init_from
from trainer.config.config_json import config_from_json
from trainer.config.json_text import parse_object
from trainer.errors import UserError
from trainer.workdir import json_object

ODD = {
    "null": b"null",
    "a list": b"[]",
    "a string": b'"text"',
    "a number": b"7",
    "empty": b"",
    "deep": b'{"a":' * 100_000,
    "deep and whole": b'{"a":' * 400 + b"1" + b"}" * 400,
    "not UTF-8": b'{"layout_version": "\xff"}',
    "a key twice": b'{"layout_version": 2, "layout_version": 2}',
    "a long number": b'{"layout_version": ' + b"9" * 5000 + b"}",
    "other kinds": b'{"layout_version": [], "model": 3, "run_id": {}, "__none_types__": 1}',
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("text", [t for name, t in ODD.items() if name != "deep and whole"])
def test_anything_else_than_an_object_is_a_value_error(text):
    if text == ODD["other kinds"]:
        assert isinstance(parse_object(text), dict)
        return
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_object(text)


@pytest.mark.parametrize("text", ODD.values())
def test_a_config_is_read_or_refused(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        config_from_json(text)


def test_files_that_are_no_files_and_files_without_end_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for a writer
    with pytest.raises(ValueError, match="not a regular file"):
        json_object.read_bytes(json_object.epath.Path(tmp_path / "pipe"))
    with pytest.raises(ValueError, match="is a folder"):
        json_object.read_bytes(json_object.epath.Path(tmp_path))
    monkeypatch.setattr(json_object, "_MAX_BYTES", 1 << 20)
    (tmp_path / "huge").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(ValueError, match="larger than 1 MiB"):
        json_object.read_object(json_object.epath.Path(tmp_path / "huge"))


@pytest.mark.parametrize("text", ODD.values())
def test_an_odd_plan_is_no_plan(tmp_path, text):
    (tmp_path / "k.json").write_bytes(text)
    found = PlanCache(tmp_path).get("k")
    assert found is None or isinstance(found, dict)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer.train(digits(2), folder, mesh_of(2))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def answers(run, capsys):
    """What every command that reads a folder says: its name, exit code and stderr."""
    commands = {
        "eval": (evaluate, []),
        "predict": (predict, [f"--out={run.parent}/out.npz"]),
        "export": (export, [f"--out={run.parent}/out"]),
    }
    capsys.readouterr()
    for name, (module, flags) in commands.items():
        yield name, module.main([f"--workdir={run}", *flags]), capsys.readouterr().err
    yield "report", report.main([str(run), f"--out={run.parent}/r.html"]), capsys.readouterr().err
    for name, use in {
        "train": lambda: trainer.train(digits(2), run, mesh_of(2)),
        "load": lambda: trainer.load(run),
        "init_from": lambda: init_from.read(str(run)),
    }.items():
        try:
            use()
            yield name, 0, ""
        except UserError as error:
            yield name, 2, f"error: {error}\n"


def check(run, capsys, name, but=()):
    """Every command but some refuses the folder, in a line that names a file."""
    for command, code, said in answers(run, capsys):
        assert "Traceback" not in said
        assert len([line for line in said.splitlines() if line.startswith("error: ")]) == (code > 0)
        if command not in but:
            assert code == 2, (command, said)
            assert name in said.splitlines()[0], (command, said)


@pytest.mark.parametrize("content", ["null", "deep", "not UTF-8", "other kinds"])
@pytest.mark.parametrize("name", ["config.json", "env.json"])
def test_odd_json_is_refused_by_name(run, capsys, name, content):
    (run / name).write_bytes(ODD[content])
    # A report leaves out what it cannot read; the state alone needs no config.
    check(run, capsys, name, but=["report", "load", "init_from"])


@pytest.mark.parametrize("name", ["config.json", "env.json", "checkpoints/2"])
def test_a_folder_in_place_of_a_file_and_the_other_way_round(run, capsys, name):
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("x")
    else:
        path.unlink()
        path.mkdir()
    check(run, capsys, name.rpartition("/")[0] or name, but=["report", "load", "init_from"])


@pytest.mark.parametrize("name", ["checkpoints", "best", "logs", "metrics.jsonl"])
def test_training_refuses_what_stands_in_its_way(run, name):
    path = run / name
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    if name == "metrics.jsonl":
        path.mkdir()
    else:
        path.write_text("x")
    with pytest.raises(UserError, match=f"{path} is a f"):
        trainer.train(digits(2), run, mesh_of(2))


@pytest.mark.parametrize("name", [".checkpoints.json", ".lock", "failure.json"])
@pytest.mark.parametrize("content", [ODD["null"], ODD["deep"], ODD["binary"]])
def test_odd_notes_are_no_notes(run, name, content):
    (run / name).write_bytes(content)
    trainer.train(digits(2), run, mesh_of(2))  # nothing to do
    assert report.main([str(run), f"--out={run.parent}/r.html"]) == 0


def test_an_odd_manifest_is_damage(run, capsys):
    path = run / "checkpoints/2/manifest.json"
    for content in (b"null", b'{"body": []}', ODD["deep"], json.dumps({"body": {}}).encode()):
        path.write_bytes(content)
        check(run, capsys, "checkpoints", but=["report"])
