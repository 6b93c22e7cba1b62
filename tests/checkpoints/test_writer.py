"""A save that fails is reported, retried, and replaced by a newer one; never forgotten."""

from __future__ import annotations

import threading

import pytest
from etils import epath
from fake_disk import Disk, is_alive, wait_until, writers
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import LONG, Warnings

from trainer.checkpoints.folder import CheckpointFolder
from trainer.checkpoints.writer import Save, Writer
from trainer.errors import SavesFailed


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


def test_saves_are_done_in_order_and_finish_waits_for_them(make, saves):
    disk = Disk()
    writer = make(disk, patience=LONG)
    assert writer.last_saved is None
    for step in range(1, 6):
        writer.submit(saves(step))
        writer.submit(saves(step, "best"))
    writer.finish()
    assert disk.done == [(name, step) for step in range(1, 6) for name in ("latest", "best")]
    assert writer.last_saved == 5
    writer.finish()
    writer.submit(saves(6))
    writer.finish()
    assert writer.last_saved == 6


def test_finish_waits_for_a_disk_that_hangs(make, saves):
    disk = Disk()
    disk.hang()
    writer = make(disk)
    writer.submit(saves(1))
    finisher = threading.Thread(target=writer.finish)
    finisher.start()
    wait_until(writer, lambda: writer._is_finishing)
    assert finisher.is_alive()
    assert disk.done == []
    disk.is_open.set()
    finisher.join(LONG)
    assert disk.done == [("latest", 1)]


def test_a_save_that_fails_is_reported_at_once_and_retried(make, saves, warnings):
    disk = Disk({1: 2})
    writer = make(disk, pauses=(0.001, 0.002))
    writer.submit(saves(1))
    writer.finish()
    assert disk.done == [("latest", 1)]
    assert warnings.lines[0].startswith(
        "warning: step 1 could not be saved: try 1 of step 1 failed ("
    )
    assert warnings.lines[0].endswith("; retrying in 0.001 s")
    assert warnings.lines[1].endswith("; retrying in 0.002 s")
    assert "step 1 is saved after all" in warnings.lines[2]
    assert len(warnings.lines) == 3
    assert writer.last_saved == 1


def test_too_many_in_a_row_end_the_run(make, saves, warnings):
    disk = Disk(dict.fromkeys(range(2, 9), -1))
    writer = make(disk, max_failures=2)
    writer.submit(saves(1))
    writer.finish()
    writer.submit(saves(2))
    assert warnings.wait_for("step 2 was not saved").endswith(
        "; the last good checkpoint is step 1 (1 of 2 failures in a row)"
    )
    writer.check()
    writer.submit(saves(3))
    warnings.wait_for("(2 of 2 failures in a row)")
    expected = r"^2 saves in a row failed, the last with: try 7 .*; the last good .* is step 1$"
    for call in (writer.check, writer.finish, lambda: writer.submit(saves(4))):
        with pytest.raises(SavesFailed, match=expected):
            call()


def test_one_failure_may_be_too_many(make, saves, warnings):
    writer = make(Disk({1: -1}), max_failures=1)
    writer.submit(saves(1))
    warnings.wait_for("was not saved")
    expected = "^1 save in a row failed, .*; this run has no good checkpoint$"
    with pytest.raises(SavesFailed, match=expected):
        writer.check()


def test_the_step_that_was_restored_is_the_last_good_one(make, saves, warnings):
    writer = make(Disk({30: -1}), max_failures=1)
    writer.last_saved = 20
    writer.submit(saves(30))
    assert "checkpoint is step 20 (1 of 1" in warnings.wait_for("was not saved")
    with pytest.raises(SavesFailed, match=r"the last good checkpoint is step 20$"):
        writer.check()


def test_a_success_forgives_what_was_before(make, saves, warnings):
    disk = Disk(dict.fromkeys(range(1, 10, 2), -1))
    writer = make(disk, max_failures=2, patience=LONG)
    for step in range(1, 10):
        writer.submit(saves(step))
        if step % 2:
            warnings.wait_for(f"step {step} was not saved")
        else:
            disk.wait_for(step)
    writer.submit(saves(10))
    writer.finish()
    assert [step for _, step in disk.done] == [2, 4, 6, 8, 10]
    assert warnings.count("(1 of 2 failures in a row)") == 5


# Newer states


def test_a_newer_one_replaces_one_that_fails(make, saves, warnings):
    disk = Disk({1: -1})
    disk.hang()
    writer = make(disk)
    writer.submit(saves(1))
    disk.wait_for(1)
    writer.submit(saves(2))
    disk.is_open.set()
    writer.finish()
    assert disk.tried == [("latest", 1), ("latest", 2)]
    assert warnings.lines[0].endswith("(1 of 3 failures in a row)")
    assert len(warnings.lines) == 1


def test_a_newer_one_need_not_wait_for_a_pause(make, saves, warnings):
    disk = Disk({1: -1})
    writer = make(disk, pauses=(1000.0,))
    writer.submit(saves(1))
    warnings.wait_for("retrying in 1000 s")
    writer.submit(saves(2))
    writer.finish()
    assert disk.done == [("latest", 2)]


def test_a_disk_that_hangs_counts_as_one_that_fails(make, saves, warnings):
    disk = Disk()
    disk.hang()
    writer = make(disk, max_failures=3)
    writer.submit(saves(1))
    disk.wait_for(1)
    writer.submit(saves(2))
    for step in (3, 4):
        writer.submit(saves(step))
        assert warnings.lines[-1] == (
            f"warning: step {step - 1} was not saved: the disk is still busy with step 1 "
            f"({step - 2} of 3 failures in a row)"
        )
    with pytest.raises(
        SavesFailed, match=r"still busy with step 1; this run has no good checkpoint"
    ):
        writer.submit(saves(5))
    disk.is_open.set()
    writer.close()
    assert disk.done == [("latest", 1), ("latest", 5)]


def test_with_patience_every_state_is_saved(make, saves, warnings):
    disk = Disk()
    disk.hang()
    writer = make(disk, patience=LONG)
    writer.submit(saves(1))
    disk.wait_for(1)
    writer.submit(saves(2))
    opener = threading.Thread(target=disk.is_open.set)
    opener.start()
    writer.submit(saves(3))
    opener.join()
    writer.finish()
    assert disk.done == [("latest", 1), ("latest", 2), ("latest", 3)]
    assert warnings.lines == []


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["latest", "best", "x"]), max_size=12))
def test_of_each_folder_the_newest_waits_in_its_turn(names):
    folders = {name: CheckpointFolder(epath.Path(f"/none/{name}"), 1) for name in {*names, "x"}}
    disk = Disk()
    disk.hang()
    writer = Writer(1000, disk, (0.0,), 0.0)
    writer.submit(Save(folders["x"], 0, {}, {}, {}))
    disk.wait_for(0)
    expected = []
    for step, name in enumerate(names, 1):
        writer.submit(Save(folders[name], step, {}, {}, {}))
        expected = [other for other in expected if other[0] != name] + [(name, step)]
    disk.is_open.set()
    writer.finish()
    writer.close()
    assert disk.done == [("x", 0), *expected]
    assert not is_alive(writer)
