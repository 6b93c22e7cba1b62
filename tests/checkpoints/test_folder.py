"""Folders of checkpoints: single cases of saving, cleaning up, quarantine and expiry."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import sys

import pytest
from disk_faults import tree
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoints import leftovers, prepared, save, versions_of

from trainer.checkpoints import folder as folder_module
from trainer.checkpoints import manifest
from trainer.checkpoints.folder import CheckpointFolder, expired
from trainer.checkpoints.manifest import Damaged, Manifest
from trainer.errors import FolderMoved
from trainer.workdir.identity import Identity


def test_a_complete_save_takes_the_place_of_a_damaged_one(tmp_path):
    """The run reached the step again, and was killed before it could exchange the two."""
    folder = prepared(tmp_path / "run", (5, 10))
    save(CheckpointFolder(epath.Path(tmp_path / "other"), 9), 10, 2)
    shutil.copytree(tmp_path / "other/10", tmp_path / "run/.saving-10")
    (tmp_path / "run/10/c").write_text("damaged")
    folder.sweep()
    assert versions_of(folder) == {5: 1, 10: 2}
    assert leftovers(folder) == []


def test_a_save_of_another_step_is_not_completed(tmp_path):
    folder = prepared(tmp_path / "run", (5,))
    shutil.copytree(tmp_path / "run/5", tmp_path / "run/.saving-6")
    assert folder.sweep() == [".saving-6"]
    assert versions_of(folder) == {5: 1}


def test_what_cannot_be_removed_does_not_stop_a_run(tmp_path, monkeypatch):
    """On NFS a folder stays while another machine has a file of it open."""
    folder = prepared(tmp_path / "run", (5,))
    shutil.copytree(tmp_path / "run/5", tmp_path / "run/.removed-3")
    (tmp_path / "run/.saving-6").mkdir()
    monkeypatch.setattr(folder_module.shutil, "rmtree", lambda *args, **kwargs: None)
    assert folder.sweep() == []
    assert versions_of(folder) == {5: 1}


def test_files_of_others_stay(tmp_path):
    """Also where their names are nearly those of steps; none counts as a step."""
    names = {"notes.txt", "5.bak", "-5", "5.0", "\N{ARABIC-INDIC DIGIT FIVE}", "007"}
    folder = prepared(tmp_path / "run", (5,), keep=1)
    for name in (*names, ".saving-", ".saving-x"):
        (tmp_path / "run" / name).mkdir()
    assert folder.steps() == [5]
    folder.sweep()
    save(folder, 6, 1)
    assert versions_of(folder) == {6: 1}
    assert names <= set(tree(tmp_path / "run"))


def test_two_steps_of_one_number_are_quarantined_within_one_second(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module.time, "strftime", lambda form: "20250101T000000")
    folder = prepared(tmp_path / "run", ())
    moved = []
    for version in (1, 2, 3):
        save(folder, 5, version)
        moved.append(folder.quarantine(5, "").name)
    assert moved == ["5-20250101T000000", "5-20250101T000000-2", "5-20250101T000000-3"]
    assert folder.has_history()
    assert folder.steps() == []
    assert folder.newest_known() == 5


def test_a_folder_that_is_not_there_is_empty(tmp_path):
    folder = CheckpointFolder(epath.Path(tmp_path / "none"), 1)
    assert (folder.steps(), folder.sweep(), folder.newest_known()) == ([], [], None)
    assert not folder.has_history()
    assert not (tmp_path / "none").exists()
    with pytest.raises(Damaged):
        folder.check(5)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"step": null}', '{"step": []}', "\xff"])
def test_a_damaged_note_of_the_newest_is_no_note(tmp_path, text):
    folder = prepared(tmp_path / "run", (5,))
    (tmp_path / ".run.json").write_text(text, encoding="latin-1")
    assert folder.newest_known() is None
    assert folder.has_history()
    save(folder, 6, 1)
    assert folder.newest_known() == 6


@given(st.sets(st.integers(0, 20), max_size=8), st.integers(0, 20), st.integers(1, 5))
def test_only_the_newest_do_not_expire(others, newest, keep):
    steps = sorted(others | {newest})
    gone = expired(steps, keep, newest)
    kept = [step for step in steps if step not in gone]
    assert set(gone) <= set(steps)
    assert newest in kept
    assert len(kept) == min(keep, len(steps))
    assert all(old < step for old in gone for step in kept if step != newest)
    assert expired(kept, keep, newest) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_data_that_the_disk_has_not_taken_is_a_failed_save(tmp_path, monkeypatch, number):
    folder = prepared(tmp_path / "checkpoints", (5,))

    def fsync(descriptor):
        # Only files that others have written: the manifest is synced where it is written.
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "fsync", fsync)
        with pytest.raises(OSError, match=os.strerror(number)):
            save(folder, 10, 1)
    assert versions_of(folder) == {5: 1}
    assert leftovers(folder) == []


def test_a_file_system_that_cannot_sync_folders_takes_saves(tmp_path, monkeypatch):
    fsync = os.fsync

    def fsync_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(folder_module.os, "fsync", fsync_files)
    assert versions_of(prepared(tmp_path / "checkpoints", (5,))) == {5: 1}


def test_what_a_failed_save_could_not_remove_goes_with_the_next(tmp_path, monkeypatch):
    folder = prepared(tmp_path / "checkpoints", (5,))
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(OSError, match="No space"):
            save(folder, 10, 1, fails_at=1)
    assert leftovers(folder) == [".saving-10"]
    save(folder, 15, 1)
    assert leftovers(folder) == []
    assert versions_of(folder) == {5: 1, 15: 1}


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_that_is_replaced_during_a_save_gets_no_checkpoint(tmp_path, number):
    """Before the first file, and before the checkpoint gets its name."""
    calls = []

    def check():
        calls.append(1)
        if len(calls) == number:
            raise FolderMoved("the folder is elsewhere")

    folder = CheckpointFolder(epath.Path(tmp_path / "checkpoints"), 9, check)
    with pytest.raises(FolderMoved):
        save(folder, 10, 1)
    assert folder.steps() == []
    assert not folder.path.exists() or leftovers(folder) == []


def test_a_save_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch):
    """It may be complete, and then it is the newest state of the run."""
    folder = prepared(tmp_path / "checkpoints", (5,))
    save(CheckpointFolder(epath.Path(tmp_path / "other"), 9), 10, 1)
    shutil.copytree(tmp_path / "other/10", tmp_path / "checkpoints/.saving-10")

    def fail(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(manifest.hashlib, "file_digest", fail)
        with pytest.raises(OSError, match="Input/output"):
            folder.sweep()
    assert folder.sweep() == [".saving-10 (completed)"]
    assert versions_of(folder) == {5: 1, 10: 1}


@pytest.mark.skipif(sys.platform != "linux", reason="paths through an open folder are Linux's")
def test_a_save_goes_to_the_folder_it_began_in_whatever_has_its_name_now(tmp_path):
    run, renamed = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "renamed")
    run.mkdir()
    identity = Identity(run)
    folder = CheckpointFolder(run / "checkpoints", 2, reach=identity.reach)
    for step in (5, 10):
        save(folder, step, 1)

    def write(place):
        run.rename(renamed)
        run.mkdir()
        (place / "c").write_bytes(b"content")

    folder.save(15, write, lambda files: Manifest(15, {}, {}, files))
    identity.close()
    assert list(run.iterdir()) == []
    moved = CheckpointFolder(renamed / "checkpoints", 2)
    assert moved.steps() == [10, 15]
    assert moved.newest_known() == 15
    assert leftovers(moved) == []
