"""In-memory checkpoints: how much memory and time they take, and folders they do not touch."""

from __future__ import annotations

import os
import tempfile
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from disk_faults import faults, full_disk, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_checkpoints import Clock, Inline, arrays_of, in_memory_at, save, steps_here
from messages import Warnings

from trainer.checkpoints import in_memory


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(in_memory, "threading", types.SimpleNamespace(Thread=Inline))


@pytest.fixture
def warnings():
    with Warnings() as handler:
        yield handler.lines


# How much of the memory


def test_a_state_that_does_not_fit_is_reported_once(tmp_path, warnings):
    arrays = {"a": np.zeros(1000, np.uint8)}
    checkpoints = in_memory_at(tmp_path / "shm", max_bytes=1999, clock=(clock := Clock()))
    clock.now += 10
    assert checkpoints.is_due
    save(checkpoints, 1, arrays)
    assert len(warnings) == 1
    assert (
        "two states of 1e-06 GB do not fit into 2e-06 GB, the smaller of config.checkpoint"
        in warnings[0]
    )
    clock.now += 1e9
    assert not checkpoints.is_due
    assert tree(tmp_path / "shm") == {}
    checkpoints.remove()
    fits = in_memory_at(tmp_path / "shm", max_bytes=2000)
    save(fits, 1, arrays)
    assert set(fits.steps("r")) == {1}
    assert len(warnings) == 1


@pytest.mark.parametrize("part", [2.1, 3.9, 4.1, 4.9, 5.1])
def test_what_fits_at_first_keeps_fitting(tmp_path, warnings, monkeypatch, part):
    """The memory that the checkpoints themselves take does not count against them."""
    arrays = {"a": np.zeros(1000, np.uint8)}
    checkpoints = in_memory_at(tmp_path / "shm")

    def disk_usage(path):
        taken = sum(file.stat().st_size for file in path.rglob("state.bin"))
        return types.SimpleNamespace(free=part * 1000 - taken)

    monkeypatch.setattr(in_memory.shutil, "disk_usage", disk_usage)
    save(checkpoints, 1, arrays)
    begun = set(checkpoints.steps("r"))
    assert begun == ({1} if part > 4 else set())
    if begun:
        for step in (2, 3, 4):
            save(checkpoints, step, arrays)
        assert warnings == []
        assert set(checkpoints.steps("r")) == {3, 4}


def test_removing_frees_all_memory(tmp_path):
    mine, theirs = (in_memory_at(tmp_path / "shm", workdir=f"/runs/{name}") for name in ("a", "b"))
    for step in (1, 2, 3):
        save(mine, step)
        save(theirs, step)
    before = tree(theirs.folder)
    mine.remove()
    assert not mine.folder.exists()
    assert tree(theirs.folder) == before
    theirs.remove()
    assert tree(tmp_path / "shm") == {}
    theirs.remove()
    save(mine, 4)
    assert set(steps_here(mine)) == {4}


# Folders that are not this user's


def belong_to_another(checkpoints, monkeypatch):
    number = os.getuid() + 1
    checkpoints.folder.parent.rename(checkpoints.folder.parent.with_name(f"podlift-{number}"))
    monkeypatch.setattr(os, "getuid", lambda: number)


def be_open_to_the_group(checkpoints, monkeypatch):
    checkpoints.folder.parent.chmod(0o770)


def be_open_to_all(checkpoints, monkeypatch):
    checkpoints.folder.parent.chmod(0o707)


def be_a_link(checkpoints, monkeypatch):
    elsewhere = checkpoints.folder.parent.with_name("elsewhere")
    checkpoints.folder.parent.rename(elsewhere)
    checkpoints.folder.parent.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "make", [belong_to_another, be_open_to_the_group, be_open_to_all, be_a_link]
)
def test_a_folder_others_may_write_to_is_not_touched(tmp_path, warnings, monkeypatch, make):
    checkpoints = in_memory_at(tmp_path / "shm")
    save(checkpoints, 1)
    assert set(checkpoints.steps("r")) == {1}
    make(checkpoints, monkeypatch)
    before = tree(tmp_path / "shm")
    assert any("state.bin" in name for name in before) or make is be_a_link
    clock = Clock()
    again = in_memory_at(tmp_path / "shm", clock=clock)
    assert again.folder.exists()
    assert again.steps("r") == {}
    save(again, 2)
    clock.now += 1e9
    assert not again.is_due
    assert len(warnings) == 1
    assert "is not this user's alone" in warnings[0]
    again.remove()
    assert tree(tmp_path / "shm") == before
    assert (again.folder / "0/state.bin").exists()


def test_folders_are_made_for_this_user_alone(tmp_path):
    checkpoints = in_memory_at(tmp_path / "shm")
    save(checkpoints, 1)
    assert checkpoints.folder.parent.stat().st_mode & 0o077 == 0
    assert (checkpoints.folder / "workdir").read_text() == "/runs/mine\n"


# Disks that fail


def test_an_error_at_any_moment_turns_saving_off_and_raises_nothing(tmp_path, inline, warnings):
    at = off = 0
    while True:
        at += 1
        warnings.clear()
        clock = Clock()
        checkpoints = in_memory_at(tmp_path / f"{at}", clock=clock)
        with faults(at, full_disk()) as state:
            save(checkpoints, 1)
        clock.now += 1e9
        if not state.came:
            break
        assert checkpoints.is_due == (not warnings)
        if warnings:
            off += 1
            assert len(warnings) == 1
            assert warnings[0].endswith("cannot be written: No space left on device")
            assert tree(tmp_path / f"{at}") == {}
        else:
            assert set(steps_here(checkpoints)) == {1}
    assert off > 5


@pytest.mark.parametrize("what", ["a file", "gone"])
def test_a_folder_that_is_not_usable_turns_saving_off(tmp_path, warnings, what):
    clock = Clock()
    checkpoints = in_memory_at(tmp_path / "shm", clock=clock)
    if what == "a file":
        checkpoints.folder.parent.write_text("in the way")
    else:
        (tmp_path / "shm").rmdir()
    assert checkpoints.steps("r") == {}
    save(checkpoints, 1)
    clock.now += 1e9
    assert not checkpoints.is_due
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: no more in-memory checkpoints: ")
    checkpoints.remove()
    if what == "a file":
        assert checkpoints.folder.parent.read_text() == "in the way"


# How often


@pytest.mark.parametrize(
    ("blocked", "writing", "pause"),
    [
        (0.0, 0.0, 10.0),
        (0.09, 0.49, 10.0),
        (0.5, 0.0, 50.0),  # 1 %
        (0.0, 2.0, 40.0),  # 5 %
        (0.5, 2.0, 50.0),
        (0.5, 4.0, 80.0),
    ],
)
def test_saves_take_a_small_fraction_of_the_time(
    tmp_path, inline, monkeypatch, blocked, writing, pause
):
    clock = Clock()
    write = in_memory._write_arrays

    def slowly(*args):
        clock.now += writing
        return write(*args)

    monkeypatch.setattr(in_memory, "_write_arrays", slowly)
    checkpoints = in_memory_at(tmp_path / "shm", every_secs=10.0, clock=clock)
    assert not checkpoints.is_due
    clock.now += 9.99
    assert not checkpoints.is_due
    clock.now += 0.01
    for step in (1, 2, 3):
        assert checkpoints.is_due
        began = clock.now
        save(checkpoints, step, blocked=blocked)
        clock.now = began + pause - 0.01
        assert not checkpoints.is_due, f"after save {step}"
        clock.now = began + pause + 0.001


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), min_size=2, max_size=6))
def test_the_fractions_hold_whatever_saves_take(costs):
    clock = Clock()
    writing = 0.0

    def write_arrays(path, arrays):
        clock.now += writing
        return write(path, arrays)

    write = in_memory._write_arrays
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "_write_arrays", write_arrays)
        patch.setattr(in_memory, "threading", types.SimpleNamespace(Thread=Inline))
        checkpoints = in_memory_at(Path(name), every_secs=1.0, clock=clock)
        began = clock.now
        spent_blocked = spent_writing = 0.0
        for blocked, writing in costs:
            while not checkpoints.is_due:
                clock.now += 0.5
            elapsed = clock.now - began
            assert spent_blocked <= 0.01 * elapsed + 1e-6
            assert spent_writing <= 0.05 * elapsed + 1e-6
            clock.now += blocked
            save(checkpoints, 1, {"a": np.zeros(1)}, blocked=blocked)
            spent_blocked += blocked
            spent_writing += writing


def test_none_is_due_while_one_is_written(tmp_path, monkeypatch):
    begun, may_finish = threading.Event(), threading.Event()
    write = in_memory._write_arrays

    def wait(*args):
        begun.set()
        assert may_finish.wait(30)
        return write(*args)

    monkeypatch.setattr(in_memory, "_write_arrays", wait)
    clock = Clock()
    checkpoints = in_memory_at(tmp_path / "shm", clock=clock)
    checkpoints.save(1, {"run": "r", "number": 1}, arrays_of(1), 0.0)
    try:
        assert begun.wait(30)
        clock.now += 1e9
        assert not checkpoints.is_due
    finally:
        may_finish.set()
    checkpoints.wait()
    clock.now += 1e12
    assert checkpoints.is_due
    assert set(steps_here(checkpoints)) == {1}
