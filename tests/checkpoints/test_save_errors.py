"""How the error of a save is described."""

from __future__ import annotations

import contextlib
import os
import subprocess
import types

import numpy as np
import pytest
from etils import epath
from fake_disk import Disk, writers
from messages import Warnings

from trainer.checkpoints import writer as writer_module
from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.writer import Save


@pytest.fixture
def warnings():
    with Warnings() as handler:
        yield handler


@pytest.fixture
def make():
    with writers() as make_writer:
        yield make_writer


@pytest.fixture
def folders(tmp_path):
    return {
        name: CheckpointFolder(epath.Path(tmp_path / name), 1) for name in ("latest", "best", "x")
    }


@pytest.fixture
def saves(folders):
    """Makes a save of a step, to the folder "latest" if no other is named."""
    return lambda step, folder="latest": Save(folders[folder], step, {}, {}, {})


@pytest.fixture
def free(monkeypatch):
    """A disk with 1.5 MB free."""
    usage = types.SimpleNamespace(free=1_500_000)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)


def full_device():
    with open("/dev/full", "w") as file:
        file.write("x")


def reason_of(folder, error):
    arrays = {"a": np.zeros(500_000, np.float32), "b": np.zeros((), np.int32)}
    return writer_module._reason(Save(folder, 1, arrays, {}, {}), error)


def test_a_full_disk_is_reported_with_the_bytes_needed_and_free(folders, free):
    with pytest.raises(OSError, match="No space") as full:
        full_device()
    expected = "No space left on device (needs about 2.0 MB, 1.5 MB free)"
    assert reason_of(folders["latest"], full.value) == expected
    full.value.filename = "/a/file"
    assert reason_of(folders["latest"], full.value).startswith("No space left on device: /a/file (")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("first line\nsecond", "first line"),
        (f"RESOURCE {'x' * 400}\n [28: No space left on device]\n", "No space left on device"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
        ("x" * 5000, "x" * 300),
    ],
)
def test_other_errors_are_reported_in_one_line(folders, free, text, expected):
    reason = reason_of(folders["latest"], ValueError(text))
    assert reason == f"{expected} (needs about 2.0 MB, 1.5 MB free)"


def test_free_space_of_an_object_store_is_unknown():
    folder = CheckpointFolder(epath.Path("gs://bucket/run"), 1)
    assert reason_of(folder, ValueError("no")) == "no"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "denied")])
def test_a_disk_without_free_space_figures_does_not_end_the_thread(
    make, saves, warnings, monkeypatch, error
):
    def fail(path):
        raise error

    monkeypatch.setattr(writer_module.shutil, "disk_usage", fail)
    disk = Disk({1: 1})
    writer = make(disk)
    writer.submit(saves(1))
    assert "try 1 of step 1 failed" in warnings.wait_for("step 1 could not be saved")
    writer.finish()
    assert disk.done == [("latest", 1)]


@pytest.fixture
def few_files(tmp_path):
    """A file system that holds at most 20 files."""
    mounted = tmp_path / "few"
    mounted.mkdir()
    options = ["-t", "tmpfs", "-o", "size=16m,nr_inodes=20", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("needs root, to mount a file system")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True)


def test_a_file_system_without_inodes_is_reported_as_such(few_files):
    folder = CheckpointFolder(epath.Path(few_files / "checkpoints"), 3)

    def write(place):
        for number in range(30):
            (place / str(number)).write_bytes(b"x")

    with pytest.raises(OSError, match="No space left") as full:
        folder.save(5, write, lambda files: None)
    assert list(folder.path.iterdir()) == []
    for number in range(30):
        with contextlib.suppress(OSError):
            (few_files / str(number)).touch()
    reason = reason_of(folder, full.value)
    assert reason.startswith("no inodes are left: the file system holds 20 files, its limit (needs")
