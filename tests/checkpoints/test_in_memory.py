"""In-memory checkpoints: what was written is read, and a kill leaves one intact."""

from __future__ import annotations

import contextlib
import tempfile
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from disk_faults import Killed, faults
from hypothesis import example, given
from hypothesis import strategies as st
from in_memory_checkpoints import Inline, assert_is_bitwise, in_memory_at, save, steps_here

from trainer.checkpoints import in_memory, manifest
from trainer.checkpoints.manifest import Damaged, Leaf
from trainer.state.checksums import checksum_of


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(in_memory, "threading", types.SimpleNamespace(Thread=Inline))


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
def test_a_checkpoint_is_read_bit_for_bit(arrays):
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    with tempfile.TemporaryDirectory() as name:
        checkpoints = in_memory_at(Path(name))
        save(checkpoints, 3, arrays)
        again = in_memory_at(Path(name))
        found, listed = again.read(again.steps("r")[3])
        assert_is_bitwise(found, arrays)
        assert dict(listed.leaves) == {
            name: Leaf(array.shape, str(array.dtype), checksum_of(array))
            for name, array in arrays.items()
        }
        assert listed.meta == {"run": "r", "number": 3}


def test_a_longer_state_and_a_shorter_one_take_the_same_slot(tmp_path):
    checkpoints = in_memory_at(tmp_path / "shm")
    sizes = [50, 10, 10, 0, 70]
    for step, size in enumerate(sizes):
        arrays = {"a": np.arange(size, dtype=np.int16)}
        save(checkpoints, step, arrays)
        reader = in_memory_at(tmp_path / "shm")
        assert_is_bitwise(reader.read(reader.steps("r")[step])[0], arrays)


def test_two_slots_in_turn(tmp_path):
    checkpoints = in_memory_at(tmp_path / "shm")
    assert checkpoints.steps("r") == {}
    for step in range(1, 6):
        save(checkpoints, step)
        expected = {step, step - 1} - {0}
        assert set(steps_here(in_memory_at(tmp_path / "shm"))) == expected
    assert sorted(steps_here(checkpoints).values()) == [0, 1]


def test_the_checkpoint_a_run_resumes_from_is_overwritten_last(tmp_path):
    for newest in (0, 1):
        root = tmp_path / f"shm{newest}"
        checkpoints = in_memory_at(root)
        for step in range(3 + newest):
            save(checkpoints, step)
        last = 2 + newest
        again = in_memory_at(root)
        again.read(again.steps("r")[last])
        save(again, 10)
        assert set(steps_here(again)) == {last, 10}
        save(again, 11)
        assert set(steps_here(again)) == {10, 11}


def test_checkpoints_of_other_runs_and_other_folders_are_not_offered(tmp_path):
    checkpoints = in_memory_at(tmp_path / "shm")
    save(checkpoints, 1, run="r")
    save(checkpoints, 2, run="other")
    assert set(checkpoints.steps("r")) == {1}
    assert set(checkpoints.steps("other")) == {2}
    assert checkpoints.steps("") == {}
    assert in_memory_at(tmp_path / "shm", workdir="/runs/theirs").steps("r") == {}
    assert set(in_memory_at(tmp_path / "shm", workdir="/runs/x/../mine").steps("r")) == {1}


# Damage


def test_every_changed_byte_is_found(tmp_path):
    checkpoints = in_memory_at(tmp_path / "shm")
    save(checkpoints, 1)
    save(checkpoints, 2)
    slot = checkpoints.steps("r")[2]
    other = {1: 1 - slot}
    data = checkpoints.folder / str(slot) / "state.bin"
    whole = data.read_bytes()
    for changed in [
        *(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))),
        *(whole[:at] for at in range(len(whole))),
        whole + b"\0",
    ]:
        data.write_bytes(changed)
        with pytest.raises(Damaged, match=r"^state\.bin "):
            checkpoints.read(slot)
    data.unlink()
    with pytest.raises(Damaged, match="is missing"):
        checkpoints.read(slot)
    listed = checkpoints.folder / str(slot) / manifest.NAME
    text = listed.read_bytes()
    for at in range(len(text)):
        listed.write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :])
        assert checkpoints.steps("r") == other
        with pytest.raises(Damaged):
            checkpoints.read(slot)
    listed.unlink()
    assert checkpoints.steps("r") == other


def test_a_kill_at_any_moment_of_a_write_leaves_the_newest_before_it(tmp_path, inline):
    """And once more in the process that resumes from it."""
    at, found = 0, set()
    while True:
        at += 1
        root = tmp_path / f"{at}"
        checkpoints = in_memory_at(root)
        save(checkpoints, 1)
        save(checkpoints, 2)
        with faults(at) as state, contextlib.suppress(Killed):
            save(checkpoints, 3)
        if not state.came:
            break
        again = in_memory_at(root)
        steps = steps_here(again)
        found.add(frozenset(steps))
        assert 2 in steps
        newest = max(steps)
        again.read(steps[newest])
        with faults(at) as state, contextlib.suppress(Killed):
            save(again, 4)
        assert newest in steps_here(in_memory_at(root))
        save(in_memory_at(root), 5)
        assert 5 in steps_here(in_memory_at(root))
    assert found == {frozenset({1, 2}), frozenset({2})}


@pytest.mark.parametrize("leaf", range(5))
def test_a_kill_in_the_middle_of_the_bytes(tmp_path, inline, monkeypatch, leaf):
    checkpoints = in_memory_at(tmp_path / "shm")
    save(checkpoints, 1)
    save(checkpoints, 2)
    left = [leaf]

    def die(array):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return checksum_of(array)

    with monkeypatch.context() as patch:
        patch.setattr(in_memory, "checksum_of", die)
        with pytest.raises(Killed):
            save(checkpoints, 3)
    assert set(steps_here(in_memory_at(tmp_path / "shm"))) == {2}
    again = in_memory_at(tmp_path / "shm")
    again.read(again.steps("r")[2])
    save(again, 4)
    assert set(steps_here(again)) == {2, 4}
