"""No row of metrics.jsonl vanishes without a word."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil

import pytest
from conftest import mesh_of, wide
from runs import digits, without_speed

import trainer
from trainer.checkpoints.manifest import Manifest
from trainer.metrics_writer import metrics_file, run_log


def config():
    made = digits(20)
    made.checkpoint.every_steps = 10
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Rows at 5, 10, 15 and 20, and one evaluation at 20; those from 10 on are saved twice."""
    workdir = tmp_path_factory.mktemp("rows") / "run"
    trainer.train(config(), workdir, mesh_of(2))
    return workdir


def first_gone(lines):
    return b"".join(lines[1:])


DAMAGES = {
    "emptied": lambda lines: b"",
    "missing": lambda lines: None,
    "binary": lambda lines: bytes(range(256)) * 8,
    "first row gone": first_gone,
    "a digit changed": lambda lines: b"".join(lines).replace(b"0.", b"1.", 1),
    "cut short": lambda lines: b"".join(lines)[: -len(lines[-1]) - 9],
    "a line of another": lambda lines: b"".join([*lines[:2], b"# mine\n", *lines[2:]]),
}
MAIN = ("emptied", "binary", "cut short")


@pytest.mark.parametrize("name", [*MAIN, *(wide(n) for n in DAMAGES if n not in MAIN)])
def test_damage_is_told_put_aside_and_repaired(run, tmp_path, name, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "metrics.jsonl"
    before = path.read_bytes()
    damaged = DAMAGES[name](before.splitlines(keepends=True))
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    trainer.train(config(), copy, mesh_of(2))
    told = capsys.readouterr().err
    left = path.read_bytes()
    assert f"warning: {path} is " in told
    if name in ("cut short", "a line of another"):
        assert left == before
        assert "every row up to step 20 is there again" in told
    else:
        wanted = json.loads(before.splitlines()[1])
        assert wanted in map(json.loads, left.splitlines())
    aside = copy / "metrics.jsonl.damaged-1"
    if name in ("emptied", "missing", "cut short"):
        assert not aside.exists()
    else:
        assert aside.read_bytes() == damaged
        assert str(aside) in told
    trainer.train(config(), copy, mesh_of(2))
    again = capsys.readouterr().err
    assert ("warning" in again) == (left != before)  # rows are still lacking, and it says so


class FullDisk:
    """The module `os`, on a disk that takes no rows."""

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_without_its_rows_is_no_success_and_the_next_start_writes_them(
    run, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(metrics_file, "os", FullDisk())
        patched.setattr(run_log, "_PAUSES", (0.0,))
        with pytest.raises(trainer.SavesFailed, match="lacks rows that could not be written; they"):
            trainer.train(config(), workdir, mesh_of(2))
    assert not (workdir / "metrics.jsonl").exists()
    trainer.train(config(), workdir, mesh_of(2))
    assert "metrics.jsonl is gone or empty: every row up to step 20" in capsys.readouterr().err
    assert without_speed(workdir / "metrics.jsonl") == without_speed(run / "metrics.jsonl")


def test_a_run_of_an_earlier_version_resumes(run, tmp_path, capsys):
    """Its checkpoints say nothing of the file."""
    copy = shutil.copytree(run, tmp_path / "run")
    manifest = copy / "checkpoints/20/manifest.json"
    listed = Manifest.from_text(manifest.read_text())
    meta = {k: v for k, v in listed.meta.items() if k not in ("rows", "metrics_file")}
    manifest.write_text(dataclasses.replace(listed, meta=meta).to_text())
    trainer.train(config(), copy, mesh_of(2))
    assert capsys.readouterr().err == ""
    with (copy / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    trainer.train(config(), copy, mesh_of(2))
    assert "is damaged: 5 rows up to step 20 are left" in capsys.readouterr().err
    assert (copy / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
