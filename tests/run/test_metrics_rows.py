"""No row of metrics.jsonl vanishes without a word."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil

import pytest
from conftest import mesh_of, wide
from runs import digits, without_speed

import trainer
from trainer.checkpoints.manifest import Manifest
from trainer.metrics_writer import metrics_file, restored_rows, run_log
from trainer.metrics_writer.writer import MetricsWriter
from trainer.workdir.workdir import Workdir


def config(**changes):
    made = digits(20, **changes)
    made.checkpoint.every_steps = 10
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Rows at 5, 10, 15 and 20, evaluations at 10 and 20; the checkpoint has those from 10 on."""
    workdir = tmp_path_factory.mktemp("rows") / "run"
    for stop in (10, 20):
        trainer.train(config(stop_at_step=stop), workdir, mesh_of(2))
    return workdir


def flipped(number):
    def damage(lines):
        changed = lines[number].replace(b"0.", b"1.", 1)
        return b"".join([*lines[:number], changed, *lines[number + 1 :]])

    return damage


# What is done to the lines, what is said, and whether the file is put aside.
DAMAGES = {
    "emptied": (lambda lines: b"", "gone or empty: 5 of 6 rows", False),
    "missing": (lambda lines: None, "gone or empty: 5 of 6 rows", False),
    "binary": (lambda lines: bytes(range(256)) * 8, "damaged: 5 of 6 rows", True),
    "cut short": (lambda lines: b"".join(lines)[: -len(lines[-1]) - 9], "too short: every", False),
    "another line": (
        lambda lines: b"".join([*lines[:2], b"# mine\n", *lines[2:]]),
        "damaged: every row is there again",
        True,
    ),
    "a digit of the last": (flipped(5), "damaged: every", True),
    "a digit of the first": (flipped(0), "damaged: 6 of 6 rows are left, not", False),
    "the first gone": (lambda lines: b"".join(lines[1:]), "damaged: 5 of 6 rows", False),
}
MAIN = ("emptied", "binary", "cut short")


@pytest.mark.parametrize("name", [*MAIN, *(wide(n) for n in DAMAGES if n not in MAIN)])
def test_damage_is_told_put_aside_and_repaired(run, tmp_path, name, capsys):
    damage, said, is_put_aside = DAMAGES[name]
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    damaged = damage(before)
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    trainer.train(config(), copy, mesh_of(2))
    told = capsys.readouterr().err
    state, what = said.split(": ")
    assert f"warning: {path} is {state}, compared with the checkpoint of step 20: {what}" in told
    left = path.read_bytes().splitlines(keepends=True)
    assert left[-5:] == before[-5:]
    assert left == before or "every" not in said
    aside = copy / "metrics.jsonl.damaged-1"
    assert (str(aside) in told) == aside.exists() == is_put_aside
    assert not is_put_aside or aside.read_bytes() == damaged
    trainer.train(config(), copy, mesh_of(2))
    again = capsys.readouterr().err
    assert ("warning" in again) == (left != before)  # a row is still lacking
    assert not (copy / "metrics.jsonl.damaged-2").exists()


def test_a_writer_adds_the_rows_that_the_file_lacks_and_encodes_no_row_twice(tmp_path, monkeypatch):
    workdir = Workdir.check(tmp_path, config())
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "b": 1.0, "a": null}\n')
    lines = ['{"step": 2, "a": null, "b": 1.0}\n', '{"step": 2, "eval/loss": 3.0}\n']
    writer = MetricsWriter(workdir, 2, lines)
    assert path.read_text().splitlines()[2:] == [lines[1].rstrip()]
    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", None)
        meta = writer.for_checkpoint(None)
    written = path.read_bytes()
    digest = hashlib.sha256(written).hexdigest()
    assert meta["metrics_file"] == {"rows": 3, "bytes": len(written), "sha256": digest}
    assert meta["rows"] == [line.rstrip() for line in lines]
    assert writer.for_checkpoint(3)["rows"] == []
    writer.close()


# What is done to the file after step 15, and what is said of it.
CHANGES = {
    "removed": (lambda path: path.unlink(), "gone or empty"),
    "emptied": (lambda path: path.write_bytes(b""), "damaged"),
    "replaced": (lambda path: (path.unlink(), path.write_bytes(b"mine\n")), "damaged"),
}


@pytest.mark.parametrize("name", ["removed", "emptied", wide("replaced")])
def test_a_file_that_is_changed_during_the_run_has_every_row_at_its_end(
    run, tmp_path, name, monkeypatch, capsys
):
    """Also the rows of an earlier start, which no checkpoint has any more."""
    change, state = CHANGES[name]
    workdir, path = tmp_path / "run", tmp_path / "run/metrics.jsonl"
    trainer.train(config(stop_at_step=10), workdir, mesh_of(2))
    row = run_log.RunLog.row

    def row_and_change(self, log_row, skipped):
        row(self, log_row, skipped)
        if log_row.step == 15:
            change(path)

    monkeypatch.setattr(run_log.RunLog, "row", row_and_change)
    trainer.train(config(), workdir, mesh_of(2))
    told = capsys.readouterr().err
    assert f"{path} is {state}, compared with the checkpoint of step 20: every row is" in told
    assert without_speed(path) == without_speed(run / "metrics.jsonl")
    assert (workdir / "metrics.jsonl.damaged-1").exists() == (state == "damaged")


def test_a_removed_file_that_cannot_be_restored_is_no_success(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run/metrics.jsonl"

    def refuse(restored, text):
        raise OSError(errno.EROFS, "Read-only file system")

    evaluation = run_log.RunLog.evaluation
    monkeypatch.setattr(
        run_log.RunLog, "evaluation", lambda *a: (evaluation(*a), path.unlink(missing_ok=True))
    )
    monkeypatch.setattr(restored_rows, "write_whole", refuse)
    monkeypatch.setattr(run_log, "_PAUSES", (0.0,))
    with pytest.raises(trainer.SavesFailed, match="lacks rows that could not be written"):
        trainer.train(config(stop_at_step=10), tmp_path / "run", mesh_of(2))
    assert "it cannot be restored, " in capsys.readouterr().err


class FullDisk:
    """The module `os`, on a disk that takes no rows."""

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_without_its_rows_is_no_success_and_the_next_start_writes_them(
    tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(metrics_file, "os", FullDisk())
        patched.setattr(run_log, "_PAUSES", (0.0,))
        with pytest.raises(trainer.SavesFailed, match="lacks rows that could not be written; they"):
            trainer.train(config(), workdir, mesh_of(2))
    assert not (workdir / "metrics.jsonl").exists()
    trainer.train(config(), workdir, mesh_of(2))
    assert "compared with the checkpoint of step 20: every row is there" in capsys.readouterr().err
    steps = [row["step"] for row in without_speed(workdir / "metrics.jsonl")]
    assert steps == [5, 10, 15, 20, 20]


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
    assert (
        "is damaged, compared with the checkpoint of step 20: 6 rows are left"
        in capsys.readouterr().err
    )
    assert (copy / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
