"""Copies in memory: what is read is what was written, a kill leaves one, and nothing stays."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from disk_faults import Killed, faults, full_disk, tree
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.checkpoints import in_memory as in_memory
from trainer.checkpoints import manifest
from trainer.checkpoints.in_memory import InMemoryCheckpoints
from trainer.checkpoints.manifest import Damaged, Leaf
from trainer.state.checksums import checksum_of


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Inline:
    """A thread that runs in the one that starts it, so that what it raises is seen."""

    def __init__(self, target, args, **options):
        self._run = lambda: target(*args)

    def start(self):
        self._run()

    def is_alive(self):
        return False

    def join(self):
        pass


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(in_memory, "threading", types.SimpleNamespace(Thread=Inline))


@pytest.fixture
def told():
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("podlift").addHandler(handler)
    yield lines
    logging.getLogger("podlift").removeHandler(handler)


def tier_of(root, workdir="/runs/mine", every_secs=10.0, max_bytes=1e9, clock=None):
    root.mkdir(exist_ok=True)
    return InMemoryCheckpoints(workdir, root, every_secs, max_bytes, clock or Clock())


def copy(tier, step, arrays=None, run="r", blocked=0.0):
    arrays = arrays_of(step) if arrays is None else arrays
    tier.save(step, {"run": run, "number": step}, arrays, blocked)
    tier.wait()


def arrays_of(step):
    return {
        "params/w": np.full((3, 5), step, np.float32),
        "params/b": np.full(7, -step, jax.numpy.bfloat16),
        "empty": np.empty((0, 4), np.float32),
        "rng": np.array([step, 2**32 - 1], np.uint32),
        "step": np.array(step, np.int32),
    }


def assert_is_bitwise(found, expected):
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def steps_here(tier, run="r"):
    """The steps that are offered, all of which are whole."""
    found = tier.steps(run)
    slot = tier._slot
    for step, place in found.items():
        arrays, listed = tier.read(place)
        assert listed.step == step
        assert listed.meta == {"run": run, "number": step}
        assert_is_bitwise(arrays, arrays_of(step))
    tier._slot = slot
    return found


# What is written is read

DTYPES = ["float32", "float16", "bfloat16", "float64", "int8", "int64", "uint16", "uint32", "bool"]


@st.composite
def any_array(draw):
    """Of any bits: NaN of every kind, -0.0, subnormal numbers; without elements or dimensions."""
    dtype = jax.numpy.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (raw & 1 if dtype == np.bool_ else raw.copy()).view(dtype).reshape(shape)
    return np.asfortranarray(array) if draw(st.booleans()) else array


@given(st.dictionaries(st.text(min_size=1), any_array(), max_size=6))
@example({})
@example({"a": np.empty((0, 3), np.float32)})
@example({"b": np.array([-0.0, np.nan], np.float32), "a": np.array(True), "a/b": np.int8(1) + 0})
@example({"1": np.array([0x7FC00001, 0xFF800001], np.uint32).view(np.float32), "0": np.array(1)})
def test_a_copy_is_read_bit_for_bit(arrays):
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    with tempfile.TemporaryDirectory() as name:
        tier = tier_of(Path(name))
        copy(tier, 3, arrays)
        again = tier_of(Path(name))
        found, listed = again.read(again.steps("r")[3])
        assert_is_bitwise(found, arrays)
        assert dict(listed.leaves) == {
            name: Leaf(array.shape, str(array.dtype), checksum_of(array))
            for name, array in arrays.items()
        }
        assert listed.meta == {"run": "r", "number": 3}


def test_a_longer_state_and_a_shorter_one_take_the_same_slot(tmp_path):
    tier = tier_of(tmp_path / "shm")
    sizes = [50, 10, 10, 0, 70]
    for step, size in enumerate(sizes):
        arrays = {"a": np.arange(size, dtype=np.int16)}
        copy(tier, step, arrays)
        reader = tier_of(tmp_path / "shm")
        assert_is_bitwise(reader.read(reader.steps("r")[step])[0], arrays)


def test_two_slots_in_turn(tmp_path):
    tier = tier_of(tmp_path / "shm")
    assert tier.steps("r") == {}
    for step in range(1, 6):
        copy(tier, step)
        expected = {step, step - 1} - {0}
        assert set(steps_here(tier_of(tmp_path / "shm"))) == expected
    assert sorted(steps_here(tier).values()) == [0, 1]


def test_the_copy_a_run_goes_on_from_is_overwritten_last(tmp_path):
    for newest in (0, 1):
        root = tmp_path / f"shm{newest}"
        tier = tier_of(root)
        for step in range(3 + newest):
            copy(tier, step)
        last = 2 + newest
        again = tier_of(root)
        again.read(again.steps("r")[last])
        copy(again, 10)
        assert set(steps_here(again)) == {last, 10}
        copy(again, 11)
        assert set(steps_here(again)) == {10, 11}


def test_copies_of_other_runs_and_other_folders_are_not_offered(tmp_path):
    tier = tier_of(tmp_path / "shm")
    copy(tier, 1, run="r")
    copy(tier, 2, run="other")
    assert set(tier.steps("r")) == {1}
    assert set(tier.steps("other")) == {2}
    assert tier.steps("") == {}
    assert tier_of(tmp_path / "shm", workdir="/runs/theirs").steps("r") == {}
    assert set(tier_of(tmp_path / "shm", workdir="/runs/x/../mine").steps("r")) == {1}


# Damage


def test_every_changed_byte_is_found(tmp_path):
    tier = tier_of(tmp_path / "shm")
    copy(tier, 1)
    copy(tier, 2)
    slot = tier.steps("r")[2]
    other = {1: 1 - slot}
    data = tier.folder / str(slot) / "state.bin"
    whole = data.read_bytes()
    for changed in [
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))),
        *(whole[:at] for at in range(len(whole))),
        whole + b"\0",
    ]:
        data.write_bytes(changed)
        with pytest.raises(Damaged, match=r"^state\.bin "):
            tier.read(slot)
    data.unlink()
    with pytest.raises(Damaged, match="is missing"):
        tier.read(slot)
    listed = tier.folder / str(slot) / manifest.NAME
    text = listed.read_bytes()
    for at in range(len(text)):
        listed.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert tier.steps("r") == other
        with pytest.raises(Damaged):
            tier.read(slot)
    listed.unlink()
    assert tier.steps("r") == other


def test_a_kill_at_any_moment_of_a_write_leaves_the_newest_before_it(tmp_path, inline):
    """And once more in the process that goes on from that."""
    at, found = 0, set()
    while True:
        at += 1
        root = tmp_path / f"{at}"
        tier = tier_of(root)
        copy(tier, 1)
        copy(tier, 2)
        with faults(at) as state, contextlib.suppress(Killed):
            copy(tier, 3)
        if not state.came:
            break
        again = tier_of(root)
        steps = steps_here(again)
        found.add(frozenset(steps))
        assert 2 in steps
        newest = max(steps)
        again.read(steps[newest])
        with faults(at) as state, contextlib.suppress(Killed):
            copy(again, 4)
        assert newest in steps_here(tier_of(root))
        copy(tier_of(root), 5)
        assert 5 in steps_here(tier_of(root))
    assert found == {frozenset({1, 2}), frozenset({2})}


@pytest.mark.parametrize("leaf", range(5))
def test_a_kill_in_the_middle_of_the_bytes(tmp_path, inline, monkeypatch, leaf):
    tier = tier_of(tmp_path / "shm")
    copy(tier, 1)
    copy(tier, 2)
    left = [leaf]

    def die(array):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return checksum_of(array)

    with monkeypatch.context() as patch:
        patch.setattr(in_memory, "checksum_of", die)
        with pytest.raises(Killed):
            copy(tier, 3)
    assert set(steps_here(tier_of(tmp_path / "shm"))) == {2}
    again = tier_of(tmp_path / "shm")
    again.read(again.steps("r")[2])
    copy(again, 4)
    assert set(steps_here(again)) == {2, 4}


# How much of the memory


def test_a_state_that_does_not_fit_is_told_once(tmp_path, told):
    arrays = {"a": np.zeros(1000, np.uint8)}
    tier = tier_of(tmp_path / "shm", max_bytes=1999, clock=(clock := Clock()))
    clock.now += 10
    assert tier.is_due
    copy(tier, 1, arrays)
    assert len(told) == 1
    assert (
        "two states of 1e-06 GB do not fit into 2e-06 GB, the smaller of config.checkpoint"
        in told[0]
    )
    clock.now += 1e9
    assert not tier.is_due
    assert tree(tmp_path / "shm") == {}
    tier.remove()
    fits = tier_of(tmp_path / "shm", max_bytes=2000)
    copy(fits, 1, arrays)
    assert set(fits.steps("r")) == {1}
    assert len(told) == 1


@pytest.mark.parametrize("part", [2.1, 3.9, 4.1, 4.9, 5.1])
def test_what_fits_at_first_fits_on(tmp_path, told, monkeypatch, part):
    """The memory that the copies themselves take is no reason against them."""
    arrays = {"a": np.zeros(1000, np.uint8)}
    tier = tier_of(tmp_path / "shm")

    def disk_usage(path):
        taken = sum(file.stat().st_size for file in path.rglob("state.bin"))
        return types.SimpleNamespace(free=part * 1000 - taken)

    monkeypatch.setattr(in_memory.shutil, "disk_usage", disk_usage)
    copy(tier, 1, arrays)
    begun = set(tier.steps("r"))
    assert begun == ({1} if part > 4 else set())
    if begun:
        for step in (2, 3, 4):
            copy(tier, step, arrays)
        assert told == []
        assert set(tier.steps("r")) == {3, 4}


def test_removing_gives_all_back(tmp_path):
    mine, theirs = (tier_of(tmp_path / "shm", workdir=f"/runs/{name}") for name in ("a", "b"))
    for step in (1, 2, 3):
        copy(mine, step)
        copy(theirs, step)
    before = tree(theirs.folder)
    mine.remove()
    assert not mine.folder.exists()
    assert tree(theirs.folder) == before
    theirs.remove()
    assert tree(tmp_path / "shm") == {}
    theirs.remove()
    copy(mine, 4)
    assert set(steps_here(mine)) == {4}


# Folders that are not this user's


def belong_to_another(tier, monkeypatch):
    number = os.getuid() + 1
    tier.folder.parent.rename(tier.folder.parent.with_name(f"podlift-{number}"))
    monkeypatch.setattr(os, "getuid", lambda: number)


def be_open_to_the_group(tier, monkeypatch):
    tier.folder.parent.chmod(0o770)


def be_open_to_all(tier, monkeypatch):
    tier.folder.parent.chmod(0o707)


def be_a_link(tier, monkeypatch):
    elsewhere = tier.folder.parent.with_name("elsewhere")
    tier.folder.parent.rename(elsewhere)
    tier.folder.parent.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "make", [belong_to_another, be_open_to_the_group, be_open_to_all, be_a_link]
)
def test_a_folder_others_may_write_to_is_not_touched(tmp_path, told, monkeypatch, make):
    tier = tier_of(tmp_path / "shm")
    copy(tier, 1)
    assert set(tier.steps("r")) == {1}
    make(tier, monkeypatch)
    before = tree(tmp_path / "shm")
    assert any("state.bin" in name for name in before) or make is be_a_link
    clock = Clock()
    again = tier_of(tmp_path / "shm", clock=clock)
    assert again.folder.exists()
    assert again.steps("r") == {}
    copy(again, 2)
    clock.now += 1e9
    assert not again.is_due
    assert len(told) == 1
    assert "is not this user's alone" in told[0]
    again.remove()
    assert tree(tmp_path / "shm") == before
    assert (again.folder / "0/state.bin").exists()


def test_folders_are_made_for_this_user_alone(tmp_path):
    tier = tier_of(tmp_path / "shm")
    copy(tier, 1)
    assert tier.folder.parent.stat().st_mode & 0o077 == 0
    assert (tier.folder / "workdir").read_text() == "/runs/mine\n"


# Disks that fail


def test_an_error_at_any_moment_turns_copies_off_and_raises_nothing(tmp_path, inline, told):
    at = off = 0
    while True:
        at += 1
        told.clear()
        clock = Clock()
        tier = tier_of(tmp_path / f"{at}", clock=clock)
        with faults(at, full_disk()) as state:
            copy(tier, 1)
        clock.now += 1e9
        if not state.came:
            break
        assert tier.is_due == (not told)
        if told:
            off += 1
            assert len(told) == 1
            assert told[0].endswith("cannot be written: No space left on device")
            assert tree(tmp_path / f"{at}") == {}
        else:
            assert set(steps_here(tier)) == {1}
    assert off > 5


@pytest.mark.parametrize("what", ["a file", "gone"])
def test_a_folder_that_cannot_be_used_turns_copies_off(tmp_path, told, what):
    clock = Clock()
    tier = tier_of(tmp_path / "shm", clock=clock)
    if what == "a file":
        tier.folder.parent.write_text("in the way")
    else:
        (tmp_path / "shm").rmdir()
    assert tier.steps("r") == {}
    copy(tier, 1)
    clock.now += 1e9
    assert not tier.is_due
    assert len(told) == 1
    assert told[0].startswith("warning: no more in-memory checkpoints: ")
    tier.remove()
    if what == "a file":
        assert tier.folder.parent.read_text() == "in the way"


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
def test_copies_take_a_small_part_of_the_time(
    tmp_path, inline, monkeypatch, blocked, writing, pause
):
    clock = Clock()
    write = in_memory._write_arrays

    def slowly(*args):
        clock.now += writing
        return write(*args)

    monkeypatch.setattr(in_memory, "_write_arrays", slowly)
    tier = tier_of(tmp_path / "shm", every_secs=10.0, clock=clock)
    assert not tier.is_due
    clock.now += 9.99
    assert not tier.is_due
    clock.now += 0.01
    for step in (1, 2, 3):
        assert tier.is_due
        began = clock.now
        copy(tier, step, blocked=blocked)
        clock.now = began + pause - 0.01
        assert not tier.is_due, f"after copy {step}"
        clock.now = began + pause + 0.001


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 50)), min_size=2, max_size=6))
def test_whatever_copies_take_the_parts_hold(costs):
    clock = Clock()
    writing = 0.0

    def write_arrays(path, arrays):
        clock.now += writing
        return write(path, arrays)

    write = in_memory._write_arrays
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "_write_arrays", write_arrays)
        patch.setattr(in_memory, "threading", types.SimpleNamespace(Thread=Inline))
        tier = tier_of(Path(name), every_secs=1.0, clock=clock)
        began = clock.now
        spent_blocked = spent_writing = 0.0
        for blocked, writing in costs:
            while not tier.is_due:
                clock.now += 0.5
            elapsed = clock.now - began
            assert spent_blocked <= 0.01 * elapsed + 1e-6
            assert spent_writing <= 0.05 * elapsed + 1e-6
            clock.now += blocked
            copy(tier, 1, {"a": np.zeros(1)}, blocked=blocked)
            spent_blocked += blocked
            spent_writing += writing


def test_none_is_due_while_one_is_written(tmp_path, monkeypatch):
    begun, goes_on = threading.Event(), threading.Event()
    write = in_memory._write_arrays

    def wait(*args):
        begun.set()
        assert goes_on.wait(30)
        return write(*args)

    monkeypatch.setattr(in_memory, "_write_arrays", wait)
    clock = Clock()
    tier = tier_of(tmp_path / "shm", clock=clock)
    tier.save(1, {"run": "r", "number": 1}, arrays_of(1), 0.0)
    try:
        assert begun.wait(30)
        clock.now += 1e9
        assert not tier.is_due
    finally:
        goes_on.set()
    tier.wait()
    clock.now += 1e12
    assert tier.is_due
    assert set(steps_here(tier)) == {1}
